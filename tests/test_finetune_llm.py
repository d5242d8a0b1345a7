"""training.finetune_llm: texts to rows, perplexities, full and LoRA, new vocabularies, resuming."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_assembly import audio_folder, language_model_folder  # noqa: F401 (a fixture)
from tiny_models import TEXT_CONFIGS, noise, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_speechllm import CausalLMScorer
from training import finetune_llm
from training.arguments import ModelArguments
from training.finetune_llm import LanguageModelTrainer, finetune, load_run, main
from training.model_building import build_model
from training.packed_texts import PackedTexts, check_packing, collate
from training.perplexity import measure_perplexity
from training.train_vocabulary import train_vocabulary

TEXTS = ["the thing", "an inn in the hat", "a ring", "the king", "in the", "hat", "thing a", "a tan thing"]
CONFIG = Path(finetune_llm.__file__).parent / "configs" / "finetune_llm.yaml"


def tiny_llm(text: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    values = {**TEXT_CONFIGS[text], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 40}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    model.config.use_cache = False
    return model.eval()


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory) -> str:
    return language_model_folder(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    (tmp_path / "train.txt").write_text("\n".join(TEXTS))
    (tmp_path / "dev.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:3]))
    return tmp_path


def run_of(data_dir: Path, llm_folder: str, output: str = "out", **sections):
    config = {
        "model": {"language_model": llm_folder, **sections.pop("model", {})},
        "tuning": sections.pop("tuning", {}),
        "data": {
            "train_texts": ["train.txt"], "eval_texts": {"dev": ["dev.jsonl"]}, "max_tokens": 40,
            **sections.pop("data", {}),
        },
        "training": {
            "max_steps": 12, "learning_rate": 0.01, "per_device_train_batch_size": 2, "save_steps": 100, "seed": 1,
            "report_to": "none", "disable_tqdm": True, **sections.pop("training", {}),
        },
        **sections,
    }  # fmt: skip
    (data_dir / "run.yaml").write_text(json.dumps(config))
    return load_run(data_dir / "run.yaml", data_dir / output)


# Perplexity.


def test_perplexity_is_that_of_the_loss_of_every_text_alone():
    model, tokenizer = tiny_llm(), tiny_tokenizer()
    log_prob = 0.0
    for text in TEXTS:
        ids = torch.tensor([[1, *tokenizer(f" {text}", add_special_tokens=False).input_ids, 2]])
        log_prob -= model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    perplexity = measure_perplexity(model.train(), tokenizer, TEXTS, max_batch_size=3)
    assert perplexity.log_prob == pytest.approx(log_prob, rel=1e-5) and model.training
    tokens = sum(len(tokenizer(f" {text}", add_special_tokens=False).input_ids) + 1 for text in TEXTS)
    words = sum(len(text.split()) + 1 for text in TEXTS)
    assert (perplexity.num_tokens, perplexity.num_words) == (tokens, words)
    assert perplexity.per_token == pytest.approx(math.exp(-log_prob / tokens), rel=1e-4)
    assert perplexity.per_word == pytest.approx(math.exp(-log_prob / words), rel=1e-4)


def test_a_text_that_the_vocabulary_does_not_spell_is_an_error():
    tokenizer = train_vocabulary(TEXTS, 20, "bpe")
    with pytest.raises(ValueError, match="texts: the vocabulary does not spell 'the zoo'; normalise the texts"):
        measure_perplexity(tiny_llm(), tokenizer, ["the king", "the zoo"])


# Rows.

lengths = st.lists(st.integers(2, 9), min_size=1, max_size=40)


@given(lengths, st.integers(9, 30), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_text_is_in_one_row_and_no_row_is_too_long(lens, max_tokens, seed):
    sequences = [[100 * index + token for token in range(length)] for index, length in enumerate(lens)]
    rows = PackedTexts(sequences, 1, max_tokens, seed=seed)
    found = []
    for row in (rows[index] for index in range(len(rows))):
        assert 0 < len(row["input_ids"]) == len(row["labels"]) <= max_tokens
        starts = np.flatnonzero(row["position_ids"] == 0)
        for ids, labels in zip(
            np.split(row["input_ids"], starts[1:]), np.split(row["labels"], starts[1:]), strict=True
        ):
            found.append(ids.tolist())
            assert labels.tolist() == [-100, *ids[1:]]
    assert sorted(found) == sorted(sequences)
    # Two rows that follow each other would not fit into one.
    sizes = [len(rows[index]["input_ids"]) for index in range(len(rows))]
    firsts = [len(sequences[row[0]]) for row in rows.rows]
    assert all(size + first > max_tokens for size, first in zip(sizes, firsts[1:], strict=False))


def test_rows_in_another_order_for_another_seed():
    sequences = [[index, 1] for index in range(50)]
    first, again, other = (PackedTexts(sequences, 1, 10, seed=seed) for seed in (0, 0, 1))
    assert first[0]["input_ids"].tolist() == again[0]["input_ids"].tolist() != other[0]["input_ids"].tolist()


def test_a_text_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"max_tokens must hold the longest text \(5 tokens\), got 4"):
        PackedTexts([[1] * 5], 1, 4)


@pytest.mark.parametrize("text", ["llama", "qwen3", "gpt2", "gemma", "smollm3"])
def test_the_loss_of_packed_rows_is_that_of_the_texts_alone(text):
    model, tokenizer = tiny_llm(text), tiny_tokenizer()
    sequences = [[1, *tokenizer(f" {each}", add_special_tokens=False).input_ids, 2] for each in TEXTS]
    check_packing(model, sequences[:2], 1)
    rows = PackedTexts(sequences, 1, 30)
    assert len(rows) < len(TEXTS) / 2
    batch = collate([rows[index] for index in range(len(rows))])
    count = int((batch["labels"] >= 0).sum())
    log_prob = -model(**batch).loss.item() * count
    assert log_prob == pytest.approx(measure_perplexity(model, tokenizer, TEXTS).log_prob, rel=1e-4)


def test_a_model_whose_texts_see_each_other_is_refused():
    model = tiny_llm()
    model.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {n: v for n, v in kwargs.items() if n != "position_ids"}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="data.packing: texts in one row see each other in LlamaForCausalLM"):
        check_packing(model, [[1, 5, 6, 2], [1, 7, 8, 2]], 1)


# Runs.


def final_perplexity(folder: Path) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return measure_perplexity(model, tokenizer, TEXTS[:3]).per_word


@pytest.mark.parametrize(
    "case",
    ["full", "lora and new vocabulary"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "new vocabulary", "random", "unpacked")],
)
def test_it_learns_and_its_result_is_a_language_model(case, data_dir, llm_folder, audio_folder):  # noqa: F811
    model, tuning, data = {}, {}, {}
    if "lora" in case:
        tuning = {"llm": "lora", "lora_r": 4, "lora_alpha": 8, "llm_embeddings": "full" if "new" in case else "freeze"}
    if "new vocabulary" in case:
        train_vocabulary(TEXTS, 20, "bpe").save_pretrained(data_dir / "vocabulary")
        model = {"vocabulary": str(data_dir / "vocabulary")}
    if case == "random":
        model = {"llm_init": "random"}
    if case == "unpacked":
        data = {"packing": False}
    run = run_of(data_dir, llm_folder, model=model, tuning=tuning, data=data, training={"max_steps": 30})
    perplexities = finetune(run, data_dir)
    before, after = (perplexities[key][f"{key}_dev_perplexity_per_word"] for key in ("before", "after"))
    assert after < 0.3 * before
    final = data_dir / "out/final"
    assert final_perplexity(final) == pytest.approx(after, rel=1e-3)
    assert json.loads((data_dir / "out/perplexity.json").read_text()) == perplexities
    assert not (data_dir / "out/trained").exists() and not (final / "adapter_config.json").exists()
    # What it saw as effective is a config for the same run.
    effective = yaml.safe_load((final / "training.yaml").read_text())
    assert effective["tuning"]["llm"] == tuning.get("llm", "full") and effective["data"]["max_tokens"] == 40
    assert load_run(final / "training.yaml", data_dir / "out").effective == effective
    # As the language model of a speech LLM.
    units = {"ctc_units": "llm"} if "new" in case else {"ctc_units": "subset", "ctc_subset_size": 30}
    speech_llm, processor = build_model(ModelArguments(audio_folder, str(final), **units))
    batch = processor(noise(0.5), text=["the king"])
    assert speech_llm(**batch).loss.isfinite()


def test_weights_below_a_lora_are_rounded_in_training_only(data_dir, llm_folder, monkeypatch):
    dtypes = set()

    def log(self, logs, *args, **kwargs):
        dtypes.update(p.dtype for name, p in self.model.named_parameters() if "base_layer" in name)

    monkeypatch.setattr(finetune_llm.LanguageModelTrainer, "log", log)
    tuning = {"llm": "lora", "lora_r": 4, "lora_targets": "v_proj", "llm_frozen_dtype": "bfloat16"}
    perplexities = finetune(run_of(data_dir, llm_folder, tuning=tuning, training={"max_steps": 30}), data_dir)
    assert dtypes == {torch.bfloat16}
    assert (
        perplexities["after"]["after_dev_perplexity_per_word"]
        < perplexities["before"]["before_dev_perplexity_per_word"]
    )
    before = AutoModelForCausalLM.from_pretrained(llm_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(data_dir / "out/final").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(name.endswith("v_proj.weight") for name in changed)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights(data_dir, llm_folder, monkeypatch):
    options = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1}
    tuning = {"llm": "lora", "lora_r": 2, "lora_dropout": 0.1}
    finetune(run_of(data_dir, llm_folder, "whole", tuning=tuning, training=options), data_dir)
    done = []
    training_step = LanguageModelTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(run_of(data_dir, llm_folder, tuning=tuning, training=options), data_dir)
    before = json.loads((data_dir / "out/perplexity.json").read_text())["before"]
    (data_dir / "out/checkpoint-9").mkdir()  # half-written: not chosen
    perplexities = finetune(run_of(data_dir, llm_folder, tuning=tuning, training=options), data_dir)
    assert perplexities["before"] == before
    whole, resumed = (load_file(data_dir / name / "final/model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    trained = load_file(data_dir / "out/checkpoint-6/trained.safetensors")
    assert trained and all("lora_" in name for name in trained)


def test_one_process_alone_writes(data_dir, llm_folder, monkeypatch):
    run = run_of(data_dir, llm_folder)
    model, tokenizer = finetune_llm.build(run)
    trainer = LanguageModelTrainer(model=model, args=run.training, tokenizer=tokenizer, eval_texts={}, effective={})
    for should_save in (False, True):
        monkeypatch.setattr(TrainingArguments, "should_save", should_save)
        trainer._save(str(data_dir / "saved"))
        assert (data_dir / "saved/trained.safetensors").exists() == should_save


def test_gradient_accumulation_leaves_the_result_as_it_is(data_dir, llm_folder):
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        options = {
            "max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd",
            "max_grad_norm": 0.0,
        }  # fmt: skip
        run = run_of(data_dir, llm_folder, f"out-{size}", data={"packing": False}, training=options)
        finetune(run, data_dir)
        weights.append(load_file(data_dir / f"out-{size}/final/model.safetensors"))
    start = load_file(Path(llm_folder) / "model.safetensors")
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(value, start[name]) for name, value in weights[0].items())


def test_a_finished_run_is_not_repeated(data_dir, llm_folder, monkeypatch):
    run = run_of(data_dir, llm_folder, training={"max_steps": 1})
    perplexities = finetune(run, data_dir)
    monkeypatch.setattr(finetune_llm, "build", None)
    assert finetune(run, data_dir) == perplexities


def test_texts_that_are_too_long_are_left_out(data_dir, llm_folder, caplog):
    run = run_of(data_dir, llm_folder, data={"max_tokens": 8}, training={"max_steps": 1})
    scorer = CausalLMScorer(AutoModelForCausalLM.from_pretrained(llm_folder).eval(), tiny_tokenizer())
    scorer.model.config.use_cache = False
    rows = finetune_llm.training_texts(run, scorer, data_dir)
    assert sum(map(len, rows.rows)) < len(TEXTS) and f"of {len(TEXTS)} texts have more than 8 tokens" in caplog.text
    with pytest.raises(ValueError, match="data.max_tokens: all 8 texts are longer than 2 tokens"):
        finetune_llm.training_texts(run_of(data_dir, llm_folder, data={"max_tokens": 2}), scorer, data_dir)


# Options.


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": {}}, "run.yaml: unknown key 'modle'"),
        ({"model": {"llm": "x"}}, "section 'model': .*llm"),
        ({"tuning": {"rank": 3}}, "section 'tuning': .*rank"),
        ({"data": {"texts": []}}, "section 'data': .*texts"),
        ({"training": {"steps": 3}}, "section 'training': .*steps"),
        ({"tuning": {"llm": "freeze"}}, r"tuning.llm must be one of \('full', 'lora'\), got 'freeze'"),
        ({"tuning": {"llm_frozen_dtype": "int8"}}, r"tuning.llm_frozen_dtype must be one of .*, got 'int8'"),
        ({"tuning": {"llm_embeddings": "lora"}}, r"tuning.llm_embeddings must be one of \('freeze', 'full'\)"),
        ({"tuning": {"llm": "lora"}, "model": {"llm_init": "random"}}, "llm_init: random needs tuning.llm: full"),
        ({"tuning": {"llm": "lora"}, "model": {"vocabulary": "v"}}, "vocabulary: its embeddings have to learn"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_options_that_make_no_sense_are_refused(sections, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path, "x", **sections)


def test_the_example_config_and_overrides_can_be_read(tmp_path):
    run = load_run(CONFIG, tmp_path, ["training.max_steps=3"])
    assert run.training.max_steps == 3 and run.data.packing and run.tuning.llm == "full"
    assert run.training.learning_rate == 1e-5 and run.training.output_dir == str(tmp_path)
    assert load_run(CONFIG, tmp_path, ["data.packing=false"]).training.train_sampling_strategy == "group_by_length"


def test_the_command_line(monkeypatch, tmp_path, capsys):
    calls = []

    def fake(run, data_dir):
        calls.append((run, data_dir))
        return {"before": {"before_dev_perplexity_per_word": 12.345}}

    monkeypatch.setattr(finetune_llm, "finetune", fake)
    folders = ["--data-dir", str(tmp_path / "d"), "--output-dir", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["finetune_llm", str(CONFIG), *folders, "training.max_steps=3"])
    main()
    ((run, data_dir),) = calls
    assert data_dir == tmp_path / "d" and run.training.output_dir == str(tmp_path / "o") and run.training.max_steps == 3
    assert "before_dev_perplexity_per_word: 12.35" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["finetune_llm", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "SECTION.KEY=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("model: {}", "model.language_model is required: a Hub id, a folder, or base:NAME"),
        ("model: {language_model: a}\ndata: {max_tokens: many}", "max_tokens must be of the type int, got 'many'."),
        ("model: [", "expected YAML (while parsing a flow"),
    ],
)
def test_mistakes_are_told_in_one_line(config, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(config)
    folders = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["finetune_llm", str(tmp_path / "run.yaml"), *folders])
    with pytest.raises(SystemExit, match="2"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finetune_llm: error: ") and message in line

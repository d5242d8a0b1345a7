"""New vocabularies: training sub-words, embeddings for them, CTC labels of their own, random language models."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_assembly import audio_folder, language_model_folder, randomise, save_parts  # noqa: F401 (a fixture)
from tiny_models import LETTERS, noise, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer

import training.train_vocabulary
from hf_speechllm import CausalLMScorer
from hf_speechllm.adapters import has_adapters
from hf_speechllm.assembly import assemble, load_trained_parts
from hf_speechllm.vocabulary import build_language_model, replace_vocabulary, subword_chains, subword_labels
from training.arguments import ModelArguments, TuningArguments, load_stages
from training.export import export
from training.model_building import build_model, build_processor
from training.text_sources import read_texts
from training.train import named_now, run, set_trainable
from training.train_vocabulary import main, train_vocabulary

TEXTS = [
    "the quick brown fox didn't jump over the lazy dog",
    "the others were there then they said that nothing in the world",
    "would make them think again of winter and spring and the king",
] * 3
SIZES = {"bpe": 60, "unigram": 40}


@pytest.fixture(scope="module", params=SIZES)
def tokenizer(request):
    return train_vocabulary(TEXTS, SIZES[request.param], request.param)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(TEXTS, SIZES["bpe"], "bpe").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory) -> str:
    return language_model_folder(tmp_path_factory.mktemp("llm"))


# The sub-words.


def test_the_vocabulary_has_the_size_and_the_texts_come_back(tokenizer):
    assert len(tokenizer) - len(tokenizer.all_special_ids) in SIZES.values()
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    for text in TEXTS:
        ids = tokenizer(f" {text}", add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == f" {text}" and tokenizer.unk_token_id not in ids
        assert len(ids) < len(text)


@given(st.lists(st.text(alphabet="acdehinorstw'", min_size=1, max_size=8), max_size=6))
@settings(max_examples=60, deadline=None)
def test_words_are_spelled_independently_of_their_neighbours(words):
    for kind, size in SIZES.items():
        tokenizer = train_vocabulary_once(kind, size)
        apart = [index for word in words for index in tokenizer(f" {word}", add_special_tokens=False).input_ids]
        together = "".join(f" {word}" for word in words)
        assert tokenizer(together, add_special_tokens=False).input_ids == apart
        assert tokenizer.decode(apart) == together


_TRAINED = {}


def train_vocabulary_once(kind: str, size: int):
    return _TRAINED.setdefault(kind, train_vocabulary(TEXTS, size, kind))


def test_a_character_that_the_texts_lack_is_unknown(tokenizer):
    assert tokenizer.unk_token_id in tokenizer(" th\u00e9", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEXTS, 60, "wordpiece"), r"kind must be one of \('bpe', 'unigram'\), got 'wordpiece'"),
        ((TEXTS, 20, "bpe"), r"size must be at least 28, the characters of the texts, got 20"),
        ((TEXTS, 5000, "bpe"), r"size: 9 texts give \d+ sub-words of kind 'bpe', not 5000; choose another size"),
    ],
)
def test_what_cannot_be_trained_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_vocabulary(*arguments)


def test_the_command_writes_a_tokenizer_and_a_language_model_for_it(tmp_path, llm_folder, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(text.upper() for text in TEXTS))
    command = ["train_vocabulary", str(tmp_path / "out"), "--data-dir", str(tmp_path), "--texts", "*.txt"]
    command += ["--size", "60", "--kind", "bpe", "--text-normalization", "lower", "--language-model", llm_folder]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert "60 sub-words, 2.59 per word of 9 texts" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 64 == model.config.vocab_size
    assert CausalLMScorer(model.eval(), tokenizer).score([[5, 6]]).isfinite().all()
    monkeypatch.setattr("sys.argv", [*command[:8], "--size", "3"])
    with pytest.raises(SystemExit):
        training.train_vocabulary.main()
    assert "train_vocabulary: error: size must be at least" in capsys.readouterr().err


# Texts.


def test_texts_of_manifests_plain_files_and_gzip_are_read_in_order(tmp_path):
    import gzip

    (tmp_path / "b.txt").write_text("One\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"text": "Three"}\n\n{"text": " "}\n')
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("Four\n")
    assert read_texts(["b.txt", "a.jsonl", "*.gz"], tmp_path, "lower") == ["one", "two", "three", "four"]


def test_texts_of_a_data_set_are_its_column(tmp_path):
    import datasets

    rows = {"sentence": ["one", "two", "three"], "other": [1, 2, 3]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    source = {"path": str(tmp_path / "data"), "column": "sentence", "limit": 2}
    assert read_texts([source], tmp_path) == ["one", "two"]
    with pytest.raises(ValueError, match=r"column must be one of \['other', 'sentence'\], got 'text'"):
        read_texts([{"path": str(tmp_path / "data")}], tmp_path)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["x*.txt"], r"texts: 'x\*.txt' matches no file in "),
        (["empty.txt"], r"texts: there are none in \['empty.txt'\]"),
        (["bad.jsonl"], r"bad.jsonl:1: field 'text' must be a string, got 3"),
        ([{"path": "x", "colum": "y"}], r"texts, .*unexpected keyword argument 'colum'"),
    ],
)
def test_texts_that_cannot_be_read_are_errors(sources, message, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=message):
        read_texts(sources, tmp_path)
    with pytest.raises(ValueError, match="text_normalization must be one of .*got 'upper'"):
        read_texts(sources, tmp_path, "upper")


# Language models.


@pytest.mark.parametrize("is_tied", [True, False])
def test_new_embeddings_are_the_means_of_the_old_ones_of_the_same_text(tmp_path, tokenizer, is_tied):
    folder = language_model_folder(tmp_path, tie_word_embeddings=is_tied)
    old = AutoModelForCausalLM.from_pretrained(folder)
    model, _ = build_language_model(folder)
    replace_vocabulary(model, tiny_tokenizer(), tokenizer)
    own = tiny_tokenizer()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, get)().weight, getattr(model, get)().weight
        assert after.shape == (len(tokenizer), before.shape[1])
        for piece in ("▁the", "q", "▁"):
            ids = own.convert_tokens_to_ids({"▁the": ["Ġthe"], "q": ["q"], "▁": ["Ġ"]}[piece])
            torch.testing.assert_close(after[tokenizer.convert_tokens_to_ids(piece)], before[ids].mean(0))
        torch.testing.assert_close(after[tokenizer.eos_token_id], before[own.eos_token_id])
        torch.testing.assert_close(after[tokenizer.unk_token_id], before.mean(0))
    longer = next(token for token in sorted(tokenizer.get_vocab()) if len(token) > 1 and token.isalpha())
    ids = own(longer).input_ids
    torch.testing.assert_close(
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(longer)],
        old.get_input_embeddings().weight[ids].mean(0),
    )
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.bos_token_id) == (len(tokenizer), 2, 1)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.tensor([[1, 7, 9]])
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_a_vocabulary_without_end_of_sequence_is_an_error(llm_folder):
    model, own = build_language_model(llm_folder)
    tokenizer = train_vocabulary(TEXTS, 60, "bpe")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="vocabulary: the tokenizer must have an end-of-sequence token"):
        replace_vocabulary(model, own, tokenizer)


def test_a_random_language_model_has_the_architecture_and_other_weights(llm_folder, vocabulary):
    pretrained, _ = build_language_model(llm_folder)
    torch.manual_seed(3)
    model, tokenizer = build_language_model(llm_folder, init="random")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in pretrained.named_parameters()}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(name), pretrained.get_parameter(name))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    torch.manual_seed(3)
    again, _ = build_language_model(llm_folder, init="random")
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    smaller, tokenizer = build_language_model(llm_folder, vocabulary, init="random")
    assert smaller.config.vocab_size == len(tokenizer) == SIZES["bpe"] + 4
    with pytest.raises(ValueError, match=r"llm_init must be one of \('pretrained', 'random'\), got 'zero'"):
        build_language_model(llm_folder, init="zero")


# CTC labels.


def test_the_chains_of_a_token_are_its_text_in_sub_words(tokenizer):
    own = tiny_tokenizer()
    chains = subword_chains(own, tokenizer)
    labels = subword_labels(tokenizer)
    assert len(labels) == chains.num_labels - 1 == chains.blank_id == len(tokenizer) - 4
    assert labels.count(" the") == 1 and "<unk>" not in labels
    for token in ("Ġthe", "ing", "Ġa", "'", "q"):
        index = own.convert_tokens_to_ids(token)
        row = chains.chains[index]
        assert "".join(labels[label] for label in row if label >= 0) == token.replace("Ġ", " ")
    # Upper case is spelled as lower case, as there is no other.
    row = chains.chains[own.convert_tokens_to_ids("Bc")]
    assert "".join(labels[label] for label in row if label >= 0) == "bc"
    assert chains.chains[own.eos_token_id, 0] == -2


def test_a_vocabulary_with_capitals_spells_them_as_they_are_written():
    own = tiny_tokenizer()
    tokenizer = train_vocabulary([text.capitalize() + " Bob" for text in TEXTS], 62, "bpe")
    labels, chains = subword_labels(tokenizer), subword_chains(own, tokenizer)
    row = chains.chains[own.convert_tokens_to_ids("B")]
    assert [labels[label] for label in row if label >= 0] == ["B"]


# Training and assembly.


def arguments_of(audio: str, llm: str, **values) -> ModelArguments:
    prompts = {"prompt_before": "<s>", "prompt_after": "</s><s>"}
    return ModelArguments(audio, llm, config={"downsampling": 2, **prompts}, **values)


def parts_of(folder: Path, arguments: ModelArguments, tunings: list[TuningArguments]):
    """Trains with random numbers and saves as `training.train.run` does."""
    torch.manual_seed(0)
    model, processor = build_model(arguments)
    names = {"ctc_chains"} if arguments.ctc_units == "subwords" else set()
    for seed, tuning in enumerate(tunings):
        set_trainable(model, tuning)
        names = named_now(model, names)
        randomise(model, seed=seed)
        names |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.generation_config.max_new_tokens = 5
    save_parts(folder, model, names, arguments, tunings[-1])
    return model.eval(), processor


def outputs(model, processor):
    inputs = processor(noise(0.6), text=["the thing"])
    with torch.no_grad():
        output = model(**inputs)
        sequences = [
            model.generate(input_features=inputs["input_features"], num_beams=2, ctc_weight=weight)
            for weight in (0.0, 0.5)
        ]
        options = {"mode": "ctc_greedy", "tokenizer": processor.tokenizer}
        sequences.append(model.generate(input_features=inputs["input_features"], **options))
    return [output.loss, output.ctc_loss, output.logits, output.audio.ctc_log_probs, *sequences]


LORA = {"lora_r": 2, "lora_alpha": 3}
STRATEGIES = {
    "sub-words for CTC, LoRA": (
        {"ctc_units": "subwords"},
        [TuningArguments(encoder="full", llm="lora", **LORA)],
    ),
    "new vocabulary for both, LoRA and embeddings": (
        {"ctc_units": "llm", "new": True},
        [TuningArguments(llm="lora", llm_embeddings="full", **LORA)],
    ),
    "random language model, full": (
        {"ctc_units": "characters", "llm_init": "random"},
        [TuningArguments(llm="full")],
    ),
    "LoRA everywhere": (
        {"ctc_units": "characters"},
        [
            TuningArguments(projector="full"),
            TuningArguments(encoder="lora", projector="lora", llm="lora", encoder_layers=2, **LORA),
        ],
    ),
    "full encoder, then LoRA on it": (
        {"ctc_units": "characters"},
        [TuningArguments(encoder="full"), TuningArguments(encoder="lora", **LORA)],
    ),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_what_was_trained_is_put_together_again(case, tmp_path, audio_folder, llm_folder, vocabulary):  # noqa: F811
    values, tunings = STRATEGIES[case]
    values = dict(values)
    if values.pop("new", False):
        values["vocabulary"] = vocabulary
    if values["ctc_units"] == "subwords":
        values["ctc_vocabulary"] = vocabulary
    model, processor = parts_of(tmp_path / "parts", arguments_of(audio_folder, llm_folder, **values), tunings)
    expected = outputs(model, processor)
    assert expected[1].isfinite() and bool(expected[1] > 0)
    again, its_processor = load_trained_parts(tmp_path / "parts")
    for value, wanted in zip(outputs(again, its_processor), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
    assert has_adapters(again.language_model) == (tunings[-1].llm == "lora")
    assert not has_adapters(again.audio_tower) and not has_adapters(again.multi_modal_projector)
    # As it is shared: in 16 bit, assembled, LoRA merged.
    export(tmp_path / "parts", tmp_path / "shared", {})
    shared = load_file(tmp_path / "shared" / "trained.safetensors")
    assert all(value.dtype in (torch.float16, torch.int32) for value in shared.values())
    assemble(tmp_path / "shared", tmp_path / "checkpoint", merge_lora=True)
    checkpoint = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "checkpoint")
    values = outputs(checkpoint.eval(), AutoProcessor.from_pretrained(tmp_path / "checkpoint"))
    for value, wanted in zip(values[:4], expected[:4], strict=True):
        torch.testing.assert_close(value, wanted, atol=0.05, rtol=0.05)


def test_random_weights_that_were_not_trained_cannot_be_assembled(tmp_path, audio_folder, llm_folder):  # noqa: F811
    arguments = arguments_of(audio_folder, llm_folder, ctc_units="characters", llm_init="random")
    parts_of(tmp_path / "parts", arguments, [TuningArguments()])
    with pytest.raises(ValueError, match=r"random weights \(llm_init\), and 'language_model.*' was not trained"):
        load_trained_parts(tmp_path / "parts")


def test_sub_words_need_a_vocabulary_and_are_no_tokens(audio_folder, llm_folder, vocabulary):  # noqa: F811
    with pytest.raises(ValueError, match="ctc_vocabulary is required with ctc_units: subwords"):
        build_processor(arguments_of(audio_folder, llm_folder, ctc_units="subwords"))
    values = {"ctc_units": "subwords", "ctc_vocabulary": vocabulary, "llm_units": "ctc"}
    with pytest.raises(ValueError, match="llm_units: ctc needs CTC labels that are tokens; set vocabulary"):
        build_processor(arguments_of(audio_folder, llm_folder, **values))


def test_a_prompt_that_the_new_vocabulary_does_not_spell_is_an_error(audio_folder, llm_folder, vocabulary):  # noqa: F811
    arguments = arguments_of(audio_folder, llm_folder, ctc_units="llm", vocabulary=vocabulary)
    arguments.config["prompt_after"] = "<|im_end|>"
    with pytest.raises(ValueError, match=r"prompt_after: the new vocabulary does not spell '<|im_end|>'"):
        build_processor(arguments)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_of_the_encoder_is_on_its_top_layers_only(audio_folder, llm_folder):  # noqa: F811
    model, _ = build_model(arguments_of(audio_folder, llm_folder, ctc_units="characters"))
    set_trainable(model, TuningArguments(encoder="lora", encoder_layers=2, projector="freeze", ctc_head="freeze"))
    names = trainable(model)
    assert {name.rpartition("lora_")[0] for name in names} == {
        f"audio_tower.layers.{layer}.self_attn.{leaf}." for layer in (1, 2) for leaf in ("q_proj", "v_proj")
    }
    frozen = TuningArguments(encoder="freeze", projector="freeze", ctc_head="freeze")
    set_trainable(model, frozen)
    assert not trainable(model)
    set_trainable(model, TuningArguments(encoder="full", encoder_layers=1, projector="freeze", ctc_head="freeze"))
    assert all(name.startswith(("audio_tower.layers.2.", "audio_tower.layer_norm.")) for name in trainable(model))
    assert not any("lora_" in name for name in trainable(model))


def test_lora_without_a_layer_to_adapt_is_an_error(audio_folder, llm_folder):  # noqa: F811
    model, _ = build_model(arguments_of(audio_folder, llm_folder, ctc_units="characters"))
    with pytest.raises(ValueError, match="tuning.encoder_lora_targets: Target modules .* not found"):
        set_trainable(model, TuningArguments(encoder="lora", encoder_lora_targets="q_porj"))


def test_lora_of_a_projector_that_has_not_learnt_is_an_error(tmp_path, audio_folder, llm_folder):  # noqa: F811
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"audio_model": audio_folder, "language_model": llm_folder, "ctc_units": "characters"},
                "tuning": {"projector": "lora"},
            }
        )
    )
    with pytest.raises(ValueError, match="stage 'main', tuning.projector: lora adapts a projector that has learnt"):
        run(load_stages(tmp_path / "run.yaml", tmp_path / "out"), tmp_path)


def test_letters_of_the_tiny_tokenizer_are_all_among_the_sub_words(tokenizer):
    assert set(LETTERS) <= set(tokenizer.get_vocab())

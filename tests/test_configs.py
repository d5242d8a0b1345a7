"""training/configs: every recipe trains two steps with tiny models on a few utterances in the format of its data."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from speech_data import librispeech_columns, loquacious_columns, write_hub_folder
from test_training import write_config
from tiny_models import tiny_model, tiny_processor

import training.train
from training.arguments import load_stages
from training.train import run

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
PAPER = ["librispeech_100", "librispeech_960", "loquacious_small", "loquacious_medium", "loquacious_large"]
TEXTS = ["The thing.", "an inn", "a ring!", "the king"]
DURATIONS_S = [1.0, 0.6, 0.8, 0.9]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Both data sets under their names on the Hub."""
    folder = tmp_path_factory.mktemp("data")
    clean, other = (librispeech_columns(TEXTS, DURATIONS_S, start) for start in (0, 4))
    splits = {("clean", each): [clean] for each in ("train.100", "train.360", "validation")}
    splits |= {("other", each): [other] for each in ("train.500", "validation")}
    (folder / "openslr").mkdir()
    write_hub_folder(folder / "openslr/librispeech_asr", splits, "audio")
    files = [loquacious_columns(TEXTS, DURATIONS_S, start) for start in (0, 4)]
    names = [(name, split) for name in ("small", "medium", "large") for split in ("train", "dev")]
    (folder / "speechbrain").mkdir()
    write_hub_folder(folder / "speechbrain/LoquaciousSet", dict.fromkeys(names, files), "wav")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of every pass
        datasets.disable_progress_bars()
        yield folder


def build(_arguments):
    """In place of the models of the recipe: the same kind of encoder and language model, CTC over its vocabulary."""
    tokens = len(tiny_processor("wav2vec2-bert").tokenizer)
    values = {"ctc_token_ids": list(range(3, tokens)), "projector": "stack", "downsampling": 6}
    model = tiny_model("wav2vec2-bert", "qwen2", **values)
    return model, tiny_processor("wav2vec2-bert")


SLOW = ("librispeech_960", "loquacious_medium")  # differ from others in names and numbers alone


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PAPER])
def test_the_recipes_of_the_paper_train(name, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(training.train, "build_model", build)
    overrides = [
        "training.max_steps=2",
        "training.warmup_steps=1",
        "training.lr_scheduler_kwargs={num_decay_steps: 1, num_stable_steps: 0}",
        "training.eval_steps=2",
        "training.save_steps=2",
        "training.logging_steps=1",
        "training.dataloader_num_workers=0",
        "training.bf16=false",
        "training.disable_tqdm=true",
        "data.spec_augment_options={schedule_steps: [0, 0, 0]}",
        "data.max_eval_examples=2",
        "data.batch_duration_s=20",
    ]
    stages = load_stages(CONFIGS / f"{name}.yaml", tmp_path, overrides)
    for stage in stages:
        stage.generation["max_new_tokens"] = 4
    assert [stage.name for stage in stages] == ["ctc", "speech_llm"]
    run(stages, data_dir)
    for stage in stages:
        folder = tmp_path / stage.name / "final"
        report = json.loads((folder / "data_report.json").read_text())
        assert report["utterances"] > 0 and report["bad_rows"] == []
        history = json.loads((folder.parent / "checkpoint-2/trainer_state.json").read_text())["log_history"]
        assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in history if "loss" in entry)
        assert any("_wer" in key for entry in history for key in entry)


@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_of_the_paper_say_what_it_says(name, tmp_path):
    ctc, llm = load_stages(CONFIGS / f"{name}.yaml", tmp_path)
    assert ctc.model.language_model == "Qwen/Qwen2-0.5B" and ctc.model.ctc_units == "llm"
    assert (ctc.tuning.llm, ctc.tuning.ce_loss_weight, ctc.tuning.encoder) == ("freeze", 0.0, "full")
    lora = llm.tuning
    assert (lora.llm, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == ("lora", 320, 16, 0.1)
    assert lora.lora_rslora and lora.lora_targets == "q_proj|v_proj"
    for stage in (ctc, llm):
        steps = stage.training.max_steps
        assert stage.training.bf16 and stage.data.max_duration_s == 19.5 and stage.data.spec_augment
        assert stage.data.text_normalization == "lower_no_punctuation"
        assert stage.training.warmup_steps == stage.training.lr_scheduler_kwargs["num_decay_steps"] == 0.45 * steps
    hours = {"librispeech_100": 100, "librispeech_960": 960, "loquacious_small": 250}
    hours |= {"loquacious_medium": 2500, "loquacious_large": 25_000}
    passes = {"loquacious_large": 4, "loquacious_medium": 8, "librispeech_100": 40}.get(name, 20)
    hours_a_step = 8 * ctc.data.batch_duration_s / 3600
    assert ctc.training.max_steps * hours_a_step / hours[name] == pytest.approx(passes, rel=0.01)


# The base of a recipe.


def test_a_recipe_may_change_another(tmp_path):
    write_config(
        tmp_path / "base.yaml",
        data={"min_duration_s": 0.1, "max_duration_s": 9.0},
        training={"max_steps": 5},
        stages=[{"name": "one", "tuning": {"lora_r": 4, "llm": "lora"}}, {"name": "two"}],
    )
    stages = [{"name": "one", "tuning": {"lora_r": 8}}, {"name": "three", "training": {"max_steps": 1}}]
    path = write_config(tmp_path / "run.yaml", base="base.yaml", data={"max_duration_s": 8.0}, stages=stages)
    one, two, three = load_stages(path, tmp_path)
    assert [each.name for each in (one, two, three)] == ["one", "two", "three"]
    assert all((each.data.min_duration_s, each.data.max_duration_s) == (0.1, 8.0) for each in (one, two, three))
    assert (one.tuning.lora_r, one.tuning.llm) == (8, "lora")
    assert [each.training.max_steps for each in (one, two, three)] == [5, 5, 1]


def test_a_base_without_stages_has_none(tmp_path):
    write_config(tmp_path / "base.yaml", training={"max_steps": 5})
    path = write_config(tmp_path / "run.yaml", base="base.yaml", training={"seed": 3})
    (stage,) = load_stages(path, tmp_path)
    assert (stage.name, stage.training.max_steps, stage.training.seed) == ("main", 5, 3)


@pytest.mark.parametrize("content", [{"data": {"speling": 1}}, {"dat": {}}], ids=str)
def test_the_base_is_verified_too(tmp_path, content):
    write_config(tmp_path / "base.yaml", **content)
    path = write_config(tmp_path / "run.yaml", base="base.yaml")
    with pytest.raises(ValueError, match="speling|unknown key 'dat'"):
        load_stages(path, tmp_path)


# accelerate.


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")])
def test_accelerate_reads_its_configs(name, kind):
    path = CONFIGS / f"accelerate/{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(path))  # refuses unknown keys
    assert config.distributed_type == kind and config.mixed_precision == "bf16" and config.num_processes == 8
    values = yaml.safe_load(path.read_text())
    if kind == "FSDP":
        assert values["fsdp_config"]["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert values["deepspeed_config"]["zero_stage"] == 2

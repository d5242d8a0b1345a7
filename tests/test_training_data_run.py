"""training.train with bad data, streams, SpecAugment; what is logged; checkpoints that were not finished."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from speech_data import loquacious_columns, write_hub_folder
from test_training import RATE, tone, write_config, write_manifest
from test_training_run import DURATIONS_S, TEXTS, assert_equal_weights, stages_of, weights
from tiny_models import tiny_model, tiny_processor

import training.trainer
from training.arguments import load_stages
from training.checkpoints import last_checkpoint
from training.data_report import DataReport
from training.train import run
from training.trainer import SpeechLLMTrainer, check_report_to

pytestmark = pytest.mark.usefixtures("quick_data_sets")

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_manifest(folder / "train.jsonl", TEXTS, DURATIONS_S)
    return folder


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def one_stage(**sections) -> list[dict]:
    """A stage of three steps that trains everything, with these changes."""
    tuning = {"encoder": "full", "llm": "lora", "lora_r": 2, **sections.pop("tuning", {})}
    options = {"learning_rate": 0.01, "max_steps": 3, "save_steps": 3, **sections.pop("training", {})}
    data = {"augment": False, **sections.pop("data", {})}
    return [{"name": "stage", "tuning": tuning, "training": options, "data": data, **sections}]


# Bad data.


@pytest.fixture
def bad_dir(tmp_path, data_dir) -> Path:
    """A manifest of three good rows and one of each kind that a file may be bad by."""
    folder = tmp_path / "bad"
    folder.mkdir()
    with_nan = tone(0.6, 200)
    with_nan[7] = math.nan
    soundfile.write(folder / "nan.wav", with_nan, RATE, subtype="FLOAT")
    soundfile.write(folder / "empty.wav", with_nan[:0], RATE)
    soundfile.write(folder / "slow.wav", tone(0.6, 200)[::2], RATE // 2)
    soundfile.write(folder / "stereo.wav", np.stack([tone(0.6, 200)] * 2, 1), RATE)
    soundfile.write(folder / "good.wav", tone(0.6, 200), RATE)
    (folder / "noise.wav").write_bytes(b"no audio at all")
    rows = [("nan", "a hat"), ("empty", "a hat"), ("slow", "a hat"), ("stereo", "a hat"), ("none", "a hat")]
    rows += [("noise", "a hat"), ("good", ""), ("good", "hat " * 30), ("good", None)]
    lines = [json.dumps({"audio_filepath": f"{name}.wav", "text": text, "duration": 0.6}) for name, text in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    shutil.copytree(data_dir, folder / "more")
    return folder


def test_bad_rows_are_skipped_counted_printed_and_saved(models, bad_dir, tmp_path, caplog):
    data = {"bad_data": "skip", "convert_audio": False, "train_manifests": ["train.jsonl", "more/train.jsonl"]}
    with caplog.at_level("INFO"):
        run(stages_of(tmp_path, "out", one_stage(data=data, training={"max_steps": 9})), bad_dir)
    report = json.loads((tmp_path / "out/stage/final/data_report.json").read_text())
    kinds = {"missing_file": 1, "unreadable": 1, "empty_audio": 1, "not_finite": 1, "sampling_rate": 1, "channels": 1}
    kinds |= {"no_text": 1, "empty_text": 1, "too_many_labels": 1}
    assert report["bad_counts"] == kinds
    assert sorted(row["row"] for row in report["bad_rows"]) == list(range(1, 10))
    assert {Path(row["source"]).name for row in report["bad_rows"]} == {"train.jsonl"}
    assert (tmp_path / "out/stage/checkpoint-9/data_report.json").is_file()
    for kind in kinds:
        assert f"1 bad rows: {kind}" in caplog.text
    assert "train.jsonl, row 1: not_finite" in caplog.text


def test_rates_and_channels_are_converted_and_counted(models, bad_dir, tmp_path):
    data = {"bad_data": "skip", "batch_duration_s": 20.0}
    run(stages_of(tmp_path, "out", one_stage(data=data, training={"max_steps": 2, "save_steps": 2})), bad_dir)
    report = DataReport.load(tmp_path / "out/stage/final")
    source = str(bad_dir / "train.jsonl")
    assert dict(report.conversions) == {(source, "resampled"): 2, (source, "channels_averaged"): 2}
    assert report.utterances == 4 and report.audio_s == pytest.approx(4 * 0.6)


def test_bad_rows_end_the_run_by_default(models, bad_dir, tmp_path):
    with pytest.raises(ValueError, match=r"train.jsonl, row \d: \w+ .*; correct it, or leave such rows out"):
        run(stages_of(tmp_path, "out", one_stage()), bad_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "hat " * 30}, r"later.jsonl, row 1: too_many_labels .*; correct it"),
        ({"text": " "}, r"later.jsonl, row 1: empty_text"),
        ({"audio_filepath": "none.wav"}, r"later.jsonl, row 1: missing_file"),
        ({"duration": -1.0}, r"later.jsonl, row 1: duration"),
        (None, r"manifest 'later.jsonl' matches no file in .*"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_rows_of_a_later_stage_are_found_before_the_first_one(models, bad_dir, data_dir, tmp_path, line, message):
    if line is not None:
        good = {"audio_filepath": "good.wav", "text": "a hat", "duration": 0.6}
        (bad_dir / "later.jsonl").write_text(json.dumps(good | line))
    first = one_stage(data={"train_manifests": ["more/train.jsonl"]})[0]
    later = {**one_stage(data={"train_manifests": ["later.jsonl"]})[0], "name": "later"}
    with pytest.raises(ValueError, match=message):
        run(stages_of(tmp_path, "out", [first, later]), bad_dir)
    assert not list((tmp_path / "out").glob("*/*"))
    # What is not trained now is not looked at.
    run(stages_of(tmp_path, "out", [first, later]), bad_dir, only=["stage"])
    assert (tmp_path / "out/stage/final").is_dir()


def test_rows_outside_the_limits_are_not_looked_at(models, bad_dir, tmp_path):
    rows = [{"audio_filepath": "none.wav", "text": "a hat", "duration": each} for each in (0.2, 2.0)]
    rows += [{"audio_filepath": "good.wav", "text": "a hat", "duration": 0.6}] * 2
    (bad_dir / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"min_duration_s": 0.3, "max_duration_s": 1.0, "train_manifests": ["train.jsonl"]}
    run(stages_of(tmp_path, "out", one_stage(data=data)), bad_dir)
    assert (tmp_path / "out/stage/final").is_dir()


def test_a_batch_of_bad_rows_alone_changes_nothing(models, bad_dir, data_dir, tmp_path):
    # The bad row makes a batch of its own; without momentum and decay its step must leave the weights alone.
    lines = [json.dumps({"audio_filepath": "none.wav", "text": "a", "duration": 1.9})]
    (bad_dir / "more/one.jsonl").write_text("\n".join(lines))
    data = {"bad_data": "skip", "train_manifests": ["more/one.jsonl"]}
    training_options = {"optim": "sgd", "weight_decay": 0.0, "max_steps": 2, "save_steps": 2}
    run(stages_of(tmp_path, "out", one_stage(data=data, training=training_options)), bad_dir)
    start = models[0].state_dict()
    fresh = tiny_model().state_dict()
    assert all(torch.equal(start[name], value) for name, value in fresh.items() if name in start)
    (log,) = [entry["loss"] for entry in history(tmp_path / "out/stage/checkpoint-2") if entry.get("step") == 1]
    assert log == 0.0


# What is logged.


def test_losses_perplexity_learning_rates_and_throughput_are_logged(models, data_dir, tmp_path):
    tuning = {"encoder_learning_rate": 0.002, "encoder_layer_decay": 0.5, "llm_learning_rate": 0.004}
    options = {"eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"}
    stage = one_stage(tuning=tuning, training=options, data={"eval_manifests": {"dev": "train.jsonl"}})
    stage[0]["generation"] = {"mode": "ctc_greedy"}
    run(stages_of(tmp_path, "out", stage), data_dir)
    logs = history(tmp_path / "out/stage/checkpoint-3")
    for entry in (entry for entry in logs if "loss" in entry):
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + 0.5 * entry["ctc_loss"], rel=1e-5)
        assert entry["perplexity"] == pytest.approx(math.exp(entry["ce_loss"]), rel=1e-6)
        rates = {name.removeprefix("learning_rate/"): entry[name] for name in entry if "learning_rate/" in name}
        assert rates == pytest.approx({"encoder": 0.002, "llm": 0.004, "projector": 0.01, "ctc_head": 0.01})
        assert entry["audio_hours_per_hour"] > 0
    (evaluation,) = [entry for entry in logs if "eval_dev_wer" in entry]
    # The same by hand, over all tokens at once.
    model, processor = models[0].eval(), tiny_processor()
    waveforms = [tone(duration_s, 150 * (index + 1)) for index, duration_s in enumerate(DURATIONS_S)]
    with torch.no_grad():
        outputs = model(**processor(waveforms, TEXTS))
    for name in ("ce_loss", "ctc_loss"):
        assert evaluation[f"eval_dev_{name}"] == pytest.approx(float(outputs[name]), rel=1e-4)
    assert evaluation["eval_dev_perplexity"] == pytest.approx(math.exp(float(outputs.ce_loss)), rel=1e-3)


def test_the_time_of_evaluations_does_not_count_for_the_throughput(models, data_dir, tmp_path, monkeypatch):
    clock = SimpleNamespace(seconds=0.0)
    clock.perf_counter = lambda: clock.seconds
    monkeypatch.setattr(training.trainer, "time", clock)

    def takes(method: str, seconds: float) -> None:
        original = getattr(SpeechLLMTrainer, method)

        def slow(*args, **kwargs):
            clock.seconds += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(SpeechLLMTrainer, method, slow)

    takes("training_step", 1.0)
    takes("evaluation_loop", 100.0)
    data = {"eval_manifests": {"dev": "train.jsonl", "again": "train.jsonl"}, "max_eval_examples": 1}
    stage = one_stage(training={"eval_strategy": "steps", "eval_steps": 1}, data=data)
    run(stages_of(tmp_path, "out", stage), data_dir)
    logs = history(tmp_path / "out/stage/checkpoint-3")
    assert clock.seconds == 3 * (1.0 + 2 * 100.0)
    speeds = [entry["audio_hours_per_hour"] for entry in logs if "loss" in entry]
    audio_s = DataReport.load(tmp_path / "out/stage/final").audio_s
    assert len(speeds) == 3 and sum(speeds) == pytest.approx(audio_s)  # of steps of one second


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_logger_that_is_not_installed_is_told_before_the_models_are_loaded(name, monkeypatch, tmp_path, data_dir):
    monkeypatch.setattr(training.trainer.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(training.train, "build_model", lambda _arguments: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"training.report_to: {name} is not installed; pip install {name}, or set it"):
        run(stages_of(tmp_path, "out", one_stage(), report_to=[name]), data_dir)
    monkeypatch.undo()
    check_report_to([])


# SpecAugment.


def test_features_are_masked_in_training_by_seed_and_step(data_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training.train, "build_model", lambda _arguments: (tiny_model(), tiny_processor()))
    original = training.trainer.spec_augment

    def spy(features, lens, steps_per_s, step, *args, **kwargs):
        masked = original(features, lens, steps_per_s, step, *args, **kwargs)
        seen.append((step, steps_per_s, float((masked == 0.0).float().mean() - (features == 0.0).float().mean())))
        return masked

    monkeypatch.setattr(training.trainer, "spec_augment", spy)
    data = {"spec_augment": True, "spec_augment_options": {"schedule_steps": [1, 1, 1]}}
    stage = one_stage(data=data, training={"save_steps": 1})
    run(stages_of(tmp_path, "out", stage, save_total_limit=9), data_dir)
    assert [(step, rate) for step, rate, _ in seen] == [(0, 16_000.0), (1, 16_000.0), (2, 16_000.0)]
    assert seen[0][2] == 0.0 and seen[1][2] > 0.0 < seen[2][2]
    # From the first checkpoint on it is the same again.
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    for path in ("final", "checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "again/stage" / path)
    first = list(seen)
    del seen[:]
    run(stages_of(tmp_path, "again", stage, save_total_limit=9), data_dir)
    assert seen == first[1:]
    assert_equal_weights(tmp_path / "out/stage/final", tmp_path / "again/stage/final")


# Streams.


@pytest.fixture(scope="module")
def stream_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    files = [loquacious_columns(TEXTS[start : start + 3], DURATIONS_S[start : start + 3], start) for start in (0, 3, 5)]
    write_hub_folder(folder / "hub", {("small", "train"): files}, "wav")
    return folder


STREAMED = {
    "train_manifests": [],
    "train_sources": [{"path": "hub", "name": "small", "streaming": True}],
    "max_duration_s": 2.0,
    "shuffle_buffer": 4,
    "augment": True,
}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_streamed_run_that_was_interrupted_ends_with_the_same_weights(
    models,
    steps,
    stream_dir,
    tmp_path,
    monkeypatch,
    accumulation,
):
    options = {"max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": accumulation, "disable_tqdm": True}
    stage = one_stage(data=STREAMED, training=options)
    run(stages_of(tmp_path, "whole", stage), stream_dir)
    done = len(steps)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        original = SpeechLLMTrainer.training_step

        def interrupted(self, *args, **kwargs):
            if len(steps) >= done + 5 * accumulation:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        patch.setattr(SpeechLLMTrainer, "training_step", interrupted)
        run(stages_of(tmp_path, "pieces", stage), stream_dir)
    del steps[:]
    run(stages_of(tmp_path, "pieces", stage), stream_dir)
    assert len(steps) == 2 * accumulation
    assert_equal_weights(tmp_path / "whole/stage/final", tmp_path / "pieces/stage/final")
    reports = [DataReport.load(tmp_path / name / "stage/final") for name in ("whole", "pieces")]
    assert reports[0].utterances == reports[1].utterances and reports[0].audio_s == pytest.approx(reports[1].audio_s)


def test_a_stream_needs_a_number_of_steps(models, stream_dir, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        run(stages_of(tmp_path, "out", one_stage(data=STREAMED, training={"max_steps": -1})), stream_dir)


# Checkpoints.


def test_a_checkpoint_that_was_not_finished_is_not_chosen(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-200/trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}/complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("step", ["optimizer", "state"])
def test_a_run_interrupted_while_it_saves_goes_on_from_the_checkpoint_before(
    models,
    steps,
    data_dir,
    tmp_path,
    monkeypatch,
    step,
):
    stage = one_stage(data={"augment": True}, training={"max_steps": 4, "save_steps": 2})
    run(stages_of(tmp_path, "whole", stage, save_total_limit=1), data_dir)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        name = {"optimizer": "_save_optimizer_and_scheduler", "state": "_save_rng_state"}[step]
        original = getattr(SpeechLLMTrainer, name)

        def interrupted(self, output_dir, *args):
            if self.state.global_step == 4:
                Path(output_dir, "optimizer.pt").write_bytes(b"half of it")
                raise KeyboardInterrupt
            return original(self, output_dir, *args)

        patch.setattr(SpeechLLMTrainer, name, interrupted)
        run(stages_of(tmp_path, "pieces", stage, save_total_limit=1), data_dir)
    assert (tmp_path / "pieces/stage/checkpoint-4").is_dir()
    assert last_checkpoint(tmp_path / "pieces/stage") == str(tmp_path / "pieces/stage/checkpoint-2")
    del steps[:]
    run(stages_of(tmp_path, "pieces", stage, save_total_limit=1), data_dir)
    assert len(steps) == 2
    assert_equal_weights(tmp_path / "whole/stage/final", tmp_path / "pieces/stage/final")
    assert [path.name for path in (tmp_path / "pieces/stage").glob("checkpoint-*")] == ["checkpoint-4"]


def worker(config: Path, data_dir: Path, output_dir: Path, *kill: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TESTS / "training_worker.py"), str(config), str(data_dir), str(output_dir), *kill]
    environment = {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["step:3", "save:4"])
@pytest.mark.parametrize("llm", ["lora", "full"])
def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(data_dir, tmp_path, llm, kill):
    stage = one_stage(tuning={"llm": llm, "lora_dropout": 0.1}, data={"augment": True}, training={"max_steps": 6})
    common = {"report_to": "none", "disable_tqdm": True, "save_total_limit": 1, "use_cpu": True}
    stage[0]["training"]["save_steps"] = 2
    config = write_config(
        tmp_path / "run.yaml",
        data={"train_manifests": ["train.jsonl"], "batch_duration_s": 2.0},
        training=common,
        stages=stage,
    )
    whole = worker(config, data_dir, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert worker(config, data_dir, tmp_path / "pieces", kill).returncode == -9
    assert not (tmp_path / "pieces/stage/final").exists()
    assert last_checkpoint(tmp_path / "pieces/stage") == str(tmp_path / "pieces/stage/checkpoint-2")
    resumed = worker(config, data_dir, tmp_path / "pieces")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert len(load_stages(config, tmp_path)) == 1
    assert_equal_weights(tmp_path / "whole/stage/final", tmp_path / "pieces/stage/final")
    assert set(weights(tmp_path / "whole/stage/final")) > {"ctc_head.linear.weight"}

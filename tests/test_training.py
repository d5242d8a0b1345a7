"""training/: options, data, which parts learn and how fast. Whole runs are in test_training_run.py."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tiny_models import feature_extractor, lively, tiny_model, tiny_processor, tiny_tokenizer

import training.train
from hf_speechllm.audio_encoders import encoder_layers
from training.arguments import ModelArguments, TuningArguments, load_stages
from training.augment import AugmentOptions
from training.batching import DurationBatchSampler
from training.checkpoints import load_trained, save_trained
from training.data import RowLoader, SpeechDataset
from training.data_sources import Row, read_manifests
from training.model_building import build_processor
from training.row_reader import RowReader
from training.train import main, set_trainable
from training.trainer import check_sharding, parameter_groups

RATE = 16_000
CONFIGS = Path(__file__).parent.parent / "training" / "configs"


def tone(duration_s: float, frequency_hz: float) -> np.ndarray:
    time_s = np.arange(round(duration_s * RATE)) / RATE
    sweep = np.sin(2 * np.pi * frequency_hz * time_s * (1 + time_s))
    return (0.3 * sweep + 0.01 * np.random.default_rng(0).standard_normal(len(time_s))).astype(np.float32)


def write_manifest(path: Path, texts: list[str], durations_s: list[float]) -> list[np.ndarray]:
    """A manifest with one wav file for each text; returns the waveforms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waveforms, lines = [], []
    for index, (text, duration_s) in enumerate(zip(texts, durations_s, strict=True)):
        waveforms.append(tone(duration_s, 150 * (index + 1)))
        name = f"{path.stem}-{index}.wav"
        soundfile.write(path.parent / name, waveforms[-1], RATE, subtype="FLOAT")
        lines.append(json.dumps({"audio_filepath": name, "text": text, "duration": len(waveforms[-1]) / RATE}))
    path.write_text("\n".join(lines) + "\n")
    return waveforms


def write_config(path: Path, **sections) -> Path:
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


# Options.


def test_options_come_from_the_file_and_else_from_the_defaults(tmp_path):
    path = write_config(
        tmp_path / "run.yaml",
        model={"audio_model": "a", "config": {"projector": "mlp"}},
        tuning={"lora_r": 4},
        data={"train_manifests": ["x.jsonl"]},
        training={"learning_rate": 0.125, "max_steps": 7},
        generation={"ctc_weight": 0.25, "num_beams": 2},
    )
    (stage,) = load_stages(path, tmp_path / "out")
    assert stage.name == "main" and stage.training.output_dir == str(tmp_path / "out" / "main")
    assert stage.model == ModelArguments(audio_model="a", config={"projector": "mlp"})
    assert stage.tuning == TuningArguments(lora_r=4)
    assert stage.data.train_manifests == ["x.jsonl"] and stage.data.augment
    assert (stage.training.learning_rate, stage.training.max_steps) == (0.125, 7)
    assert stage.training.remove_unused_columns is False and stage.training.predict_with_generate is True
    assert stage.generation == {"ctc_weight": 0.25, "num_beams": 2}


def test_stages_inherit_the_common_sections_and_differ_where_they_say_so(tmp_path):
    path = write_config(
        tmp_path / "run.yaml",
        tuning={"llm": "lora", "lora_r": 4},
        training={"max_steps": 5, "seed": 3},
        stages=[
            {"name": "one", "tuning": {"llm": "freeze"}},
            {"name": "two", "training": {"max_steps": 9}, "data": {"augment": False}, "generation": {"num_beams": 2}},
        ],
    )
    one, two = load_stages(path, tmp_path)
    assert (one.tuning.llm, one.tuning.lora_r, one.training.max_steps, one.training.seed) == ("freeze", 4, 5, 3)
    assert (two.tuning.llm, two.tuning.lora_r, two.training.max_steps, two.training.seed) == ("lora", 4, 9, 3)
    assert (one.data.augment, two.data.augment) == (True, False)
    assert (one.generation, two.generation) == ({}, {"num_beams": 2})


def test_overrides_win_over_the_file_and_over_every_stage(tmp_path):
    stages = [{"name": "one", "training": {"max_steps": 9}}, {"name": "two"}]
    path = write_config(tmp_path / "run.yaml", training={"max_steps": 5}, stages=stages)
    overrides = ["training.max_steps=3", "tuning.encoder_learning_rate=5e-4", "data.eval_manifests={dev: d.jsonl}"]
    for stage in load_stages(path, tmp_path, overrides):
        assert stage.training.max_steps == 3
        assert stage.tuning.encoder_learning_rate == 5e-4
        assert stage.data.eval_manifests == {"dev": "d.jsonl"}


@pytest.mark.parametrize("number", ["5e-4", "5.0e-4", "0.0005", "5E-4", ".5e-3", "+5e-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, number):
    path = tmp_path / "run.yaml"
    path.write_text(f"tuning: {{encoder_learning_rate: {number}}}\ntraining: {{learning_rate: {number}}}\n")
    (stage,) = load_stages(path, tmp_path)
    assert stage.tuning.encoder_learning_rate == 5e-4 and stage.training.learning_rate == 5e-4


def test_words_that_only_resemble_numbers_stay_words(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {audio_model: e5, language_model: 1e5x}\n")
    (stage,) = load_stages(path, tmp_path)
    assert (stage.model.audio_model, stage.model.language_model) == ("e5", "1e5x")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; known are"),
        ({"model": {"audio": "x"}}, "section 'model': .*audio"),
        ({"model": {"config": {"projecter": "mlp"}}}, "section 'model', config: unknown key 'projecter'; known are"),
        ({"tuning": {"lora_rank": 4}}, "section 'tuning': .*lora_rank"),
        ({"data": {"manifests": []}}, "section 'data': .*manifests"),
        ({"training": {"steps": 4}}, "section 'training': .*steps"),
        ({"generation": {"ctc_wieght": 0.5}}, "section 'generation': unknown key 'ctc_wieght'; known are"),
        ({"stages": [{"name": "one", "model": {}}]}, "stage 'one' of .*run.yaml: unknown key 'model'"),
        ({"stages": [{"name": "one", "tuning": {"lr": 1}}]}, "section 'tuning': .*lr"),
        ({"stages": [{"tuning": {}}]}, "every stage needs a name of its own, got .None"),
        ({"stages": [{"name": "one"}, {"name": "one"}]}, "every stage needs a name of its own, got .'one', 'one'"),
        ({"training": {"lr_scheduler_type": "wavy"}}, "section 'training': .*wavy"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_key_that_is_not_known_is_refused(tmp_path, sections, message):
    path = write_config(tmp_path / "run.yaml", **sections)
    with pytest.raises(ValueError, match=message):
        load_stages(path, tmp_path)


@pytest.mark.parametrize("override", ["training.max_steps", "trainig.max_steps=3", "max_steps=3", "training.=3"])
def test_an_override_of_another_form_is_refused(tmp_path, override):
    path = write_config(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"override '.*': expected SECTION.KEY=VALUE with a section of \['data'"):
        load_stages(path, tmp_path, [override])


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "finetune_llm.yaml"}), ids=lambda path: path.name
)
def test_the_recipes_of_the_repository_can_be_read(path, tmp_path):
    stages = load_stages(path, tmp_path)
    assert all(
        (stage.data.train_manifests or stage.data.train_sources) and stage.training.max_steps > 0 for stage in stages
    )


# The command line.


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for word in ("config", "SECTION.KEY=VALUE", "--data-dir DATA_DIR", "--output-dir OUTPUT_DIR", "--stage NAME"):
        assert word in text
    assert "python -m training.train training/configs/tiny_en.yaml --data-dir DIR --output-dir DIR" in text


def test_command_line_reaches_the_run(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(training.train, "run", lambda *arguments: calls.append(arguments))
    config = write_config(tmp_path / "run.yaml", stages=[{"name": "one"}, {"name": "two"}])
    folders = ["--data-dir", str(tmp_path / "d"), "--output-dir", str(tmp_path / "o")]
    # Overrides may stand before and behind the options.
    command = ["train", str(config), "training.max_steps=3", *folders, "--stage", "two", "data.augment=false"]
    monkeypatch.setattr("sys.argv", command)
    main()
    ((stages, data_dir, only),) = calls
    assert data_dir == tmp_path / "d" and only == ["two"]
    assert [stage.name for stage in stages] == ["one", "two"]
    assert all(stage.training.max_steps == 3 and stage.data.augment is False for stage in stages)
    assert stages[0].training.output_dir == str(tmp_path / "o" / "one")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("model: [", "run.yaml: expected YAML (while parsing"),
        ("model", "run.yaml: expected sections in YAML, got 'model'"),
        ("training: {max_stepz: 1}", "section 'training': "),
    ],
)
def test_a_config_that_cannot_be_read_is_told_in_one_line(monkeypatch, tmp_path, capsys, content, message):
    config = tmp_path / "run.yaml"
    if content is not None:
        config.write_text(content)
    monkeypatch.setattr("sys.argv", ["train", str(config), "--data-dir", str(tmp_path), "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.count("\n") == 1
    assert error.startswith("train: error: ") and message in error


def test_command_line_refuses_a_stage_that_does_not_exist(monkeypatch, tmp_path, capsys):
    config = write_config(tmp_path / "run.yaml", stages=[{"name": "one"}])
    folders = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train", str(config), *folders, "--stage", "three"])
    with pytest.raises(SystemExit):
        main()
    assert "--stage: no stage 'three'; there are ['one']" in capsys.readouterr().err


# Manifests.


def test_manifests_of_a_pattern_are_read_in_order_with_paths_of_their_own_folder(tmp_path):
    write_manifest(tmp_path / "a" / "2.jsonl", ["three"], [0.5])
    write_manifest(tmp_path / "a" / "1.jsonl", ["one", "two"], [0.5, 0.6])
    rows = read_manifests(["a/*.jsonl"], tmp_path)
    assert [row.text for row in rows] == ["one", "two", "three"]
    assert rows[2].audio == tmp_path / "a" / "2-0.wav"
    assert [(Path(row.source).name, row.row) for row in rows] == [("1.jsonl", 1), ("1.jsonl", 2), ("2.jsonl", 1)]


def dataset_of(rows: list[Row], augmentation: AugmentOptions | None = None, seed: int = 0) -> SpeechDataset:
    return SpeechDataset(rows, RowLoader(RowReader(RATE, convert_audio=False), augmentation), seed)


def test_offset_and_duration_cut_exactly_those_samples_out_of_a_file(tmp_path):
    (waveform,) = write_manifest(tmp_path / "m.jsonl", ["all"], [2.0])
    cuts = [(0.5, 0.25), (1.00005, 0.33337), (0.0, 2.0)]
    dataset = dataset_of([Row("m", 1, tmp_path / "m-0.wav", "some", length, start) for start, length in cuts])
    for index, (start_s, length_s) in enumerate(cuts):
        first = round(start_s * RATE)
        expected = waveform[first : first + round(length_s * RATE)]
        example = dataset[index]
        np.testing.assert_array_equal(example["waveform"], expected)
        assert example["waveform"].dtype == np.float32 and example["text"] == "some"


def test_a_manifest_that_is_no_utf_8_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"audio_filepath": "\xff"}\n')
    with pytest.raises(ValueError, match="bad.jsonl: expected UTF-8"):
        read_manifests(["*.jsonl"], tmp_path)


def test_a_manifest_line_without_an_audio_file_is_a_row_without_audio(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": null, "text": "a", "duration": 1.0}\n')
    (row,) = read_manifests(["*.jsonl"], tmp_path)
    assert row.audio is None


def test_a_manifest_pattern_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"manifest 'a/\*.jsonl' matches no file in .*; a manifest has"):
        read_manifests(["a/*.jsonl"], tmp_path)


@pytest.mark.parametrize("field", ["audio_filepath", "text", "duration"])
def test_a_manifest_line_without_a_field_is_named(tmp_path, field):
    entry = {"audio_filepath": "x.wav", "text": "a", "duration": 1.0}
    broken = {name: value for name, value in entry.items() if name != field}
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(entry)}\n{json.dumps(broken)}\n")
    with pytest.raises(ValueError, match=rf"m.jsonl:2: field '{field}' is missing"):
        read_manifests(["m.jsonl"], tmp_path)


def test_a_file_of_another_rate_is_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(800), 8000)
    dataset = dataset_of([Row("m.jsonl", 1, tmp_path / "x.wav", "a", 0.1, 0.0)])
    with pytest.raises(ValueError, match=r"m.jsonl, row 1: sampling_rate .*: 16000 Hz is expected, got 8000 Hz"):
        dataset[0]


def test_distortions_are_drawn_anew_for_every_epoch_and_are_the_same_in_a_second_run(tmp_path):
    write_manifest(tmp_path / "m.jsonl", ["a"], [0.5])
    rows = read_manifests(["m.jsonl"], tmp_path)
    options = AugmentOptions(gain_prob=1.0)
    dataset, again = (dataset_of(rows, options, seed=5) for _ in range(2))
    first = dataset[0]["waveform"]
    np.testing.assert_array_equal(again[0]["waveform"], first)
    dataset.set_epoch(1)
    assert not np.array_equal(dataset[0]["waveform"], first)
    assert not np.array_equal(dataset_of(rows, options, seed=6)[0]["waveform"], first)


# Batches.


def sampler(durations_s, batch_duration_s=30.0, seed=0) -> DurationBatchSampler:
    return DurationBatchSampler(durations_s, batch_duration_s, dataset_of([]), seed)


def random_durations(seed: int, count: int = 300) -> list[float]:
    return np.random.default_rng(seed).lognormal(1.0, 0.8, count).clip(0.3, 29.9).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_utterance_once_and_keep_to_the_bound_in_every_epoch(seed):
    durations_s = random_durations(seed)
    batches = sampler(durations_s)
    for epoch in range(4):
        batches.set_epoch(epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(len(durations_s)))
        assert max(len(batch) * max(durations_s[index] for index in batch) for batch in batches) <= 30.0 + 1e-6
    padded_s = sum(len(batch) * max(durations_s[index] for index in batch) for batch in batches)
    assert sum(durations_s) / padded_s > 0.9, "too much padding"
    assert padded_s / 30.0 / len(batches) > 0.75, "batches are far from full"


@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_has_the_same_number_of_batches(seed):
    # The Trainer counts the batches of the first epoch and computes from it where a resumed run goes on.
    batches = sampler(random_durations(seed))
    lengths = set()
    for epoch in range(12):
        batches.set_epoch(epoch)
        lengths.add(len(batches))
        assert len(list(batches)) == len(batches)
    assert len(lengths) == 1


def test_batches_are_the_same_for_a_seed_and_an_epoch_only():
    durations_s = random_durations(0)
    first = sampler(durations_s)
    assert list(first) == list(sampler(durations_s))
    assert list(first) != list(sampler(durations_s, seed=1))
    epoch_0 = list(first)
    first.set_epoch(1)
    epoch_1 = list(first)
    members = ({frozenset(batch) for batch in epoch} for epoch in (epoch_0, epoch_1))
    assert len(set.intersection(*members)) < len(epoch_0) / 4, "the same utterances meet in every epoch"
    first.set_epoch(0)
    assert list(first) == epoch_0


def test_batches_do_not_come_sorted_by_duration():
    durations_s = random_durations(0)
    longest_s = [max(durations_s[index] for index in batch) for batch in sampler(durations_s)]
    assert abs(np.corrcoef(longest_s, np.arange(len(longest_s)))[0, 1]) < 0.5


def test_the_dataset_is_told_the_epoch_of_its_batches():
    dataset = dataset_of([])
    DurationBatchSampler([1.0], 30.0, dataset).set_epoch(3)
    assert dataset.epoch == 3


def test_utterances_of_a_few_different_lengths_share_a_batch():
    assert [sorted(batch) for batch in sampler([1.0, 1.5, 2.4])] == [[0, 1, 2]]


def test_a_bound_below_the_longest_utterance_is_refused():
    with pytest.raises(ValueError, match=r"batch_duration_s must hold the longest utterance \(31.0 s\), got 30"):
        sampler([1.0, 31.0])


# Which parts learn.


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


PARTS = {
    "encoder": "audio_tower.",
    "projector": "multi_modal_projector.",
    "ctc_head": "ctc_head.",
    "llm": "language_model.",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_tuned_in_full_learns_and_no_other(part):
    model = tiny_model()
    set_trainable(model, TuningArguments(**{**dict.fromkeys(PARTS, "freeze"), part: "full"}))
    names = {name for name, _ in model.named_parameters() if name.startswith(PARTS[part])}
    assert trainable(model) == names and names


def test_parts_that_no_loss_reaches_are_frozen():
    model = tiny_model()
    set_trainable(model, TuningArguments(ce_loss_weight=0.0))
    assert {name.split(".")[0] for name in trainable(model)} == {"ctc_head"}
    set_trainable(model, TuningArguments(ctc_loss_weight=0.0))
    assert {name.split(".")[0] for name in trainable(model)} == {"multi_modal_projector"}
    assert (model.config.ce_loss_weight, model.config.ctc_loss_weight) == (1.0, 0.0)


def test_tuning_without_any_loss_is_refused():
    with pytest.raises(ValueError, match="ce_loss_weight, ctc_loss_weight must be at least 0, and one of them more"):
        set_trainable(tiny_model(), TuningArguments(ce_loss_weight=0.0, ctc_loss_weight=0.0))
    with pytest.raises(ValueError, match="got 0.0 and 1.0 without a CTC head"):
        set_trainable(tiny_model(ctc_token_ids=None), TuningArguments(ce_loss_weight=0.0, ctc_loss_weight=1.0))


def test_a_model_without_ctc_head_can_be_tuned():
    model = tiny_model(ctc_token_ids=None)
    set_trainable(model, TuningArguments())
    assert {name.split(".")[0] for name in trainable(model)} == {"multi_modal_projector"}


@pytest.mark.parametrize(
    ("audio", "layer", "norm"),
    [
        ("moonshine", "audio_tower.layers.2.", "audio_tower.layer_norm."),
        ("whisper", "audio_tower.layers.1.", "audio_tower.layer_norm."),
        ("wav2vec2-layer-norm", "audio_tower.encoder.layers.1.", "audio_tower.encoder.layer_norm."),
        ("wav2vec2", "audio_tower.encoder.layers.1.", None),
        ("wav2vec2-bert", "audio_tower.encoder.layers.1.", None),
        ("parakeet", "audio_tower.layers.1.", None),
    ],
)
def test_the_top_encoder_layers_learn_with_the_normalisation_behind_them(audio, layer, norm):
    model = tiny_model(audio)
    set_trainable(model, TuningArguments(encoder="full", encoder_layers=1, projector="freeze", ctc_head="freeze"))
    prefixes = (layer,) if norm is None else (layer, norm)
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in trainable(model)) for prefix in prefixes)


def test_lora_is_trained_where_the_expression_says_and_starts_as_the_plain_model():
    model = lively(tiny_model())
    inputs = tiny_processor()([tone(0.7, 300)], text=["the"])
    with torch.no_grad():
        before = model(**inputs).logits
    tuning = TuningArguments(
        llm="lora", lora_r=2, lora_targets="q_proj|down_proj", projector="freeze", ctc_head="freeze"
    )
    set_trainable(model, tuning)
    names = trainable(model)
    assert {name.split(".")[-4] for name in names} == {"q_proj", "down_proj"}
    assert len(names) == 2 * 2 * 2 and all(".lora_A." in name or ".lora_B." in name for name in names)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_the_lora_of_an_earlier_stage_goes_on_learning():
    model = tiny_model()
    tuning = TuningArguments(llm="lora", lora_r=2)
    set_trainable(model, tuning)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    names = trainable(model)
    set_trainable(model, TuningArguments(llm="freeze"))
    assert not any("lora_" in name for name in trainable(model))
    set_trainable(model, tuning)
    assert trainable(model) == names
    assert all(bool((parameter == 0.5).all()) for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("change", [{"lora_r": 3}, {"lora_alpha": 1.0}, {"lora_targets": "k_proj"}], ids=str)
def test_a_lora_unlike_that_of_an_earlier_stage_is_refused(change):
    model = tiny_model()
    set_trainable(model, TuningArguments(llm="lora", lora_r=2))
    with pytest.raises(ValueError, match="tuning: LoRA must be the same in all stages, and as in the trained parts"):
        set_trainable(model, TuningArguments(**{"llm": "lora", "lora_r": 2, **change}))


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"encoder": "on"}, r"tuning.encoder must be one of \('freeze', 'lora', 'full'\), got 'on'"),
        ({"projector": "on"}, r"tuning.projector must be one of"),
        ({"ctc_head": "on"}, r"tuning.ctc_head must be one of"),
        ({"llm": "qlora"}, r"tuning.llm must be one of \('freeze', 'lora', 'full'\), got 'qlora'"),
        ({"encoder": "full", "encoder_layers": 4}, r"tuning.encoder_layers must be 0 to 3, got 4"),
        ({"encoder": "full", "encoder_layers": -1}, r"tuning.encoder_layers must be 0 to 3, got -1"),
    ],
    ids=str,
)
def test_a_strategy_that_does_not_exist_is_refused(tuning, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(tiny_model(), TuningArguments(**tuning))


def rates(model, tuning: TuningArguments) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter that learns, by name."""
    set_trainable(model, tuning)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, tuning, learning_rate=1.0, weight_decay=0.1)
    return {names[each]: (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}


def test_learning_rates_differ_by_part_and_vectors_do_not_decay():
    model = tiny_model()
    tuning = TuningArguments(encoder="full", llm="full", encoder_learning_rate=0.5, llm_learning_rate=0.25)
    found = rates(model, tuning)
    assert set(found) == {name for name, _ in model.named_parameters()}
    by_part = {"audio_tower": 0.5, "language_model": 0.25, "ctc_head": 1.0, "multi_modal_projector": 1.0}
    for name, parameter in model.named_parameters():
        assert found[name] == (by_part[name.split(".")[0]], 0.1 if parameter.ndim > 1 else 0.0), name


def test_learning_rates_of_encoder_and_language_model_default_to_that_of_the_training():
    assert {rate for rate, _ in rates(tiny_model(), TuningArguments(encoder="full", llm="lora")).values()} == {1.0}


@pytest.mark.parametrize(
    "audio", ["moonshine", "whisper", "wav2vec2-layer-norm", "wav2vec2", "wav2vec2-bert", "parakeet"]
)
def test_learning_rate_falls_from_the_top_layer_of_the_encoder_to_its_front_end(audio):
    model = tiny_model(audio)
    found = rates(model, TuningArguments(encoder="full", encoder_learning_rate=8.0, encoder_layer_decay=0.5))
    layers = encoder_layers(model.audio_tower)
    expected = {}
    for index, layer in enumerate(layers):
        expected.update({id(parameter): 8.0 * 0.5 ** (len(layers) - 1 - index) for parameter in layer.parameters()})
    final = {"audio_tower.layer_norm", "audio_tower.encoder.layer_norm"} if audio != "wav2vec2" else set()
    for name, parameter in model.named_parameters():
        if name.startswith("audio_tower."):
            front_end = 8.0 if name.rpartition(".")[0] in final else 8.0 * 0.5 ** len(layers)
            assert found[name][0] == expected.get(id(parameter), front_end), name


# Trained weights.


def test_trained_weights_are_saved_alone_and_come_back_exactly(tmp_path):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    names = {"ctc_head.linear.weight", "audio_tower.layer_norm.weight", "audio_tower.layers.2.fc1.weight"} & set(
        model.state_dict()
    )
    save_trained(model, names, tmp_path)
    assert set(load_file(tmp_path / "trained.safetensors")) == names
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert load_trained(other, tmp_path) == names
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name] if name in names else before[name]), name


def test_weights_that_have_no_place_in_the_model_are_refused(tmp_path):
    save_file({"language_model.lora_A.default.weight": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(
        ValueError, match="'language_model.lora_A.default.weight' has no place in this model; is `tuning`"
    ):
        load_trained(tiny_model(), tmp_path)


# CTC labels of a recipe.


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> str:
    """Feature extractor and tokeniser: all that a processor is made of."""
    folder = tmp_path_factory.mktemp("base")
    feature_extractor("moonshine").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_ctc_units_choose_the_labels(base_folder):
    tokenizer = tiny_tokenizer()
    values, chains = {}, {}
    for units in ("subset", "characters", "llm", "none"):
        arguments = ModelArguments(base_folder, base_folder, ctc_units=units, ctc_subset_size=30)
        processor, chains[units], values[units] = build_processor(arguments)
        assert values[units]["audio_token_id"] == processor.audio_token_id
        assert processor.tokenizer(" the thing").input_ids == tokenizer(" the thing").input_ids
    assert "ctc_token_ids" not in values["none"]
    assert len(values["subset"]["ctc_token_ids"]) == 30
    assert len(values["characters"]["ctc_token_ids"]) == 28
    # The end of the sequence is not heard, and CTC scores it by itself.
    assert set(values["llm"]["ctc_token_ids"]) == set(range(len(tokenizer))) - {0, 1, 2}
    assert chains["llm"] is None and chains["none"] is None
    the = tokenizer(" the").input_ids
    labels = chains["characters"].spell(torch.tensor(the))
    spelled = [values["characters"]["ctc_token_ids"][label] for label in labels[labels >= 0].tolist()]
    assert tokenizer.convert_ids_to_tokens(spelled) == ["Ġ", "t", "h", "e"]


def test_the_language_model_may_be_restricted_to_the_ctc_labels(base_folder):
    arguments = ModelArguments(base_folder, base_folder, ctc_units="characters", llm_units="ctc")
    processor, chains, values = build_processor(arguments)
    assert chains is None
    assert set(processor.tokenizer(" the thing").input_ids) <= set(values["ctc_token_ids"])


def test_units_of_another_name_are_refused(base_folder):
    with pytest.raises(ValueError, match=r"ctc_units must be one of \('subset', .*\), got 'bytes'"):
        build_processor(ModelArguments(base_folder, base_folder, ctc_units="bytes"))
    with pytest.raises(ValueError, match="llm_units must be 'native' or 'ctc', got 'words'"):
        build_processor(ModelArguments(base_folder, base_folder, llm_units="words"))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_3_is_refused(zero_stage):
    arguments = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage))
    refusal = pytest.raises(ValueError, match="ZeRO-3 divides .* choose FSDP2") if zero_stage == 3 else nullcontext()
    with refusal:
        check_sharding(arguments)

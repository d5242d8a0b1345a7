"""A run that goes on from trained parts: model.trained_parts."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_assembly import STAGES, audio_folder, language_model_folder, outputs, trained_folder  # noqa: F401, a fixture
from test_training import RATE, tone, write_config, write_manifest
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import training.trained_parts
from hf_speechllm.assembly import load_trained_parts
from training.arguments import ModelArguments, TuningArguments, load_stages
from training.export import main as export_main
from training.model_building import already_trained, base_models, build_model
from training.recognisers import load_pipeline
from training.train import main, run, set_trainable

TARGETS = "q_proj|v_proj"


@pytest.fixture(scope="module")
def parts(audio_folder, tmp_path_factory) -> Path:  # noqa: F811
    root = tmp_path_factory.mktemp("parts")
    tunings = [
        TuningArguments(encoder="full", encoder_layers=1, llm="lora", lora_r=3, lora_alpha=5),
        TuningArguments(encoder="lora", encoder_lora_targets="k_proj", lora_r=3, lora_alpha=5),
    ]
    language_model = language_model_folder(root / "language_model")
    trained_folder(root / "parts", audio_folder, language_model, tunings, llm_units="native")
    return root / "parts"


@pytest.fixture
def data_dir(tmp_path) -> Path:
    write_manifest(tmp_path / "data/train.jsonl", ["the thing", "an inn"], [0.8, 0.6])
    return tmp_path / "data"


def stages_from(folder: Path, parts: Path, **sections):
    training = {"max_steps": 2, "learning_rate": 0.01, "report_to": "none", "disable_tqdm": True}
    sections = {"model": {"trained_parts": str(parts)}, "data": {"train_manifests": ["train.jsonl"]}, **sections}
    path = write_config(folder / "run.yaml", training={**training, **sections.pop("training", {})}, **sections)
    return load_stages(path, folder / "out")


def test_a_run_starts_as_the_trained_parts_are(parts):
    model, processor = build_model(ModelArguments(trained_parts=str(parts)))
    for found, expected in zip(outputs(model.eval(), processor), outputs(*load_trained_parts(parts)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.generation_config.ctc_weight == 0.25


@pytest.mark.parametrize("tunings", STAGES.values(), ids=STAGES)
def test_every_way_of_tuning_can_be_gone_on_from(tunings, audio_folder, tmp_path):  # noqa: F811
    language_model = language_model_folder(tmp_path / "language_model")
    model, processor = trained_folder(tmp_path / "parts", audio_folder, language_model, tunings)
    again, its_processor = build_model(ModelArguments(trained_parts=str(tmp_path / "parts")))
    for found, expected in zip(outputs(again.eval(), its_processor), outputs(model, processor), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_lora_goes_on_learning_with_its_own_options(parts, data_dir, tmp_path):
    stages = stages_from(tmp_path, parts, tuning={"llm": "lora", "projector": "freeze", "ctc_head": "freeze"})
    tuning = stages[0].tuning
    assert (tuning.lora_r, tuning.lora_alpha, tuning.lora_targets) == (3, 5.0, TARGETS)
    assert tuning.encoder_lora_targets == "k_proj"
    run(stages, data_dir)
    before, after = (load_file(folder / "trained.safetensors") for folder in (parts, tmp_path / "out/main/final"))
    assert set(after) == set(before)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if name.startswith("language_model.")}
    model, processor = load_trained_parts(tmp_path / "out/main/final")
    assert model.generation_config.ctc_weight == 0.25
    recipes = [json.loads((folder / "recipe.json").read_text()) for folder in (parts, tmp_path / "out/main/final")]
    assert recipes[0].pop("lora_scaling") == pytest.approx(recipes[1].pop("lora_scaling"))
    assert recipes[0] == recipes[1]
    # And the result can be gone on from again, by the config that lies beside it.
    (again,) = load_stages(tmp_path / "out/main/final/training.yaml", tmp_path / "out")
    assert again == stages[0]


def test_more_can_learn_than_before(parts, data_dir, tmp_path):
    tuning = {"encoder": "full", "encoder_layers": 2, "llm": "freeze"}
    run(stages_from(tmp_path, parts, tuning=tuning), data_dir)
    before, after = (load_file(folder / "trained.safetensors") for folder in (parts, tmp_path / "out/main/final"))
    assert set(after) > set(before)
    load_trained_parts(tmp_path / "out/main/final")


def test_what_the_checkpoint_needs_is_known_before_the_training(parts):
    arguments = ModelArguments(trained_parts=str(parts))
    model, _ = build_model(arguments)
    assert already_trained(arguments, model) == set(load_file(parts / "trained.safetensors"))
    recipe = json.loads((parts / "recipe.json").read_text())
    assert base_models(arguments) == (recipe["audio_model"], recipe["language_model"])


@pytest.mark.parametrize(
    ("implementation", "audio", "text"),
    [("eager", "eager", "eager"), ({"text_config": "eager"}, "sdpa", "eager"), (None, "sdpa", "sdpa")],
)
def test_attention_kernels_can_be_chosen(parts, data_dir, tmp_path, implementation, audio, text):
    stage = stages_from(tmp_path, parts, model={"trained_parts": str(parts), "attn_implementation": implementation})[0]
    model, _ = build_model(stage.model)
    assert model.audio_tower.config._attn_implementation == audio
    assert model.language_model.config._attn_implementation == text


@pytest.mark.parametrize(
    ("implementation", "message"),
    [("fast", "fast.* is not supported"), ({"llm": "sdpa"}, "model.attn_implementation: .*'text_config'.*'llm'")],
)
def test_attention_kernels_that_do_not_exist_are_refused(parts, implementation, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelArguments(trained_parts=str(parts), attn_implementation=implementation))


def test_the_default_model_has_a_name(parts, monkeypatch):
    monkeypatch.setattr(training.trained_parts, "TRAINED_PARTS", parts)
    model, _ = build_model(ModelArguments(trained_parts="default"))
    assert model.generation_config.ctc_weight == 0.25


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"trained_parts": "nowhere"},
            "model.trained_parts: expected 'default' or a folder .* got 'nowhere'",
        ),
        ({"ctc_units": "characters"}, "section 'model': ctc_units is that of the trained_parts"),
        ({"config": {"downsampling": 8}}, "section 'model': config is that of the trained_parts"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_model_that_says_two_things_is_refused(parts, tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        stages_from(tmp_path, parts, model={"trained_parts": str(parts), **model})


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"lora_r": 4}, r"the rank \(lora_r\) 3 before and 4 now"),
        ({"lora_alpha": 4}, r"the scale .* 1.66667 before and 1.33333 now"),
        (
            {"lora_targets": "q_proj"},
            r"the layers \(tuning.lora_targets\) 4 x q_proj\|v_proj before and 2 x q_proj",
        ),
    ],
    ids=str,
)
def test_another_lora_than_that_of_the_parts_is_refused(parts, tmp_path, tuning, message):
    (stage,) = stages_from(tmp_path, parts, tuning={"llm": "lora", **tuning})
    model, _ = build_model(stage.model)
    with pytest.raises(ValueError, match=message):
        set_trainable(model, stage.tuning)


def test_another_dropout_is_taken(parts, tmp_path):
    (stage,) = stages_from(tmp_path, parts, tuning={"llm": "lora", "lora_dropout": 0.25})
    model, _ = build_model(stage.model)
    set_trainable(model, stage.tuning)
    modules = model.language_model.named_modules()
    dropouts = {module.p for name, module in modules if name.endswith("lora_dropout.default")}
    assert dropouts == {0.25}


def test_options_that_changed_after_a_stage_was_finished_are_told(parts, data_dir, tmp_path, caplog):
    run(stages_from(tmp_path, parts), data_dir)
    changed = stages_from(tmp_path, parts, tuning={"ctc_loss_weight": 0.25}, training={"max_steps": 9})
    with caplog.at_level(logging.WARNING, "training.train"):
        run(stages_from(tmp_path, parts), data_dir)
        # Trained by a version that lacked an option, or named one at its default.
        (config,) = tmp_path.glob("*/*/final/training.yaml")
        assert "  llm_frozen_dtype: float32\n" in config.read_text()
        config.write_text(config.read_text().replace("  llm_frozen_dtype: float32\n", ""))
        run(stages_from(tmp_path, parts, training={"weight_decay": 0.0}), data_dir)
        assert not caplog.records
        run(changed, data_dir)
    (record,) = caplog.records
    expected = "tuning.ctc_loss_weight was 0.5, is 0.25; training.max_steps was 2, is 9; remove "
    assert expected in record.getMessage()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"audio_model": "a"}}, "model.language_model is required: a Hub id, a folder, or base:NAME"),
        ({"model": {}}, "model.audio_model is required"),
        ({"model": {"trained_parts": "nowhere"}}, "model.trained_parts: expected"),
        ({"data": {"train_manifests": "m.jsonl"}}, "train_manifests must be of the type list[str], got 'm.jsonl'."),
        ({"data": {"batch_duration_s": "many"}}, "batch_duration_s must be of the type float, got 'many'."),
        ({"tuning": {"lora_rank": 4}}, "section 'tuning': unknown key 'lora_rank'; known are ['ce_loss_weight',"),
        ({"tuning": {"encoder_layers": 1.5}}, "encoder_layers must be of the type int | None, got 1.5."),
        ({"data": {"train_manifests": ["none.jsonl"]}}, "manifest 'none.jsonl' matches no file"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_in_one_line(parts, data_dir, tmp_path, monkeypatch, capsys, sections, message):
    sections = {"model": {"trained_parts": str(parts)}, "data": {"train_manifests": ["train.jsonl"]}, **sections}
    config = write_config(tmp_path / "run.yaml", **sections)
    monkeypatch.setattr("sys.argv", ["train", str(config), "--data-dir", str(data_dir), "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train: error: ") and message in lines[-1]


def test_a_failure_in_the_training_keeps_its_traceback(parts, data_dir, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ValueError("deep inside")

    monkeypatch.setattr("training.trainer.SpeechLLMTrainer.training_step", fail)
    with pytest.raises(RuntimeError, match="out/main: failed at step 0") as failure:
        run(stages_from(tmp_path, parts), data_dir)
    assert "deep inside" in str(failure.value.__cause__)


def test_parts_are_measured_in_the_type_that_is_asked_for(parts):
    audio = {"raw": tone(0.6, 300.0), "sampling_rate": RATE}
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        pipe = load_pipeline(str(parts), "cpu", dtype=dtype)
        assert {value.dtype for value in pipe.model.parameters()} == {expected}
        assert isinstance(pipe(dict(audio), max_new_tokens=4)["text"], str)


def test_an_export_can_be_a_whole_checkpoint(parts, tmp_path, monkeypatch, capsys):
    command = ["export", str(parts), str(tmp_path / "model"), "--whole", "--generate", '{"ctc_weight": 0.5}']
    monkeypatch.setattr("sys.argv", command)
    export_main()
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.generation_config.ctc_weight == 0.5
    for found, expected in zip(outputs(model, processor), outputs(*load_trained_parts(parts)), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # what was trained went through float16
    with pytest.raises(SystemExit, match="2"):
        export_main()
    assert "expected a new or an empty folder" in capsys.readouterr().err

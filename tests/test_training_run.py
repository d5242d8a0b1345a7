"""training.train on a tiny model and a few tones: stages, resuming, gradient accumulation, overfitting."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import RATE, tone, write_config, write_manifest
from tiny_models import tiny_model, tiny_processor
from transformers import Seq2SeqTrainingArguments, TrainerCallback

import training.train
from hf_speechllm.data_collator import SpeechLLMDataCollator
from training.arguments import TuningArguments, load_stages
from training.train import run, set_trainable
from training.trainer import SpeechLLMTrainer

TEXTS = ["the thing", "an inn", "a ring", "the king", "in the", "hat", "thing a", "a tan"]
DURATIONS_S = [1.0, 0.6, 0.8, 0.9, 0.5, 0.4, 0.7, 0.45]
STAGES = [
    {
        "name": "ctc",
        "tuning": {"encoder": "full", "encoder_layers": 2, "ce_loss_weight": 0.0, "ctc_loss_weight": 1.0},
        "training": {"learning_rate": 0.01, "max_steps": 3, "save_steps": 2},
    },
    {
        "name": "llm",
        "tuning": {"llm": "lora", "lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "encoder": "freeze"},
        "training": {"learning_rate": 0.01, "max_steps": 6, "save_steps": 3},
    },
]


def build(_arguments):
    """In place of `build_model`: always the same start, as of the fixture `models`."""
    return tiny_model(), tiny_processor()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_manifest(folder / "train.jsonl", TEXTS, DURATIONS_S)
    write_manifest(folder / "dev.jsonl", TEXTS[:3], DURATIONS_S[:3])
    return folder


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory) -> Path:
    """Folder of an uninterrupted run of STAGES."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.train, "build_model", build)
        run(stages_of(folder, "out"), data_dir)
    return folder / "out"


def stages_of(tmp_path: Path, output: str, stages: list[dict] = STAGES, **training_options):
    data = {"train_manifests": ["train.jsonl"], "batch_duration_s": 2.0}
    common = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_total_limit": 2, **training_options}
    path = write_config(tmp_path / "run.yaml", data=data, training=common, stages=stages)
    return load_stages(path, tmp_path / output)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "trained.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    first, second = weights(first), weights(second)
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def interrupt_after(monkeypatch, done: list[str], count: int):
    """Raise KeyboardInterrupt in place of the step after `count` more of them."""
    training_step = SpeechLLMTrainer.training_step
    limit = len(done) + count

    def interrupted(self, *args, **kwargs):
        if len(done) >= limit:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(SpeechLLMTrainer, "training_step", interrupted)


def test_two_stages_train_and_save_what_they_say(whole):
    start = tiny_model().state_dict()
    ctc, llm = weights(whole / "ctc/final"), weights(whole / "llm/final")
    assert {name.split(".")[0] for name in ctc} == {"audio_tower", "ctc_head"}
    assert all(not torch.equal(value, start[name]) for name, value in ctc.items())
    # The second stage keeps the encoder of the first and adds its own parts.
    assert set(llm) > set(ctc)
    assert all(torch.equal(llm[name], value) for name, value in ctc.items() if name.startswith("audio_tower."))
    assert {name.split(".")[0] for name in set(llm) - set(ctc)} == {"multi_modal_projector", "language_model"}
    assert all(bool(value.any()) for name, value in llm.items() if "lora_B" in name)
    assert json.loads((whole / "llm/final/recipe.json").read_text())["lora_scaling"] == {"language_model": 3.0}
    for name in ("config.json", "generation_config.json", "training_args.bin"):
        assert (whole / "llm/final" / name).is_file()
    assert json.loads((whole / "ctc/final/config.json").read_text())["ce_loss_weight"] == 0.0
    assert sorted(path.name for path in (whole / "llm").iterdir()) == ["checkpoint-3", "checkpoint-6", "final"]


def test_every_checkpoint_says_what_trained_it(whole, tmp_path):
    for stage in stages_of(tmp_path, "again"):
        for folder in ("checkpoint-3", "final"):
            config = whole / stage.name / folder / "training.yaml"
            (read,) = load_stages(config, tmp_path / "again")
            assert read == stage
        effective = yaml.safe_load(config.read_text())
        assert effective["tuning"]["encoder_layer_decay"] == 1.0 and effective["model"]["ctc_subset_size"] == 1000
        assert effective["training"]["save_strategy"] == "steps" and effective["training"]["save_total_limit"] == 2


def test_a_finished_run_is_not_repeated_but_its_weights_are_read(whole, models, data_dir, steps, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    run(stages_of(tmp_path, "out"), data_dir)
    assert steps == []
    state = models[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(whole / "llm/final").items())


@pytest.mark.parametrize(
    ("count", "accumulation"),
    [
        pytest.param(2, 1, id="in the first stage"),
        pytest.param(3 + 1, 1, id="in the second stage, before its first checkpoint"),
        pytest.param(3 + 5, 1, id="in the second stage"),
        pytest.param(3 + 5, 2, id="with gradient accumulation, in the second epoch"),
    ],
)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    whole, models, data_dir, tmp_path, steps, monkeypatch, count, accumulation
):
    options = {"gradient_accumulation_steps": accumulation}
    if accumulation > 1:
        run(stages_of(tmp_path, "whole", **options), data_dir)
        whole = tmp_path / "whole"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, steps, count * accumulation)
        run(stages_of(tmp_path, "pieces", **options), data_dir)
    del steps[:]
    run(stages_of(tmp_path, "pieces", **options), data_dir)
    assert len(steps) == {2: 1 + 6, 4: 6, 8: 3 * accumulation}[count], "it did not go on from the last checkpoint"
    for stage in ("ctc", "llm"):
        assert_equal_weights(whole / stage / "final", tmp_path / "pieces" / stage / "final")


def test_one_stage_can_be_trained_alone_from_the_finished_one_before_it(whole, models, data_dir, tmp_path, steps):
    with pytest.raises(ValueError, match="stage 'llm' starts from the weights of 'ctc', which is not finished"):
        run(stages_of(tmp_path, "pieces"), data_dir, only=["llm"])
    run(stages_of(tmp_path, "pieces"), data_dir, only=["ctc"])
    assert steps == ["ctc"] * 3 and not (tmp_path / "pieces/llm").exists()
    assert_equal_weights(whole / "ctc/final", tmp_path / "pieces/ctc/final")
    run(stages_of(tmp_path, "pieces"), data_dir, only=["llm"])
    assert steps == ["ctc"] * 3 + ["llm"] * 6
    expected, found = weights(whole / "llm/final"), weights(tmp_path / "pieces/llm/final")
    assert set(found) == set(expected)
    encoder = [name for name in found if name.startswith("audio_tower.")]
    assert encoder and all(torch.equal(found[name], expected[name]) for name in encoder)


def test_the_scale_of_the_lora_is_that_of_the_stage_that_trained_it(models, data_dir, tmp_path):
    last = {"name": "after", "tuning": {"llm": "freeze"}, "training": {"max_steps": 1}}
    run(stages_of(tmp_path, "out", [{**STAGES[1], "training": {"max_steps": 1}}, last]), data_dir)
    assert json.loads((tmp_path / "out/after/final/recipe.json").read_text())["lora_scaling"] == {"language_model": 3.0}
    assert any("lora_A" in name for name in weights(tmp_path / "out/after/final"))


@pytest.mark.parametrize("generation", [{"mode": "ctc_greedy"}, {"ctc_weight": 0.3, "num_beams": 2}], ids=str)
def test_error_rates_are_measured_while_training(models, data_dir, tmp_path, generation):
    stage = {
        **STAGES[0],
        "generation": generation,
        "data": {"eval_manifests": {"dev": "dev.jsonl", "one": "dev.jsonl"}, "max_eval_examples": 2},
        "training": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
    }
    run(stages_of(tmp_path, "out", [stage]), data_dir)
    state = json.loads((tmp_path / "out/ctc/checkpoint-2/trainer_state.json").read_text())
    (dev,) = [entry for entry in state["log_history"] if "eval_dev_wer" in entry]
    (one,) = [entry for entry in state["log_history"] if "eval_one_wer" in entry]
    assert dev["eval_dev_wer"] == one["eval_one_wer"] > 0 and dev["eval_dev_cer"] > 0
    # The same by hand.
    model, processor = models[0].eval(), tiny_processor()
    examples = [{"waveform": tone(DURATIONS_S[i], 150 * (i + 1)), "text": TEXTS[i]} for i in range(2)]
    batch = SpeechLLMDataCollator(processor)(examples)
    texts = processor.batch_decode(model.generate(**batch, **generation))
    errors = training.train.word_errors(TEXTS[:2], texts)
    assert dev["eval_dev_wer"] == pytest.approx(100 * errors.wer)
    assert dev["eval_dev_cer"] == pytest.approx(100 * errors.cer)
    assert [entry["ctc_loss"] for entry in state["log_history"] if "ctc_loss" in entry]


def test_no_utterance_within_the_limits_is_an_error_that_names_them(models, data_dir, tmp_path):
    stage = {**STAGES[0], "data": {"min_duration_s": 5.0}}
    with pytest.raises(ValueError, match=r"no utterance of train.jsonl lasts 5.0 to 30.0 s; change min"):
        run(stages_of(tmp_path, "out", [stage]), data_dir)


def test_utterances_outside_of_the_limits_are_left_out(models, data_dir, tmp_path):
    (stage,) = stages_of(tmp_path, "out", [{**STAGES[0], "data": {"min_duration_s": 0.5, "max_duration_s": 0.8}}])
    trainer = training.train.build_trainer(stage, tiny_model(), tiny_processor(), data_dir, set())
    assert [row.text for row in trainer.train_dataset.rows] == ["an inn", "a ring", "in the", "thing a"]


# Gradient accumulation.


class GradientsBeforeTheStep(TrainerCallback):
    def __init__(self, model):
        self.model, self.gradients = model, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def one_step(tmp_path: Path, batches: list[list[int]], tuning: TuningArguments):
    """Logged losses and gradients of one optimiser step over `batches`."""
    model, processor = tiny_model(), tiny_processor()
    set_trainable(model, tuning)
    examples = [
        {"waveform": tone(duration_s, 150 * (index + 1)), "text": text, "source": "", "row": index, "conversions": ()}
        for index, (text, duration_s) in enumerate(zip(TEXTS, DURATIONS_S, strict=True))
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        gradient_accumulation_steps=len(batches),
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = SpeechLLMTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=SpeechLLMDataCollator(processor),
        processing_class=processor,
        tuning=tuning,
        batch_sampler=batches,
        effective={},
        generation={},
        recipe={},
    )
    callback = GradientsBeforeTheStep(model)
    trainer.add_callback(callback)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: log[name] for name in ("loss", "ce_loss", "ctc_loss") if name in log}, callback.gradients


@pytest.mark.parametrize(
    "tuning",
    [
        TuningArguments(encoder="full", llm="lora", lora_r=2),
        TuningArguments(encoder="full", ce_loss_weight=0.0, ctc_loss_weight=1.0),
    ],
    ids=["both losses", "CTC alone"],
)
def test_accumulated_batches_give_the_loss_and_the_gradients_of_one_batch(tmp_path, tuning):
    # The halves differ in their number of tokens: a mean of means would be another number.
    losses, gradients = one_step(tmp_path, [[0, 1, 2, 3]], tuning)
    accumulated_losses, accumulated = one_step(tmp_path, [[0], [1, 2, 3]], tuning)
    assert set(losses) == ({"loss", "ce_loss", "ctc_loss"} if tuning.ce_loss_weight else {"loss", "ctc_loss"})
    assert accumulated_losses == pytest.approx(losses, rel=1e-5)
    assert set(accumulated) == set(gradients) and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    expected = tuning.ctc_loss_weight * losses["ctc_loss"] + tuning.ce_loss_weight * losses.get("ce_loss", 0.0)
    assert losses["loss"] == pytest.approx(expected, rel=1e-5)


# Overfitting.

OVERFIT_TEXTS, OVERFIT_DURATIONS_S = ["the ring", "a hat"], [1.0, 0.8]


def overfit(tmp_path: Path, tuning: dict, steps: int, learning_rate: float) -> list[dict]:
    """Trains on two utterances; the losses logged."""
    data_dir = tmp_path / "two"
    write_manifest(data_dir / "train.jsonl", OVERFIT_TEXTS, OVERFIT_DURATIONS_S)
    stage = {
        "name": "overfit",
        "tuning": tuning,
        "data": {"augment": False},
        "training": {
            "max_steps": steps,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "save_steps": steps,
            "adam_beta2": 0.98,
        },
    }
    run(stages_of(tmp_path, "out", [stage]), data_dir)
    state = json.loads((tmp_path / f"out/overfit/checkpoint-{steps}/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def transcribe(model, **options) -> list[str]:
    processor = tiny_processor()
    waveforms = [tone(duration_s, 150 * (index + 1)) for index, duration_s in enumerate(OVERFIT_DURATIONS_S)]
    return processor.batch_decode(model.eval().generate(**processor(waveforms, sampling_rate=RATE), **options))


def test_ctc_stage_learns_two_utterances_by_heart(models, tmp_path):
    tuning = {"encoder": "full", "ce_loss_weight": 0.0, "ctc_loss_weight": 1.0}
    log = overfit(tmp_path, tuning, steps=60, learning_rate=0.03)
    assert log[0]["ctc_loss"] > 2.0 and log[-1]["ctc_loss"] < 0.05
    assert transcribe(models[0], mode="ctc_greedy") == OVERFIT_TEXTS


def test_speech_llm_stage_with_lora_learns_two_utterances_by_heart(tmp_path, monkeypatch):
    model = tiny_model()
    # With embeddings as small as a fresh model's, no hidden state gives a token a probability near one.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(60)
        model.get_output_embeddings().weight.mul_(60)
    monkeypatch.setattr(training.train, "build_model", lambda _arguments: (model, tiny_processor()))
    tuning = {"llm": "lora", "lora_r": 8, "lora_alpha": 32, "ctc_head": "freeze", "ctc_loss_weight": 0.0}
    tuning["lora_targets"] = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    log = overfit(tmp_path, tuning, steps=40, learning_rate=0.01)
    assert log[0]["ce_loss"] > 2.0 and log[-1]["ce_loss"] < 0.05
    assert transcribe(model, num_beams=1) == OVERFIT_TEXTS

"""training.recipe: options, scale, what is needed, what is complete, and the whole chain on tiny models."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from test_assembly import audio_folder, language_model_folder  # noqa: F401 (a fixture)
from test_synthesize import ToneEngine
from test_training import CONFIGS, write_config
from tiny_models import PROMPT

from hf_speechllm.assembly import TRAINED_WEIGHTS_NAME
from training import engines, recipe, synthesize
from training.data_report import DataError
from training.estimate_prior import PRIOR_NAME
from training.packages import Package
from training.recipe import Step, carry_out, check_scale, load_run, parse_recipe, plan, prepare, scaled_run
from training.texts import Sentence, save_sentences

TINY_EN = CONFIGS / "tiny_en.yaml"


def run_of(tmp_path: Path, **options):
    return load_run(TINY_EN, tmp_path / "data", tmp_path / "out", **options)


# Options.


def test_the_default_model_trains_on_what_its_recipe_makes(tmp_path):
    run = run_of(tmp_path)
    made = [
        f"{each.output}/{synthesize.shard_name(each.engine, each.seed, shard)}.jsonl"
        for each in run.recipe.synthesis
        for shard in range(synthesize.num_shards(each.hours))
    ]
    made += [f"{run.recipe.pseudo_labels.output}/{game}-00000.jsonl" for game in run.recipe.pseudo_labels.games]
    made += [f"{run.recipe.real_speech.output}/{name}.jsonl" for name in ("asterisk_2s", "librivox", "dev")]
    used = {pattern for stage in run.stages for pattern in stage.data.train_manifests}
    used |= {pattern for stage in run.stages for pattern in stage.data.eval_manifests.values()}
    used |= {evaluation.manifest for evaluation in run.recipe.evaluation}
    assert [pattern for pattern in used if not any(fnmatch(name, pattern) for name in made)] == []
    # What is measured on is never learnt from.
    learnt = {pattern for stage in run.stages for pattern in stage.data.train_manifests}
    assert not any(fnmatch(each.manifest, pattern) for each in run.recipe.evaluation for pattern in learnt)
    titles = [step.title for step in plan(run)]
    assert len(titles) == len(run.recipe.synthesis) + len(run.recipe.pseudo_labels.games) + 5
    assert titles[0].startswith("43200 s of synthesis by hibari, seed 1")
    assert titles[-1].endswith("out/speechllm-tiny-en.md")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"syntesis": []}, "section 'recipe': unknown key 'syntesis'"),
        ({"synthesis": [{"engine": "flite", "hour": 1}]}, "recipe.synthesis, entry 1: unknown key 'hour'"),
        ({"synthesis": [{"engine": "f", "hours": 1, "seed": 1, "output": "o"}]}, "entry 1: engine must be one of"),
        (
            {"synthesis": [{"engine": "flite", "hours": 1, "seed": 1, "output": "o", "split": "test"}]},
            "split must be 'train' or 'dev', got 'test'",
        ),
        ({"pseudo_labels": {"output": "a", "dev_output": "b", "games": ["doom"]}}, r"games must be among .*\['doom'\]"),
        ({"real_speech": {}}, "recipe.real_speech: .*output"),
        ({"evaluation": [{"manifest": "m"}]}, "recipe.evaluation, entry 1: .*name"),
        ({"card": {"title": "x"}}, "recipe.card: unknown key 'title'"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_options_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(values)


def test_a_config_without_a_recipe_or_with_one_that_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a section 'recipe', got none"):
        load_run(CONFIGS / "librispeech_100.yaml", tmp_path, tmp_path)
    values = yaml.safe_load((CONFIGS / "tiny_en.yaml").read_text())
    del values["recipe"]["export"]["ctc_weight"]
    (tmp_path / "joint.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="recipe.export: mode joint of .* needs the weight of CTC; set ctc_weight"):
        load_run(tmp_path / "joint.yaml", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="scale must be above 0 and at most 1, got 2"):
        run_of(tmp_path, scale=2.0)


def test_scale_shrinks_the_work_and_nothing_else(tmp_path):
    whole, small = run_of(tmp_path), run_of(tmp_path, scale=0.01)
    for stage, other in zip(whole.stages, small.stages, strict=True):
        assert other.training.max_steps == max(1, round(stage.training.max_steps / 100))
        assert other.training.save_steps == max(1, round(stage.training.save_steps / 100))
        assert (other.tuning, other.model) == (stage.tuning, stage.model)
        assert other.training.learning_rate == stage.training.learning_rate
        assert (stage.data.max_eval_examples, other.data.max_eval_examples) == (100, 1)
    assert small.recipe == whole.recipe
    assert plan(small)[0].title.startswith("432 s of synthesis by hibari, seed 1")
    values = {"training": {"max_steps": 300}, "stages": [{"name": "a", "training": {"eval_steps": 7}}, {"name": "b"}]}
    before = json.dumps(values)
    assert scaled_run(values, 1.0) == values
    assert scaled_run(values, 0.1)["stages"] == [{"name": "a", "training": {"eval_steps": 1}}, {"name": "b"}]
    assert json.dumps(values) == before


def test_folders_of_another_scale_are_refused(tmp_path):
    check_scale(tmp_path / "new", 0.1)
    check_scale(tmp_path / "new", 0.1)
    with pytest.raises(ValueError, match=r"new: was made with --scale 0.1, got 1; choose another folder"):
        check_scale(tmp_path / "new", 1.0)
    # By the single commands.
    (tmp_path / "old").mkdir()
    (tmp_path / "old/train.jsonl").touch()
    with pytest.raises(ValueError, match="old: was made with --scale 1, got 0.5"):
        check_scale(tmp_path / "old", 0.5)
    check_scale(tmp_path / "old", 1.0)


# What is needed.


def test_all_that_is_missing_is_told_before_anything_is_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recipe.shutil, "which", lambda name: None)
    monkeypatch.setattr(recipe, "fetch", lambda *_: made.append("package"))

    def fail(cache):
        raise ModuleNotFoundError("No module named 'hibari'")

    monkeypatch.setitem(engines.ENGINES, "hibari", fail)
    package = Package("debian", "some-game", "", "free")
    steps = [
        Step("a", lambda: False, lambda: None, programs=("ancient",), packages=(package,)),
        Step("b", lambda: False, lambda: None, programs=("ffmpeg", "ancient"), engines=("hibari",)),
    ]
    with pytest.raises(RuntimeError) as error:
        prepare(steps, tmp_path)
    assert str(error.value) == (
        "to be installed: ancient is not there (apt install ancient); ffmpeg is not there (apt install ffmpeg); "
        "hibari does not work (pip install hibari-tts==0.2.1): No module named 'hibari'"
    )
    assert made == []


def test_an_engine_has_to_say_something_in_every_voice(tmp_path, monkeypatch):
    engine = ToneEngine()
    monkeypatch.setitem(engines.ENGINES, "flite", lambda cache: engine)
    assert engines.engine_fault("flite", tmp_path) is None and engine.calls == 2
    whole = engine.synthesize

    def half(spoken, voice):
        return (np.zeros(0, np.float32), 16000) if voice.base == "low" else whole(spoken, voice)

    engine.synthesize = half
    assert engines.engine_fault("flite", tmp_path) == "the voice 'low' of flite says nothing (apt install flite)"
    assert set(engines.INSTALL) == set(engines.ENGINES)


# What is complete.


def test_complete_steps_are_skipped_and_each_step_has_a_line(capsys):
    made = []
    steps = [Step(title, lambda title=title: title in made, lambda title=title: made.append(title)) for title in "abc"]
    made.append("b")
    carry_out(steps)
    assert made == ["b", "a", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "recipe: [1/3] a ..." and lines[1].startswith("recipe: [1/3] a: made in ")
    assert lines[2] == "recipe: [2/3] b: complete" and len(lines) == 5


@pytest.mark.parametrize("told", [True, False], ids=["a mistake in the data", "a failure"])
def test_bad_data_is_told_in_one_line_and_a_failure_with_its_traceback(tmp_path, monkeypatch, capsys, told):
    def fails(*_):
        raise DataError("a.jsonl, row 3: empty_text") if told else RuntimeError("failed at step 3")

    monkeypatch.setattr(recipe.train, "run", fails)
    (step,) = [step for step in plan(run_of(tmp_path)) if step.title.startswith("training")]
    with pytest.raises(SystemExit if told else RuntimeError) as error:
        carry_out([step])
    if told:
        assert error.value.code == 2
        assert capsys.readouterr().err == "recipe: error: a.jsonl, row 3: empty_text\n"


@pytest.fixture
def whole_chain(tmp_path, monkeypatch, capsys, audio_folder):  # noqa: F811
    """A config of tiny models, trained and measured on tones."""
    monkeypatch.setitem(engines.ENGINES, "flite", lambda cache: ToneEngine())
    monkeypatch.setattr(synthesize, "_loaded", {})
    cache = tmp_path / "cache"
    cache.mkdir()
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight") * 20
    save_sentences(
        [Sentence(f"{a} {b}.", f"{a} {b}", "brown") for a in set(words) for b in set(words)], cache / "sentences.jsonl"
    )
    training = {"max_steps": 2, "save_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    ctc = {"ce_loss_weight": 0.0, "ctc_loss_weight": 1.0}
    config = write_config(
        tmp_path / "tiny.yaml",
        model={
            "audio_model": audio_folder,
            "language_model": language_model_folder(tmp_path / "llm"),
            "ctc_subset_size": 30,
            "config": PROMPT,
        },
        data={"train_manifests": ["train/*.jsonl"], "bad_data": "skip", "empty_text": "keep", "max_duration_s": 5.0},
        training=training,
        stages=[{"name": "ctc", "tuning": ctc}, {"name": "llm", "tuning": {"llm": "lora", "encoder": "freeze"}}],
        recipe={
            "synthesis": [
                {"engine": "flite", "hours": 0.01, "seed": 1, "output": "train"},
                {"engine": "flite", "hours": 0.001, "seed": 1, "output": "dev", "split": "dev"},
            ],
            "export": {"ctc_weight": 0.3, "max_new_tokens": 4},
            "prior": ["dev/*.jsonl"],
            "evaluation": [{"manifest": "dev/flite-1-00000.jsonl", "name": "Tones", "modes": ["ctc_greedy", "joint"]}],
            "card": {"name": "tiny", "training": "Tones.", "license": "mit"},
        },
    )

    def carry_out_recipe() -> list[int]:
        """Numbers of the steps that were not complete."""
        carry_out(plan(load_run(config, tmp_path / "data", tmp_path / "out", cache=cache)))
        lines = capsys.readouterr().out.splitlines()
        return [int(line.partition("[")[2].partition("/")[0]) for line in lines if ": made in " in line]

    return config, carry_out_recipe, tmp_path / "out"


def test_the_whole_chain_and_what_is_made_again_when_something_changes(whole_chain, monkeypatch, capsys):
    config, carry_out_recipe, out = whole_chain
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(recipe, "export", interrupted)
        carry_out_recipe()
    assert capsys.readouterr().out.count(": made in ") == 3
    assert carry_out_recipe() == [4, 5, 6]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["system"], row["mode"]) for row in rows] == [
        ("Tones", "tiny", "ctc_greedy"),
        ("Tones", "tiny", "joint"),
    ]
    log_prior = load_file(out / "parts" / TRAINED_WEIGHTS_NAME)[PRIOR_NAME].float()
    assert log_prior[:-1].exp().sum() == pytest.approx(1.0, abs=0.01) and log_prior[-1] == 0.0
    card = (out / "tiny.md").read_text()
    assert "# tiny" in card and "Tones (" in card and '"ctc_weight": 0.3' in card and "license: mit" in card
    assert carry_out_recipe() == []
    # Other options of the export: it is made again, and what follows from it; the training is not.
    config.write_text(config.read_text().replace('"ctc_weight": 0.3', '"ctc_weight": 0.2'))
    assert carry_out_recipe() == [4, 5, 6]
    assert '"ctc_weight": 0.2' in (out / "tiny.md").read_text()
    # Other words on the card alone.
    config.write_text(config.read_text().replace('"Tones."', '"Beeps."'))
    assert carry_out_recipe() == [6]
    assert "Beeps." in (out / "tiny.md").read_text()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(recipe, "plan", lambda run: [Step("all", lambda: False, lambda: made.append(run))])
    folders = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out")]
    command = ["recipe", str(TINY_EN), *folders, "--scale", "0.01", "training.seed=5", "--workers", "2"]
    monkeypatch.setattr("sys.argv", command)
    recipe.main()
    (run,) = made
    assert (run.scale, run.workers, run.cache) == (0.01, 2, tmp_path / "data/cache")
    assert all(stage.training.seed == 5 for stage in run.stages)
    monkeypatch.setattr("sys.argv", ["recipe", str(TINY_EN), *folders])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    assert re.search("recipe: error: .*data: was made with --scale 0.01, got 1", capsys.readouterr().err)

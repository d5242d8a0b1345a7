"""What all commands have in common: mistakes are told in one line, every option has a help text."""

import argparse
import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import noise, tiny_config

from hf_speechllm.combination import MODES
from hf_speechllm.transcription import DECODING_MODES, mode_options
from training.command_line import check_folder, decoding_options, errors_in_one_line, loading, make_parent
from training.evaluation_data import UsageError, read_json_lines
from training.trained_parts import check_trained_parts

ROOT = Path(__file__).parents[1]
RECIPE = {
    "audio_model": "base:moonshine-tiny",
    "language_model": "base:smollm2-135m-instruct",
    "lora_scaling": 2.0,
    "restricted_tokenizer": False,
}
ROW = {"audio_filepath": "0.wav", "text": "the thing", "duration": 0.5}
SCORED = {"text": "a", "pred_text": "a", "duration": 1.0, "time": 1.0}
RATES = ("wer", "wer_low", "wer_high", "cer", "substitutions", "deletions", "insertions", "rtfx")
RESULT = {
    "dataset": "d",
    "mode": "joint",
    "options": {},
    "utterances": 3,
    "duration_min": 1,
    **dict.fromkeys(RATES, 1.0),
}


def write_parts(folder: Path) -> None:
    tiny_config().save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "generation_config.json").write_text("{}")
    weights = {"ctc_head.linear.bias": torch.zeros(2), "audio_tower.layers.0.mlp.weight": torch.zeros(2)}
    save_file(weights, folder / "trained.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory, loud_model_folder):
    """A folder to run commands in, with good and bad files."""
    import soundfile

    folder = tmp_path_factory.mktemp("place")
    (folder / "model").symlink_to(loud_model_folder)
    (folder / "empty").mkdir()
    for name in ("parts", "no_weights", "bad_weights", "bad_recipe", "list_recipe", "short_recipe", "other_base"):
        write_parts(folder / name)
    (folder / "no_weights" / "trained.safetensors").unlink()
    (folder / "bad_weights" / "trained.safetensors").write_bytes(b"nonsense" * 20)
    (folder / "bad_recipe" / "recipe.json").write_text("{")
    (folder / "list_recipe" / "recipe.json").write_text("[]")
    (folder / "short_recipe" / "recipe.json").write_text("{}")
    (folder / "other_base" / "recipe.json").write_text(json.dumps({**RECIPE, "audio_model": "base:absent"}))
    write_parts(folder / "no_config")
    (folder / "no_config" / "config.json").unlink()
    soundfile.write(folder / "0.wav", noise(0.5, seed=1)[0], 16_000)
    lines = {
        "good": json.dumps(ROW),
        "nothing": "",
        "text": "not json",
        "list": "[1]",
        "short": "{}",
        "number": json.dumps({**ROW, "text": 3}),
        "null": json.dumps({**ROW, "audio_filepath": None}),
        "length": json.dumps({**ROW, "duration": "long"}),
        "scored": json.dumps(SCORED),
        "unscored": json.dumps({**SCORED, "pred_text": None}),
        "results": json.dumps(RESULT),
        "bad_results": json.dumps({**RESULT, "options": 3}),
        "bad_rates": json.dumps({**RESULT, "cer": "high"}),
    }
    for name, line in lines.items():
        (folder / f"{name}.jsonl").write_text(f"{line}\n" if line else "")
    (folder / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (folder / "words.txt").write_text("hello there\nthe thing\n")
    (folder / "words.gz").write_text("no gzip")
    (folder / "sentences").mkdir()
    (folder / "sentences" / "sentences.jsonl").write_text("nonsense\n")
    return folder


SHARES = ("--shares", "0", "1")
CARD = ("model_card", "name", "--output", "card.md")
PUBLISH = ("--repo-id", "me/tiny", "--dry-run", "published")
SYNTHESIZE = ("synthesize", "--engine", "flite", "--out", "out", "--cache", "cache")
GAMES = ("pseudo_labels", "--game", "queen")
MISTAKES = [
    (("export", "absent", "out"), "absent: no such folder; expected one of trained parts"),
    (("export", "empty", "out"), "empty: has no recipe.json; expected a folder of trained parts"),
    (("export", "no_weights", "out"), "no_weights: has no trained.safetensors"),
    (
        ("export", "bad_weights", "out"),
        "bad_weights/trained.safetensors: expected weights in the format of safetensors (",
    ),
    (("export", "no_config", "out"), "no_config/config.json: no such file"),
    (("export", "parts", "good.jsonl"), "FOLDER: expected a folder, got the file good.jsonl"),
    (("export", "parts", "parts"), "parts: expected another folder than that of the run"),
    (("export", "parts", "out", "--generate", "{"), "--generate: expected a JSON object, got '{'"),
    (("export", "parts", "out", "--generate", "[]"), "--generate: expected a JSON object, got '[]'"),
    (("export", "parts", "out", "--generate", '{"ctc_wait": 1}'), "--generate: 'ctc_wait' is no option of generate"),
    (("export", "parts", "out", "--generate", '{"ctc_weight": 5}'), "ctc_weight must lie between 0"),
    (("interpolate", "absent", "parts", "out", *SHARES), "absent: no such folder"),
    (("interpolate", "parts", "bad_recipe", "out", *SHARES), "bad_recipe/recipe.json: expected a JSON object, got '{'"),
    (("interpolate", "parts", "bad_weights", "out", *SHARES), "bad_weights/trained.safetensors: expected weights"),
    (("interpolate", "parts", "parts", "empty", *SHARES), "OUTPUT: empty exists already; give a new folder"),
    (("interpolate", "parts", "parts", "out", "--shares", "0.5", "2"), "shares: expected a list of numbers from 0"),
    (("estimate_prior", "absent", "good.jsonl"), "MODEL: no such folder: absent"),
    (("estimate_prior", "empty", "good.jsonl"), "MODEL: empty cannot be loaded (OSError: "),
    (("estimate_prior", "short_recipe", "good.jsonl"), "short_recipe/recipe.json: field 'audio_model' is missing"),
    (("estimate_prior", "model", "absent.jsonl"), "absent.jsonl: no such file"),
    (("estimate_prior", "model", "empty"), "empty: expected a file, got a folder"),
    (("estimate_prior", "model", "nothing.jsonl"), "nothing.jsonl: expected at least one utterance, got none"),
    (("estimate_prior", "model", "text.jsonl"), "text.jsonl:1: expected a JSON object, got 'not json'"),
    (("estimate_prior", "model", "null.jsonl"), "null.jsonl:1: audio_filepath: expected a string, got None"),
    (("estimate_prior", "model", "length.jsonl"), "length.jsonl:1: duration: expected a number, got 'long'"),
    (("estimate_prior", "model", "latin.jsonl"), "latin.jsonl:1: expected UTF-8 ("),
    (("estimate_prior", "model", "good.jsonl", "--batch-size", "0"), "--batch-size: expected at least 1, got 0"),
    ((*CARD, "--parts", "absent", "--results", "results.jsonl"), "absent: no such folder"),
    ((*CARD, "--parts", "list_recipe", "--results", "results.jsonl"), "expected a JSON object, got '[]'"),
    ((*CARD, "--parts", "other_base", "--results", "results.jsonl"), "base: and one of moonshine-tiny,"),
    ((*CARD, "--parts", "parts", "--results", "absent.jsonl"), "absent.jsonl: no such file"),
    ((*CARD, "--parts", "parts", "--results", "short.jsonl"), "short.jsonl:1: field 'dataset' is missing"),
    ((*CARD, "--parts", "parts", "--results", "bad_results.jsonl"), "options: expected an object, got 3"),
    ((*CARD, "--parts", "parts", "--results", "bad_rates.jsonl"), "cer: expected a number, got 'high'"),
    (
        ("model_card", "n", "--parts", "parts", "--results", "results.jsonl", "--output", "empty"),
        "--output: expected a file, got the folder empty",
    ),
    (("publish", "bad_recipe", *PUBLISH), "bad_recipe/recipe.json: expected a JSON object"),
    (("publish", "other_base", *PUBLISH), "base: and one of moonshine-tiny,"),
    (("publish", "bad_weights", *PUBLISH), "bad_weights/trained.safetensors: expected weights"),
    (("publish", "parts", *PUBLISH, "--results", "latin.jsonl"), "latin.jsonl:1: expected UTF-8 ("),
    (("publish", "parts", *PUBLISH, "--eval-results", "latin.jsonl"), "--eval-results: latin.jsonl: expected the YAML"),
    (("publish", "parts", *PUBLISH, "--generate", '{"ctc_wait": 1}'), "'ctc_wait' is no option of generate"),
    (("evaluate_asr", "null.jsonl"), "null.jsonl:1: audio_filepath: expected a string, got None"),
    (("evaluate_asr", "length.jsonl"), "length.jsonl:1: duration: expected a number, got 'long'"),
    (("evaluate_asr", "empty"), "empty: a folder; expected a JSONL manifest"),
    (("evaluate_asr", "good.jsonl", "--model", "run/llm/final"), "--model: no such folder: run/llm/final"),
    (("evaluate_asr", "good.jsonl", "--model", "absent"), "--model: no such folder: absent; as a Hub id it cannot"),
    (
        ("evaluate_asr", "good.jsonl", "--model", "good.jsonl"),
        "--model: expected the folder of a model or a Hub id, got",
    ),
    (("evaluate_asr", "good.jsonl", "--model", "list_recipe"), "list_recipe/recipe.json: expected a JSON object"),
    (
        ("evaluate_asr", "good.jsonl", "--model", "model", "--device", "gpu"),
        "--device: expected cpu, cuda, cuda:0, mps",
    ),
    (
        ("evaluate_asr", "good.jsonl", "--model", "model", "--generate", '{"beams": 3}'),
        "the model does not work with the options {'beams': 3, 'mode': 'llm', 'ctc_weight': 0.0} (ValueError: ",
    ),
    (("evaluate_asr", "good.jsonl", "--compare", "text.jsonl"), "--compare: text.jsonl:1: expected a JSON object"),
    (("evaluate_asr", "good.jsonl", "--results", "empty"), "--results: expected a file, got the folder empty"),
    (("evaluate_asr", "good.jsonl", "--report", "0.wav/page"), "--report: expected a folder, got the file 0.wav"),
    (("evaluate_asr", "good.jsonl", "--output", "0.wav/run"), "--output: expected a folder, got the file 0.wav"),
    (("tune_scales", "run/llm/final", "good.jsonl"), "MODEL: no such folder: run/llm/final"),
    (("tune_scales", "absent", "good.jsonl"), "MODEL: no such folder: absent; as a Hub id"),
    (("tune_scales", "model", "good.jsonl", "--lm", "./absent"), "--lm: no such folder: ./absent"),
    (("tune_scales", "model", "good.jsonl", "--lm", "model"), "--lm: model cannot be loaded (ValueError: Unrecognized"),
    (("leaderboard", "nothing.jsonl"), "nothing.jsonl: expected at least one utterance, got none"),
    (("leaderboard", "unscored.jsonl"), "unscored.jsonl:1: pred_text: expected a string, got None"),
    (("leaderboard", "scored.jsonl", "--repository", "empty"), "repository: expected a clone"),
    (
        ("train_vocabulary", "out", "--size", "13", "--texts", "list.jsonl"),
        "list.jsonl:1: expected a JSON object, got",
    ),
    (("train_vocabulary", "out", "--size", "13", "--texts", "text.jsonl"), "text.jsonl:1: expected a JSON object"),
    (("train_vocabulary", "out", "--size", "13", "--texts", "empty"), "texts: empty cannot be read as UTF-8 text"),
    (("train_vocabulary", "out", "--size", "13", "--texts", "words.gz"), "texts: words.gz cannot be read as UTF-8"),
    (("train_vocabulary", "0.wav", "--size", "13", "--texts", "words.txt"), "FOLDER: expected a folder, got the file"),
    (
        ("train_vocabulary", "out", "--size", "13", "--texts", "words.txt", "--language-model", "./absent"),
        "--language-model: no such folder: ./absent",
    ),
    ((*SYNTHESIZE, "--hours", "-1", "--seed", "1"), "--hours: expected more than 0, got -1.0"),
    ((*SYNTHESIZE, "--hours", "1", "--seed", "-1"), "--seed: expected 0 or more, got -1"),
    ((*SYNTHESIZE, "--hours", "1", "--seed", "1", "--shard-s", "0"), "--shard-s: expected more than 0, got 0.0"),
    ((*SYNTHESIZE, "--hours", "1", "--seed", "1", "--workers", "0"), "--workers: expected at least 1, got 0"),
    ((*SYNTHESIZE, "--hours", "1", "--seed", "1", "--out", "0.wav"), "--out: expected a folder, got the file 0.wav"),
    ((*GAMES, "--out", "out", "--dev-out", "out"), "--dev-out: expected another folder than --out, got out"),
    ((*GAMES, "--out", "out", "--dev-out", "0.wav"), "--dev-out: expected a folder, got the file 0.wav"),
    ((*GAMES, "--out", "out", "--dev-out", "dev", "--threads", "0"), "--threads: expected at least 1, got 0"),
    (("real_speech", "--out", "0.wav"), "--out: expected a folder, got the file 0.wav"),
    (("texts", "--cache", "0.wav"), "--cache: expected a folder, got the file 0.wav"),
    (("benchmarks.joint_decoding", "--model", "./absent"), "--model: no such folder: ./absent"),
    (("benchmarks.joint_decoding", "--repeats", "0"), "--repeats: expected at least 1, got 0"),
    (("benchmarks.joint_weights", "--model", "./absent"), "--model: no such folder: ./absent"),
    (("benchmarks.training_speed", "--manifests", "good.jsonl", "--steps", "1"), "--steps: expected at least 2"),
    (("benchmarks.ctc_beam_search", "--peer-python", "./absent"), "--peer-python: expected a program, got ./absent"),
    (("benchmarks.ctc_beam_search", "--frames", "5", "0"), "--frames: expected at least 1, got 0"),
    (("benchmarks.ctc_loss_memory", "--labels", "0"), "--labels: expected at least 1, got 0"),
    (("benchmarks.prefix_scoring", "--labels", "5"), "--labels: expected at least 34, got 5"),
    (("benchmarks.prefix_scoring", "--peers", "absent"), "--peers: no such folder: absent"),
]


@pytest.mark.parametrize(
    ("command", "message"), MISTAKES, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else ""
)
def test_a_mistake_is_one_line_and_exit_status_2(place, command, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", list(command))
    before = {path.name for path in place.iterdir()}
    module = command[0] if "." in command[0] else f"training.{command[0]}"
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).main()
    assert caught.value.code == 2
    *steps, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{module.split('.')[1]}: error: ") and message in line
    assert all(step.startswith("publish: ") for step in steps)
    assert {path.name for path in place.iterdir()} == before, "nothing is written"


@pytest.fixture
def parsers(monkeypatch):
    """Calls a command and returns its parser, before anything is parsed."""

    def capture(main) -> argparse.ArgumentParser:
        found = []

        def stop(parser, *_arguments, **_options):
            found.append(parser)
            raise SystemExit

        for name in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(SystemExit):
            main()
        return found[0]

    return capture


COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in [*ROOT.glob("training/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "hf_speechllm" / "cli.py"]
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_which_says_its_default(command, parsers):
    parser = parsers(importlib.import_module(command).main)
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for each in [parser, *(sub for action in subcommands for sub in action.choices.values())]:
        for action in each._actions:
            if action in subcommands or action.help == argparse.SUPPRESS:
                continue
            name = action.option_strings or action.dest
            assert action.help, f"{command} {name}: no help"
            is_plain = action.default in (None, False, "", [], argparse.SUPPRESS, 1.0)  # nothing, or a factor of one
            says_default = "default" in action.help or is_plain
            assert says_default, f"{command} {name}: the help does not say that the default is {action.default}"
        each.format_help()  # a stray % would raise


def test_evaluate_asr_explains_its_modes_and_columns(parsers):
    from training import evaluate_asr

    text = parsers(evaluate_asr.main).format_help()
    for mode, description in DECODING_MODES.items():
        assert f"{mode:<16}{description}" in text
    for column in ("WER", "95 % interval", "lb WER", "CER", "halluc", "MiB", "RTFx"):
        assert column in evaluate_asr.COLUMNS and f"\n  {column}" in text
    assert all(f"{column:>6}" in evaluate_asr.COLUMNS for column in ("sub", "del", "ins")) and "sub, del, ins" in text


def test_the_names_of_modes_are_those_of_generate_and_joint():
    assert set(DECODING_MODES) == {"joint", *MODES}
    assert all(mode_options(mode)["mode"] == mode for mode in MODES)
    assert mode_options("joint") == {"mode": "llm"} and mode_options("llm") == {"mode": "llm", "ctc_weight": 0.0}
    with pytest.raises(ValueError, match="--mode: expected one of joint, llm, .*, got 'greedy'"):
        mode_options("greedy")


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError), errors_in_one_line("command"):
        math.floor(1 / 0)
    with pytest.raises(RuntimeError), errors_in_one_line("command"):
        raise RuntimeError
    with pytest.raises(SystemExit), errors_in_one_line("command", RuntimeError):
        raise RuntimeError("no\nprogram")
    with pytest.raises(SystemExit), errors_in_one_line("command"):
        os.listdir("absent")
    assert capsys.readouterr().err == (
        "command: error: no program\ncommand: error: absent: No such file or directory\n"
    )


def test_an_interruption_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught, errors_in_one_line("command"):
        raise KeyboardInterrupt
    assert caught.value.code == 130 and capsys.readouterr().err == "command: interrupted\n"


def test_loading_names_the_model_and_leaves_clear_messages_alone(tmp_path):
    message = r"^the default model cannot be loaded \(KeyError: 'x'\)$"
    with pytest.raises(UsageError, match=message), loading("--lm", None):
        raise KeyError("x")
    with pytest.raises(UsageError, match="^clear$"), loading("--lm", tmp_path):
        raise UsageError("clear")
    message = r"^--lm: base:x cannot be loaded \(ValueError: no x Y\)$"
    with pytest.raises(UsageError, match=message), loading("--lm", "base:x"):
        raise ValueError("no x\nY Model type should be one of A, B")


def test_folders_of_files_are_made_and_files_in_their_way_are_named(tmp_path):
    make_parent("--out", tmp_path / "a" / "b" / "file")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out: expected a folder, got the file .*file$"):
        check_folder("--out", tmp_path / "file" / "x" / "y")
    check_folder("--out", tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_decoding_options_are_those_of_this_package_and_of_transformers():
    options = {"num_beams": 4, "ctc_weight": 0.3, "mode": "rescoring", "lm_weight": 0.4}
    assert decoding_options("--generate", json.dumps(options)) == options
    with pytest.raises(UsageError, match="--generate: .*mode must be one of"):
        decoding_options("--generate", '{"mode": "greedy"}')
    with pytest.raises(UsageError, match="--generate: "):
        decoding_options("--generate", '{"ctc_weight": "much"}')


def test_good_folders_and_lines_pass(place):
    check_trained_parts(place / "parts")
    assert list(read_json_lines(place / "good.jsonl", ("text",))) == [ROW]

"""What the commands have in common: a mistake of the user is told in one line, and found before long work begins."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig

from hf_speechllm.audio import one_line
from hf_speechllm.combination import DecodingOptions
from hf_speechllm.transcription import check_model_name, describe_load_error, parse_json_object
from training.evaluation_data import UsageError

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


@contextmanager
def errors_in_one_line(command: str, *others: type[Exception]) -> Iterator[None]:
    """Where the user has to change something, end the process with exit status 2 and one line on standard error.

    That is what a ValueError says ([`UsageError`] is one), an OSError, an ImportError or a YAMLError. Ctrl-C is one
    line too, with exit status 130.

    Args:
        command: Its name, which the line begins with.
        others: Further exceptions whose messages are for the user, such as RuntimeError where programs are run.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, yaml.YAMLError, *others) as error:
        file = getattr(error, "filename", None)
        where = "" if file is None or not getattr(error, "strerror", None) else f"{file}: "
        print(f"{command}: error: {where}{one_line(error)}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from error
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


@contextmanager
def loading(option: str, model: str | Path | None) -> Iterator[None]:
    """Say which model it was that cannot be loaded; above all, that there is no such folder.

    Args:
        option: What the model is called on the command line.
        model: Folder, Hub id or `base:NAME`; None: the default model.

    Raises:
        UsageError: There is no such folder and can be no such name on the Hub; or from whatever is raised within.
    """
    if model is not None:
        try:
            check_model_name(option, str(model))
        except ValueError as error:
            raise UsageError(str(error)) from None
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if model is None:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UsageError(f"the default model cannot be loaded ({reason})") from error
        raise UsageError(describe_load_error(option, str(model), error)) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    help_text = "cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, otherwise cpu)"
    parser.add_argument("--device", default=default, help=help_text)


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1, alone or in lists; `None` is fine.

    Raises:
        UsageError: For the first one that is.
    """
    for name in names:
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def check_folder(option: str, path: Path) -> None:
    """Refuse a folder to write where something else is.

    Raises:
        UsageError: There, or where one of its parents should be, is a file.
    """
    found = next((each for each in (path, *path.parents) if each.exists()), path)
    if found.exists() and not found.is_dir():
        raise UsageError(f"{option}: expected a folder, got the file {found}")


def make_parent(option: str, path: Path) -> None:
    """Make the folder of a file that will be written.

    Raises:
        UsageError: If that cannot be, or a folder is in the place of the file.
    """
    if path.is_dir():
        raise UsageError(f"{option}: expected a file, got the folder {path}")
    check_folder(option, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object given for an option.

    Raises:
        UsageError: If it is something else.
    """
    try:
        return parse_json_object(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


def decoding_options(option: str, text: str) -> dict[str, Any]:
    """Options of `generate` of a speech LLM to be stored with it, given as JSON.

    Raises:
        UsageError: If it is no JSON object, or an option is unknown or out of range.
    """
    options = json_object(option, text)
    own = {field.name for field in fields(DecodingOptions)}
    unknown = sorted(set(options) - own - set(GenerationConfig().to_dict()))
    if unknown:
        raise UsageError(
            f"{option}: {unknown[0]!r} is no option of generate; expected those of transformers' GenerationConfig, or "
            f"one of {', '.join(sorted(own))}"
        )
    try:
        DecodingOptions(**{name: value for name, value in options.items() if name in own and value is not None})
        GenerationConfig(**{name: value for name, value in options.items() if name not in own}).validate()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {text}: {one_line(error)}") from None
    return options

"""What the commands have in common: a mistake of the user is told in one line, and found before long work begins."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import GenerationConfig

from hf_speechllm.audio import one_line
from hf_speechllm.combination import DecodingOptions
from training.evaluation_data import UsageError

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130
# transformers lists some five hundred of them behind this.
_KNOWN_KINDS = " Model type should be one of "


@contextmanager
def errors_in_one_line(command: str, *others: type[Exception]) -> Iterator[None]:
    """Where the user has to change something, end the process with exit status 2 and one line on standard error.

    That is what a ValueError says ([`UsageError`] is one), an OSError or an ImportError. Ctrl-C is one line too, with
    exit status 130.

    Args:
        command: Its name, which the line begins with.
        others: Further exceptions whose messages are for the user, such as RuntimeError where programs are run.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, *others) as error:
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
        UsageError: From whatever is raised within, but for its own kind.
    """
    name = "the default model" if model is None else str(model)
    is_absent = model is not None and check_model_name(option, name)
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = f"({type(error).__name__}: {one_line(error).partition(_KNOWN_KINDS)[0]})"
        if is_absent:
            raise UsageError(
                f"{option}: no such folder: {name}; as a Hub id it cannot be loaded either {reason}"
            ) from error
        raise UsageError(f"{option}: {name} cannot be loaded {reason}") from error


def check_model_name(option: str, name: str) -> bool:
    """Refuse what is neither a folder nor `base:NAME` nor could be a Hub id.

    Returns:
        Whether it can be a Hub id only.

    Raises:
        UsageError: There is no such folder, or it is a file.
    """
    if name.startswith("base:") or Path(name).is_dir():
        return False
    if Path(name).exists():
        raise UsageError(f"{option}: expected the folder of a model or a Hub id, got the file {name}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(f"{option}: no such folder: {name}") from None
    return True


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    help_text = "cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, otherwise cpu)"
    parser.add_argument("--device", default=default, help=help_text)


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1; `None` is fine.

    Raises:
        UsageError: For the first one that is.
    """
    for name in names:
        value = getattr(arguments, name)
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
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{option}: expected a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option}: expected a JSON object, got {text!r}")
    return value


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

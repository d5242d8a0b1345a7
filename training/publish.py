"""Publish a model on the Hugging Face Hub: a repository that works with three lines of code, without this package.

    python -m training.publish CHECKPOINT --repo-id USER/NAME --results results.jsonl
    python -m training.publish default --repo-id USER/NAME --dry-run FOLDER

CHECKPOINT is a folder of trained parts (what training/train.py writes), a folder with a whole model, or `default`, the
model of this package. Its LoRA is added to the weights; with --keep-adapter it stays beside them, which the ways of
decoding need that use the plain language model (combination), and so do figures of them in --results. The repository
holds weights, processor, decoding options, the code for `trust_remote_code`, a card written from --results and the
licence. Before the upload and after it, a clip is transcribed by a process that cannot import this package. With
--dry-run nothing leaves the machine.

A token comes from --token, HF_TOKEN or `hf auth login`. Exit status: 0 published, 2 nothing was published (one line
says why).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import pipeline
from transformers.dynamic_module_utils import get_imports
from transformers.utils import ADAPTER_CONFIG_NAME

from hf_speechllm.adapters import has_adapters, merge_adapters, set_base_model
from hf_speechllm.assembly import RECIPE_NAME, load_trained_parts
from hf_speechllm.audio import AudioError, one_line
from hf_speechllm.combination import COMBINATIONS
from hf_speechllm.configuration_speechllm import SpeechLLMConfig
from hf_speechllm.default_model import TRAINED_PARTS
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.processing_speechllm import SpeechLLMProcessor
from training.command_line import decoding_options, errors_in_one_line, loading
from training.evaluation_data import UsageError, read_json_object
from training.model_card import TASK, Subject, base_name, read_results, subject_of_parts, write_card
from training.trained_parts import check_trained_parts, read_recipe

ROOT = Path(__file__).parents[1]
DEFAULT_CLIP = ROOT / "samples" / "sense_and_sensibility_01_austen-0880.flac"
MAX_SHARD_SIZE = "5GB"
# For a process of its own; its arguments are a model and a clip, its last line the text as JSON.
_TRANSCRIBE = """
import json, sys

sys.modules["hf_speechllm"] = None  # importing it raises ImportError
from transformers import pipeline

model, clip = sys.argv[1:]
transcriber = pipeline("automatic-speech-recognition", model=model, trust_remote_code=True)
print(json.dumps(transcriber(clip)["text"]))
"""


@dataclass(frozen=True)
class Source:
    """A model to publish: trained parts or a whole model in `folder`, and the base models, named as in a recipe."""

    folder: Path
    is_parts: bool
    audio_model: str
    language_model: str


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with errors_in_one_line("publish"):
        publish(arguments, HfApi(token=arguments.token))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of trained parts or of a whole model, or: default")
    add("--repo-id", required=True, metavar="USER/NAME", help="repository on the Hub; made if there is none")
    add("--dry-run", type=Path, metavar="FOLDER", help="new folder; write the repository there, and upload nothing")
    add("--keep-adapter", action="store_true", help="keep the LoRA beside the weights instead of adding it to them")
    add(
        "--generate", default="{}", metavar="JSON", help="decoding options to store, over the model's own (default: {})"
    )
    add("--results", type=Path, metavar="JSONL", help="what training.evaluate_asr --results wrote, for the card")
    add("--eval-results", type=Path, metavar="YAML", help="what training.leaderboard --eval-results wrote, for the Hub")
    add(
        "--training", default="", metavar="TEXT", help="for the card: what was learned from what, a sentence or several"
    )
    add("--base-models", nargs=2, metavar=("AUDIO", "LM"), help="Hub ids, where no recipe has them")
    add("--license", metavar="ID", help="of the model's licence (default: that of its language model, if known)")
    add("--license-file", type=Path, metavar="FILE", help="its text (default: Apache-2.0, if that is the licence)")
    add("--language", default="en", metavar="CODE", help="of the language, for the card (default: %(default)s)")
    add(
        "--clip",
        type=Path,
        default=DEFAULT_CLIP,
        metavar="FILE",
        help=f"recording to check the repository with (default: {DEFAULT_CLIP.relative_to(ROOT)})",
    )
    add("--private", action="store_true", help="make a private repository")
    add("--token", help="access token with the right to write (default: HF_TOKEN, or that of `hf auth login`)")
    return parser


def publish(arguments: argparse.Namespace, api: HfApi) -> None:
    """Build, check, upload and check again; a folder of --dry-run appears when it is complete and checked.

    Raises:
        UsageError: something the user has to change; nothing has been published, unless the message says so.
    """
    source = find_source(arguments)
    license_id, license_file = find_license(arguments, source)
    options = decoding_options("--generate", arguments.generate)
    results = [] if arguments.results is None else read_results(arguments.results)
    check_eval_results(arguments.eval_results)
    if not is_repo_id(arguments.repo_id):
        raise UsageError(f"--repo-id: expected USER/NAME, got {arguments.repo_id!r}")
    if not arguments.clip.is_file():
        raise UsageError(f"--clip: {arguments.clip}: no such file")
    # Absolute: the check runs in a folder of its own.
    place = None if arguments.dry_run is None else arguments.dry_run.absolute()
    if place is None:
        check_token(api)
    elif place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"--dry-run: {place} exists already; give a new or an empty folder")
    parent = None if place is None else make_parent(place)
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=parent) as scratch:
        folder = Path(scratch) / "repository"
        step("building", arguments.checkpoint)
        is_merged = write_model(source, folder, options, arguments.keep_adapter)
        if is_merged:
            check_results_of_merged(results)
        subject = replace(describe(source, folder, arguments, license_id), is_merged=is_merged)
        (folder / "README.md").write_text(write_card(subject, results), encoding="utf-8")
        shutil.copyfile(license_file, folder / "LICENSE")
        if arguments.eval_results is not None:
            (folder / ".eval_results").mkdir()
            shutil.copyfile(arguments.eval_results, folder / ".eval_results" / "open_asr_leaderboard.yaml")
        step("checking", "in a process without hf_speechllm")
        expected = transcribe(str(folder), arguments.clip)
        check_text(expected, transcribe_without_package(str(folder), arguments.clip, Path(scratch)), "the repository")
        if place is None:
            upload(arguments, api, folder, expected, Path(scratch))
        else:
            if place.exists():
                place.rmdir()
            os.replace(folder, place)
            step("written", str(place))


def find_source(arguments: argparse.Namespace) -> Source:
    """The model of the command line."""
    is_default = arguments.checkpoint == "default"
    folder = TRAINED_PARTS if is_default else Path(arguments.checkpoint)
    if not folder.is_dir():
        raise UsageError(f"CHECKPOINT: {folder}: no such folder; expected one of trained parts or of a whole model")
    is_parts = (folder / RECIPE_NAME).is_file()
    if is_parts:
        recipe = read_recipe(folder)
        names = arguments.base_models or (recipe["audio_model"], recipe["language_model"])
    else:
        check_is_speech_llm(folder)
        if arguments.base_models is None:
            raise UsageError(f"--base-models: {folder} is a whole model; give the Hub ids of its encoder and its LM")
        names = arguments.base_models
    for name in names:
        hub_id = base_name(name)[0]
        if Path(hub_id).is_dir() or not is_repo_id(hub_id):
            raise UsageError(f"--base-models: expected Hub ids of the base models, got {name!r}; the card names them")
    return Source(folder, is_parts, *names)


def check_is_speech_llm(folder: Path) -> None:
    """Refuse a folder without a speech LLM of this package."""
    config_file = folder / "config.json"
    kind = read_json_object(config_file).get("model_type") if config_file.is_file() else None
    if kind != "speechllm":
        raise UsageError(
            f"CHECKPOINT: {folder}: expected {RECIPE_NAME} (trained parts) or the config.json of a speechllm model, "
            f"got {'no config.json' if kind is None else f'that of a {kind} model'}"
        )


def find_license(arguments: argparse.Namespace, source: Source) -> tuple[str, Path]:
    """Identifier and file of the licence."""
    language_model, known = base_name(source.language_model)
    license_id = arguments.license or known
    if license_id is None:
        raise UsageError(f"--license: that of {language_model} is not known here; give the model's, such as apache-2.0")
    if arguments.license_file is None and license_id != "apache-2.0":
        raise UsageError(f"--license-file: expected the text of {license_id}; only that of apache-2.0 is at hand")
    file = arguments.license_file or ROOT / "LICENSE"
    if not file.is_file():
        raise UsageError(f"--license-file: {file}: no such file")
    return license_id, file


def check_eval_results(path: Path | None) -> None:
    """Refuse a file that the Hub would not take for evaluation results."""
    if path is None:
        return
    try:
        entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--eval-results: {path}: expected the YAML of evaluation results ({one_line(error)})"
        ) from None
    if not entries:
        raise UsageError(f"--eval-results: {path}: expected at least one result, got none")


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name, `USER/NAME`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def check_token(api: HfApi) -> None:
    """Refuse to start without a token that the Hub knows."""
    advice = "give --token, set HF_TOKEN or run `hf auth login`; --dry-run needs none"
    try:
        user = api.whoami()
    except LocalTokenNotFoundError:
        raise UsageError(f"--token: there is no access token; {advice}") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise UsageError(f"--token: the Hub does not know this access token; {advice}") from None
        raise UsageError(f"the Hub does not answer as expected ({one_line(error)})") from error
    except Exception as error:  # of the network: the client has changed its library, and with it the classes
        raise UsageError(f"the Hub cannot be reached ({type(error).__name__}: {one_line(error)})") from error
    step("account", user["name"])


def make_parent(place: Path) -> Path:
    """The folder in which `place` will be made."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--dry-run: {place} cannot be made ({one_line(error)})") from None
    return place.parent


def write_model(source: Source, folder: Path, options: dict[str, Any], keep_adapter: bool) -> bool:
    """Weights, code, processor and decoding options.

    Returns:
        Whether the language model had a LoRA that was added to its weights.
    """
    with loading("CHECKPOINT", source.folder):
        if source.is_parts:
            check_trained_parts(source.folder)
            model, processor = load_trained_parts(source.folder)
        else:
            model = SpeechLLMForConditionalGeneration.from_pretrained(source.folder)
            processor = SpeechLLMProcessor.from_pretrained(source.folder)
    is_merged = has_adapters(model.language_model) and not keep_adapter
    if not keep_adapter:
        merge_adapters(model)
    model.generation_config.update(**options, allow_custom_entries=True)
    # Where they came from, not the folder of this machine that they were loaded from.
    model.config.audio_config._name_or_path = base_name(source.audio_model)[0]
    model.config.text_config._name_or_path = base_name(source.language_model)[0]
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    return is_merged


def check_results_of_merged(results: list[dict[str, Any]]) -> None:
    """Refuse figures that a repository without the plain language model does not reach."""
    modes = sorted({row["mode"] for row in results} & set(COMBINATIONS))
    if modes:
        raise UsageError(
            f"--results: the figures of {', '.join(modes)} are those of the plain language model, which is not in the "
            "repository once the LoRA is added to the weights; give --keep-adapter, or leave these lines out"
        )


def describe(source: Source, folder: Path, arguments: argparse.Namespace, license_id: str) -> Subject:
    """What the card says of the model in `folder`."""
    known: dict[str, Any] = {
        "license": license_id,
        "language": arguments.language,
        "total_parameters": count_parameters(folder),
        "requirements": required_packages(folder),
    }
    usage = (
        f"from transformers import pipeline\n\n"
        f'transcriber = pipeline("{TASK}", model="{arguments.repo_id}", trust_remote_code=True)'
    )
    name = arguments.repo_id.split("/")[1]
    generation = (folder / "generation_config.json").read_text().strip()
    if source.is_parts:
        subject = subject_of_parts(name, usage, source.folder, arguments.training, **known)
        bases = {"audio_model": source.audio_model, "language_model": source.language_model}
        return replace(subject, generation_config=generation, **bases)
    return Subject(
        name=name,
        usage=usage,
        config=SpeechLLMConfig.from_pretrained(folder),
        generation_config=generation,
        audio_model=source.audio_model,
        language_model=source.language_model,
        training=arguments.training,
        **known,
    )


def count_parameters(folder: Path) -> int:
    """Parameters in the weight files of a folder; weights that are tied are stored once."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def required_packages(folder: Path) -> list[str]:
    """What the Python files of a folder import, but for the standard library."""
    names = {name for path in folder.glob("*.py") for name in get_imports(path)}
    return sorted(names - set(sys.stdlib_module_names))


def transcribe(model: str, clip: Path) -> str:
    """The text of a clip by this package.

    Raises:
        UsageError: the model does not work with the decoding options that are stored with it.
        AudioError: the clip cannot be read.
    """
    transcriber = pipeline(TASK, model=model)
    try:
        return transcriber(str(clip))["text"]
    except AudioError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model does not transcribe {clip} ({type(error).__name__}: {one_line(error)})") from error


def transcribe_without_package(model: str, clip: Path, scratch: Path, hub_cache: Path | None = None) -> str:
    """The text of a clip by a process that cannot import this package, with the code that the model brings along.

    Args:
        model: folder, or the id of a repository in `hub_cache`.
        clip: recording.
        scratch: folder for the copy of the code; a new one is made in it.
        hub_cache: cache of the Hub's files. The process has no network.

    Raises:
        UsageError: the model cannot be used like this.
    """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="modules-", dir=scratch),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if hub_cache is not None:
        environment["HF_HUB_CACHE"] = str(hub_cache)
    # Isolated: neither PYTHONPATH nor the folder that it runs in is searched.
    command = [sys.executable, "-I", "-c", _TRANSCRIBE, model, str(clip.absolute())]
    result = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise UsageError(f"{model}: does not transcribe without hf_speechllm ({reason})")
    return json.loads(result.stdout.splitlines()[-1])


def check_text(expected: str, text: str, name: str) -> None:
    """Refuse a model whose remote code transcribes otherwise than this package."""
    if text != expected:
        raise UsageError(f"{name}: expected the text {expected!r} as with hf_speechllm, got {text!r} without")
    step("heard", repr(text))


def upload(arguments: argparse.Namespace, api: HfApi, folder: Path, expected: str, scratch: Path) -> None:
    """Make the repository if there is none, upload the folder in one commit, and transcribe with what the Hub has."""
    repo_id = arguments.repo_id
    if (folder / ADAPTER_CONFIG_NAME).exists():
        # Of a model on the Hub, transformers reads the weights from where the adapter says.
        set_base_model(folder, repo_id)
    step("uploading", f"to {repo_id}")
    try:
        api.create_repo(repo_id, private=arguments.private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish with hf_speechllm",
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.py", "adapter_config.json"],
        )
    except Exception as error:  # of the Hub or of the network; files are there all or none, by the one commit
        raise UsageError(f"{repo_id}: the upload failed ({type(error).__name__}: {one_line(error)})") from error
    step("checking", "what the Hub has")
    hub_cache = scratch / "hub"
    try:
        api.snapshot_download(repo_id, cache_dir=hub_cache)
        text = transcribe_without_package(repo_id, arguments.clip, scratch, hub_cache)
        check_text(expected, text, repo_id)
    except Exception as error:
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{commit.commit_url} is published, but the check failed: {reason}") from error
    step("published", str(commit.commit_url))


def step(what: str, detail: str) -> None:
    """Say on standard error what is being done; of uploads and downloads the Hub's client shows bars."""
    print(f"publish: {what:<10} {detail}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

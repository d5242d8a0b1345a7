"""The default model, speechllm-tiny-en: its trained parts come with the package, its base models from the registry."""

import hashlib
from pathlib import Path

from filelock import FileLock
from transformers.utils import logging

from .assembly import CHECKPOINT_FORMAT, RECIPE_NAME, TRAINED_WEIGHTS_NAME, assemble
from .base_models import cache_root

DEFAULT_MODEL_NAME = "speechllm-tiny-en"
TRAINED_PARTS = Path(__file__).parent / "assets" / DEFAULT_MODEL_NAME

logger = logging.get_logger(__name__)


def default_model(cache_dir: str | None = None) -> str:
    """Folder of the default model for `from_pretrained` and `pipeline`; put together on the first call.

    The trained parts (in the package) are put together with Moonshine tiny and SmolLM2-135M-Instruct ([`base_model`])
    to one float32 checkpoint of about 590 MB in the cache, the LoRA as an adapter in it. Later calls return at once.

    Args:
        cache_dir: Used instead of `HF_SPEECHLLM_CACHE`, or of `hf_speechllm` in the cache of Hugging Face.

    Raises:
        FileNotFoundError: If the package was installed without its trained parts.
        OSError: If a base model cannot be had; the message says what to do.
    """
    digest = _parts_digest()
    parent = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    folder = parent / "models" / f"{DEFAULT_MODEL_NAME}-{digest[:12]}"
    # `assemble` moves the folder into place when it is complete.
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with logging.tqdm(total=1, desc=f"Assembling {DEFAULT_MODEL_NAME}", unit="model") as progress:
                assemble(TRAINED_PARTS, folder)
                progress.update()
    return str(folder)


def _parts_digest() -> str:
    """Of everything that the assembled folder depends on here, so that another version gets another folder."""
    digest = hashlib.sha256(f"format {CHECKPOINT_FORMAT}".encode())
    for name in (TRAINED_WEIGHTS_NAME, RECIPE_NAME, "config.json", "generation_config.json"):
        path = TRAINED_PARTS / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected as part of the installed package, got no such file; install hf-speechllm again, "
                "or pass another model."
            )
        digest.update(path.read_bytes())
    return digest.hexdigest()

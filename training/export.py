"""Turn a finished run into the small folder of trained parts that is shared: weights in 16 bit, decoding options set.

    python -m training.export RUN/llm/final FOLDER --generate '{"num_beams": 4, "ctc_weight": 0.5}'

With `--whole` they are put together with the pre-trained models (`hf_speechllm.assembly.assemble`), to a checkpoint for
`from_pretrained` and `pipeline` on this machine; training/publish.py makes one for the Hub.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME, assemble
from training.command_line import check_folder, decoding_options, errors_in_one_line
from training.evaluation_data import UsageError, read_json_object
from training.trained_parts import read_recipe, read_trained_weights


def export(run: Path, folder: Path, generation: dict[str, Any]) -> float:
    """Write `folder`; returns the size of the weights in MB.

    Raises:
        UsageError: If a file of the run is not there or is no such file, or `folder` is the run itself.
        ValueError: If a weight does not fit into float16.
    """
    read_recipe(run, ())
    if folder.resolve() == run.resolve():
        raise UsageError(f"{folder}: expected another folder than that of the run, whose weights it would replace")
    state = read_trained_weights(run)
    model_config = read_json_object(run / CONFIG_NAME, ("audio_config", "text_config"))
    read_json_object(run / GENERATION_CONFIG_NAME)
    config = GenerationConfig.from_pretrained(run)
    for name, value in state.items():
        if value.is_floating_point() and not value.half().isfinite().all():
            raise ValueError(f"{run}: weight {name!r} has values beyond float16 (largest {value.abs().max():.3g}).")
    folder.mkdir(parents=True, exist_ok=True)
    shared = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(shared, folder / TRAINED_WEIGHTS_NAME)
    (folder / TRAINED_WEIGHTS_NAME).chmod(0o644)  # safetensors writes for the owner alone
    shutil.copyfile(run / RECIPE_NAME, folder / RECIPE_NAME)
    for part in ("audio_config", "text_config"):
        model_config[part].pop("_name_or_path", None)  # a folder of the machine that trained it
    (folder / CONFIG_NAME).write_text(json.dumps(model_config, indent=2) + "\n")
    config.update(**generation, allow_custom_entries=True)
    config.save_pretrained(folder)
    return (folder / TRAINED_WEIGHTS_NAME).stat().st_size / 1e6


def export_whole(run: Path, folder: Path, generation: dict[str, Any]) -> None:
    """Write a checkpoint of the trained parts and the pre-trained models into `folder`, which must be new or empty.

    Raises:
        UsageError: If there is something in the folder, or as for [`export`].
        ValueError: As for [`export`].
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: expected a new or an empty folder, got one with files; a checkpoint replaces them")
    with tempfile.TemporaryDirectory() as parts:
        export(run, Path(parts), generation)
        assemble(parts, folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder `final` of the last stage")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write")
    parser.add_argument(
        "--generate",
        metavar="JSON",
        default="{}",
        help="decoding options to store, over those of the run (default: {})",
    )
    parser.add_argument(
        "--whole", action="store_true", help="write a checkpoint for from_pretrained and pipeline instead"
    )
    arguments = parser.parse_args()
    with errors_in_one_line("export"):
        check_folder("FOLDER", arguments.folder)
        generation = decoding_options("--generate", arguments.generate)
        if arguments.whole:
            export_whole(arguments.run, arguments.folder, generation)
            print(f"{arguments.folder}: a checkpoint for from_pretrained and pipeline")
        else:
            size_mb = export(arguments.run, arguments.folder, generation)
            print(f"{arguments.folder}: {size_mb:.1f} MB of weights, {torch.float16}")


if __name__ == "__main__":
    main()

"""Interpolate the encoder and CTC head of two runs, layer by layer: what was learned on synthesis, tempered.

    python -m training.interpolate START END OUTPUT --shares 0 0 0.2 0.5 0.8 1 1

START and END are folders of trained parts (training/train.py) of one recipe. Every encoder layer goes its share of the
way from START to END, the last share is that of the final norm and the CTC head; all other weights are END's. A layer
that START has not trained, with share 0, stays as pre-trained and is left out. Choose the shares on development data.

Source: Wortsman et al. (2022), "Robust fine-tuning of zero-shot models".
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME
from training.command_line import check_folder, errors_in_one_line
from training.evaluation_data import UsageError
from training.trained_parts import read_recipe, read_trained_weights

_LAYER = re.compile(r"^audio_tower\..*?layers\.(\d+)\.")


def interpolate(
    start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], shares: list[float]
) -> dict[str, torch.Tensor]:
    """The weights between `start` and `end`; see the head of this file.

    Raises:
        ValueError: If a share is not between 0 and 1, there is no share for a layer, a weight with a share of neither 0
            nor 1 is not in `start`, or has another shape there.
    """
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(f"shares: expected numbers from 0 (start) to 1 (end), got {shares}.")
    result = {}
    for name, value in end.items():
        layer = _LAYER.match(name)
        if layer is None and not name.startswith(("audio_tower.", "ctc_head.")):
            result[name] = value
            continue
        index = len(shares) - 1 if layer is None else int(layer.group(1))
        if layer is not None and index >= len(shares) - 1:
            raise ValueError(f"shares: expected one for layer {index} and one for norm and head, got {len(shares)}.")
        share = shares[index]
        if name in start:
            if start[name].shape != value.shape:
                raise ValueError(
                    f"start: {name!r} has the shape {list(start[name].shape)}, in end it is {list(value.shape)}; "
                    "expected two runs of one recipe."
                )
            result[name] = torch.lerp(start[name].float(), value.float(), share)
        elif share == 1.0:
            result[name] = value
        elif share != 0.0:
            raise ValueError(f"start: {name!r} was not trained there, so its share must be 0 or 1, got {share}.")
    return result


def write_between(start: Path, end: Path, output: Path, shares: list[float]) -> None:
    """Write the folder of trained parts between two others.

    Raises:
        UsageError: A folder lacks a file, or `output` is there already.
        ValueError: As of [`interpolate`].
    """
    read_recipe(start, ())
    recipe = read_recipe(end, ())
    check_folder("OUTPUT", output)
    if output.exists():
        raise UsageError(f"OUTPUT: {output} exists already; give a new folder")
    state = interpolate(read_trained_weights(start), read_trained_weights(end), shares)
    shutil.copytree(end, output, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt*"))
    save_file(state, output / TRAINED_WEIGHTS_NAME)
    recipe["encoder_shares"] = shares
    (output / RECIPE_NAME).write_text(json.dumps(recipe, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", metavar="START", type=Path, help="folder of trained parts")
    parser.add_argument("end", metavar="END", type=Path, help="folder of trained parts")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write, a new one")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        required=True,
        metavar="SHARE",
        help="from 0 (START) to 1 (END): one for each encoder layer, and one for norm and CTC head",
    )
    arguments = parser.parse_args()
    with errors_in_one_line("interpolate"):
        write_between(arguments.start, arguments.end, arguments.output, arguments.shares)


if __name__ == "__main__":
    main()

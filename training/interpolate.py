"""Interpolate two runs, layer by layer or as a whole: what was learned on synthesis, tempered; the mean of two stages.

    python -m training.interpolate START END OUTPUT --shares 0 0 0.2 0.5 0.8 1 1

START and END are folders of trained parts (training/train.py) of one recipe. Every encoder layer goes its share of the
way from START to END, the last share is that of what else the encoder has and of the CTC head; all other weights are
END's. A single share is that of all weights. What START has not trained, with share 0, stays as pre-trained and is left
out. Choose the shares on development data. A config can say the same of two of its stages:

    - name: ctc_more
      interpolate: {start: ctc_games, shares: [0.5]}  # what this stage leaves is the mean of both

Source: Wortsman et al. (2022), "Robust fine-tuning of zero-shot models".
"""

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME
from training.command_line import check_folder, errors_in_one_line
from training.evaluation_data import UsageError
from training.trained_parts import read_recipe, read_trained_weights

SHARES_FIELD = "interpolation_shares"  # of the recipe of interpolated parts
_LAYER = re.compile(r"^audio_tower\.(?:encoder\.)?layers\.(\d+)\.")  # of `audio_encoders.encoder_layers`


@dataclass(frozen=True)
class Interpolation:
    """What a stage leaves lies between the weights of the earlier stage `start` and its own; see the head of this file.

    What `start` has not trained counts with its weights at the begin of the run.
    """

    start: str
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        check_shares(self.shares)


def check_shares(shares: Sequence[float]) -> None:
    """Raises ValueError if they are not a list of numbers from 0 to 1, at least one."""
    if not isinstance(shares, list | tuple) or not shares or not all(_is_share(share) for share in shares):
        raise ValueError(f"shares: expected a list of numbers from 0 (start) to 1 (end), got {shares!r}.")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0.0 <= value <= 1.0


def check_number(shares: Sequence[float], num_layers: int) -> None:
    """Raises ValueError unless there is one for all weights, or one for each encoder layer and one for the rest."""
    if len(shares) not in (1, num_layers + 1):
        raise ValueError(
            f"shares: expected 1 of all weights or {num_layers + 1}, of {num_layers} encoder layers and of norm and "
            f"head, got {len(shares)}."
        )


def share_of(name: str, shares: Sequence[float]) -> float:
    """The share of the weight called `name`."""
    if len(shares) == 1:
        return shares[0]
    layer = _LAYER.match(name)
    if layer is not None:
        return shares[int(layer.group(1))]
    return shares[-1] if name.startswith(("audio_tower.", "ctc_head.")) else 1.0


def interpolate(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], shares: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The weights between `start` and `end`; see the head of this file.

    Raises:
        ValueError: If a share is not between 0 and 1, there are more or fewer than layers, a weight with a share of
            neither 0 nor 1 is not in `start`, or has another shape there.
    """
    check_shares(shares)
    layers = [int(layer.group(1)) for layer in map(_LAYER.match, end) if layer is not None]
    if layers:  # the last one is among them: layers are trained from the top
        check_number(shares, max(layers) + 1)
    result = {}
    for name, value in end.items():
        share = share_of(name, shares)
        if not value.is_floating_point():  # no weight, such as chains of labels
            result[name] = value
        elif name in start:
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
    write_state(state, output, recipe, shares)


def write_state(state: dict[str, torch.Tensor], folder: Path, recipe: dict[str, Any], shares: Sequence[float]) -> None:
    """Write interpolated weights, and the recipe that says so, into a folder of trained parts."""
    save_file(state, folder / TRAINED_WEIGHTS_NAME)
    (folder / RECIPE_NAME).write_text(json.dumps({**recipe, SHARES_FIELD: list(shares)}, indent=2) + "\n")


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
        help="from 0 (START) to 1 (END): one for each encoder layer, and one for norm and CTC head; or one for all",
    )
    arguments = parser.parse_args()
    with errors_in_one_line("interpolate"):
        write_between(arguments.start, arguments.end, arguments.output, arguments.shares)


if __name__ == "__main__":
    main()

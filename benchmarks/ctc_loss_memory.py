"""Peak memory and time of the CTC loss over the vocabulary of a language model, forward and backward, one thread.

    python -m benchmarks.ctc_loss_memory [--labels 151936] [--frames 750] [--utterances 4] [--width 288]

Each measurement is a process of its own: the largest resident set (`ru_maxrss`) of the whole step beyond what is
resident before it, that is beyond features, head and interpreter. Part of it is the gradient of the head. *usual*: a
linear layer, `log_softmax` and `F.ctc_loss`. *linear_ctc_loss*: what the model uses. Prints a Markdown table.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

from hf_speechllm.ctc_loss import linear_ctc_loss

SYSTEMS = ("usual", "linear_ctc_loss")
MIB = 1 << 20


def usual_loss(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, lens: Tensor, blank_id: int) -> Tensor:
    """The same loss from the log-probabilities [B, T, A]."""
    log_probs = torch.nn.functional.linear(features, weight, bias).float().log_softmax(-1)
    target_lens = torch.full((len(targets),), targets.shape[1])
    return torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1), targets, lens, target_lens, blank=blank_id, reduction="sum", zero_infinity=True
    )


def measure(system: str, sizes: argparse.Namespace) -> dict[str, float]:
    """Peak MiB, CPU seconds and loss of one step in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, sizes.dtype)
    features = torch.randn(sizes.utterances, sizes.frames, sizes.width, dtype=dtype).requires_grad_()
    weight = (0.05 * torch.randn(sizes.labels + 1, sizes.width)).to(dtype).requires_grad_()
    bias = torch.zeros(sizes.labels + 1, dtype=dtype).requires_grad_()
    targets = torch.randint(sizes.labels, (sizes.utterances, sizes.targets))
    lens = torch.full((sizes.utterances,), sizes.frames)
    loss_of = usual_loss if system == "usual" else linear_ctc_loss
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start_s = time.process_time()
    loss = loss_of(features, weight, bias, targets, lens, blank_id=sizes.labels)
    loss.backward()
    seconds = time.process_time() - start_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    return {"peak_mib": peak_mib, "seconds": seconds, "loss": loss.item()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--labels", type=int, default=151_936, metavar="N", help="CTC labels without the blank (default: %(default)s)")
    add("--frames", type=int, default=750, metavar="N", help="frames of each utterance (default: %(default)s)")
    add("--utterances", type=int, default=4, metavar="N", help="utterances of the batch (default: %(default)s)")
    add("--width", type=int, default=288, metavar="N", help="of the encoder (default: %(default)s)")
    add("--targets", type=int, default=60, metavar="N", help="labels of each transcript (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of features and head (default: %(default)s)",
    )
    add("--system", choices=SYSTEMS, help="measure this one here and print JSON (default: a table of all)")
    arguments = parser.parse_args()
    if arguments.system is not None:
        print(json.dumps(measure(arguments.system, arguments)))
        return
    from training.command_line import check_at_least_one, errors_in_one_line  # memory that is not to be measured

    with errors_in_one_line("ctc_loss_memory"):
        check_at_least_one(arguments, "labels", "frames", "utterances", "width", "targets")
    count = arguments.utterances * arguments.frames * (arguments.labels + 1)
    print(f"logits in float32: {4 * count / MIB:.0f} MiB; ", end="")
    print(f"gradient of the head in float32: {4 * arguments.width * (arguments.labels + 1) / MIB:.0f} MiB\n")
    print("| system | peak MiB | CPU s | loss, nats |\n|:--|--:|--:|--:|")
    for system in SYSTEMS:
        command = [sys.executable, "-m", "benchmarks.ctc_loss_memory", *sys.argv[1:], "--system", system]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {system} | {result['peak_mib']:.0f} | {result['seconds']:.1f} | {result['loss']:.2f} |", flush=True)


if __name__ == "__main__":
    main()

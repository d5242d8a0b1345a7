"""What joint CTC decoding costs beside plain beam search: the default model on the samples, one thread.

    python -m benchmarks.joint_decoding [--num-beams 4] [--repeats 5]

Both searches make the same number of steps (`min_new_tokens = max_new_tokens`), in turns, on the same encoded audio, so
that the difference is the CTC scorer and its logits processor. The share spent inside the processor is measured too.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_speechllm
from hf_speechllm.audio import load_audio
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor
from training.command_line import check_at_least_one, errors_in_one_line, loading

SAMPLES = Path(__file__).parent.parent / "samples"


class _Stopwatch:
    """Seconds spent in `CTCPrefixLogitsProcessor.__call__` while it is installed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._call = CTCPrefixLogitsProcessor.__call__

    def __enter__(self) -> "_Stopwatch":
        call = self._call

        def timed(processor: CTCPrefixLogitsProcessor, *args: torch.Tensor) -> torch.Tensor:
            start = time.perf_counter()
            scores = call(processor, *args)
            self.seconds += time.perf_counter() - start
            return scores

        CTCPrefixLogitsProcessor.__call__ = timed
        return self

    def __exit__(self, *error: object) -> None:
        CTCPrefixLogitsProcessor.__call__ = self._call


def measure(model: torch.nn.Module, inputs: dict[str, torch.Tensor], options: dict, ctc_weight: float) -> tuple:
    """Seconds of one `generate`, and of the CTC processor within."""
    with _Stopwatch() as stopwatch:
        start = time.perf_counter()
        model.generate(**inputs, **options, ctc_weight=ctc_weight)
        return time.perf_counter() - start, stopwatch.seconds


def search_parser(description: str, *, num_beams: int, repeats: int) -> argparse.ArgumentParser:
    """The parser of a benchmark of searches, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or Hub id of a speech LLM (default: the model of this package)")
    add("--num-beams", type=int, default=num_beams, metavar="N", help="width of the search (default: %(default)s)")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens that are written (default: %(default)s)")
    add("--repeats", type=int, default=repeats, metavar="N", help="runs, whose median counts (default: %(default)s)")
    return parser


def main() -> None:
    """Command line."""
    parser = search_parser(__doc__, num_beams=4, repeats=5)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: %(default)s)")
    arguments = parser.parse_args()
    with errors_in_one_line("joint_decoding"):
        check_at_least_one(arguments, "num_beams", "new_tokens", "repeats", "threads")
        with loading("--model", arguments.model):
            folder = arguments.model or hf_speechllm.default_model()
            model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
            processor = AutoProcessor.from_pretrained(folder)
    torch.set_num_threads(arguments.threads)
    steps = arguments.new_tokens
    options = {
        "num_beams": arguments.num_beams,
        "min_new_tokens": steps,
        "max_new_tokens": steps,
        "length_penalty": 0.0,
        "early_stopping": "never",
    }
    print("| clip | seconds of audio | joint / plain beam search | share of CTC |\n|---|---|---|---|")
    ratios = []
    for path in sorted(SAMPLES.glob("*.flac")):
        waveform = load_audio(str(path), processor.sampling_rate)
        inputs = dict(processor(waveform, sampling_rate=processor.sampling_rate))
        measure(model, inputs, options, 0.3)  # warm-up
        plain, joint, shares = [], [], []
        for _ in range(arguments.repeats):
            plain.append(measure(model, inputs, options, 0.0)[0])
            seconds, in_ctc = measure(model, inputs, options, 0.3)
            joint.append(seconds)
            shares.append(in_ctc / seconds)
        ratio = statistics.median(joint) / statistics.median(plain)
        ratios.append(ratio)
        duration_s = len(waveform) / processor.sampling_rate
        print(f"| {path.stem} | {duration_s:.1f} | {ratio:.3f} | {100 * statistics.median(shares):.1f} % |", flush=True)
    print(f"| median | | {statistics.median(ratios):.3f} | |")


if __name__ == "__main__":
    main()

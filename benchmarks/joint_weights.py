"""What joint decoding takes with the weights in float32 or bfloat16, the LoRA beside them or added to them.

    OMP_NUM_THREADS=1 python -m benchmarks.joint_weights [--num-beams 8] [--repeats 3]

The default model on the samples. All four variants are in one process and take turns, clip by clip, since a processor
is faster in one minute than in the next; all make the same number of steps. Prints a Markdown table of CPU times.
"""

import itertools
import statistics
import time

import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_speechllm
from benchmarks.joint_decoding import SAMPLES, search_parser
from hf_speechllm.audio import load_audio
from training.command_line import check_at_least_one, errors_in_one_line, loading


def variants(folder: str) -> dict[str, torch.nn.Module]:
    """The model by the title of its row."""
    models = {}
    for dtype, is_merged in itertools.product(("float32", "bfloat16"), (False, True)):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=dtype).eval()
        if is_merged:
            model.merge_adapter()
        models[f"{dtype}, LoRA {'added to the weights' if is_merged else 'beside the weights'}"] = model
    return models


def seconds_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor], options: dict) -> float:
    """CPU seconds of one joint search."""
    start = time.process_time()
    model.generate(**inputs, **options)
    return time.process_time() - start


def main() -> None:
    """Command line."""
    arguments = search_parser(__doc__, num_beams=8, repeats=3).parse_args()
    with errors_in_one_line("joint_weights"):
        check_at_least_one(arguments, "num_beams", "new_tokens", "repeats")
        with loading("--model", arguments.model):
            folder = arguments.model or hf_speechllm.default_model()
            models, processor = variants(folder), AutoProcessor.from_pretrained(folder)
    steps = arguments.new_tokens
    options = {"num_beams": arguments.num_beams, "min_new_tokens": steps, "max_new_tokens": steps, "ctc_weight": 0.3}
    waveforms = [load_audio(str(path), processor.sampling_rate) for path in sorted(SAMPLES.glob("*.flac"))]
    batches = [dict(processor(waveform, sampling_rate=processor.sampling_rate)) for waveform in waveforms]
    times: dict[str, list[float]] = {title: [] for title in models}
    for repeat, inputs in itertools.product(range(arguments.repeats + 1), batches):
        for title, model in models.items():
            seconds = seconds_of(model, inputs, options)
            if repeat > 0:  # the first round warms up
                times[title].append(seconds)
    print("| weights | ms a step | relative |\n|:--|--:|--:|")
    first = statistics.median(next(iter(times.values())))
    for title, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {title} | {1e3 * median / steps:.0f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()

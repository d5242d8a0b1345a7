"""Error rates of a speech recognition model on a manifest, in one or several decoding modes.

    python -m training.evaluate_asr MANIFEST.jsonl --model MODEL --mode ctc_greedy --mode llm --mode joint

MODEL is a Hub id, a folder, a folder of trained parts (a checkpoint of training/train.py), or nothing for the default
model. References and hypotheses are compared after Whisper's English normaliser.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutomaticSpeechRecognitionPipeline, pipeline

import hf_speechllm
from hf_speechllm.assembly import RECIPE_NAME, load_trained_parts
from hf_speechllm.metrics import WordErrors, bootstrap_wer_interval, normalize_english, word_errors
from training.data import ManifestDataset, read_manifests

# Options of `generate` for each mode; "joint" is what the model's own generation_config says.
MODES: dict[str, dict[str, Any]] = {"ctc_greedy": {"mode": "ctc_greedy"}, "llm": {"ctc_weight": 0.0}, "joint": {}}


def load_pipeline(model: str | None, device: str) -> AutomaticSpeechRecognitionPipeline:
    """The recogniser for `model`; see the head of this file."""
    if model is None:
        model = hf_speechllm.default_model()
    if (Path(model) / RECIPE_NAME).is_file():
        speech_llm, processor = load_trained_parts(model)
        return pipeline(
            "automatic-speech-recognition",
            model=speech_llm,
            tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor,
            device=device,
        )
    return pipeline("automatic-speech-recognition", model=model, device=device)


def transcribe(
    recogniser: AutomaticSpeechRecognitionPipeline,
    dataset: ManifestDataset,
    options: dict[str, Any],
    batch_size: int,
    name: str,
) -> tuple[list[str], float]:
    """Texts in the order of the manifest and the seconds it took, one warm-up utterance excluded."""
    rate = dataset.sampling_rate
    order = sorted(range(len(dataset)), key=lambda index: -dataset.entries[index]["duration"])
    inputs = ({"raw": dataset[index]["waveform"], "sampling_rate": rate} for index in order)
    recogniser({"raw": dataset[order[-1]]["waveform"], "sampling_rate": rate}, generate_kwargs=options)
    texts = [""] * len(order)
    start = time.perf_counter()
    outputs = recogniser(inputs, batch_size=batch_size, generate_kwargs=options)
    for index, output in zip(order, tqdm(outputs, total=len(order), desc=name, leave=False), strict=True):
        texts[index] = output["text"]
    return texts, time.perf_counter() - start


def figures(references: list[str], hypotheses: list[str], duration_s: float, seconds: float) -> dict[str, float]:
    """All figures of one mode; rates in percent of the reference words or characters."""
    errors: WordErrors = word_errors(references, hypotheses)
    low, high = bootstrap_wer_interval(references, hypotheses)
    counts = {name: getattr(errors, name) for name in ("substitutions", "deletions", "insertions")}
    return {
        "wer": 100 * errors.wer,
        "wer_low": 100 * low,
        "wer_high": 100 * high,
        "cer": 100 * errors.cer,
        **{name: 100 * count / errors.reference_words for name, count in counts.items()},
        "rtfx": duration_s / seconds,
        "utterances": len(references),
        "duration_min": duration_s / 60,
    }


COLUMNS = f"{'mode':<12} {'WER':>6}  {'95 % interval':>14} {'CER':>6} {'sub':>6} {'del':>6} {'ins':>6} {'RTFx':>7}"
ROW = (
    "{mode:<12} {wer:6.2f}  [{wer_low:5.2f}, {wer_high:5.2f}] {cer:6.2f} {substitutions:6.2f} {deletions:6.2f} "
    "{insertions:6.2f} {rtfx:7.1f}"
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="JSONL manifest")
    parser.add_argument("--model", help="the default model if left out")
    parser.add_argument("--mode", action="append", choices=sorted(MODES), help="repeatable; joint by default")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, help="use only the first utterances")
    parser.add_argument("--generate", default="{}", help="further options of generate, as JSON")
    parser.add_argument("--output", type=Path, help="write hypotheses as JSONL, one file per mode: OUTPUT.MODE.jsonl")
    parser.add_argument("--results", type=Path, help="append the figures as JSONL, for training/model_card.py")
    parser.add_argument("--name", help="of the data set in --results; by default that of the manifest")
    arguments = parser.parse_args()

    recogniser = load_pipeline(arguments.model, arguments.device)
    entries = read_manifests([arguments.manifest.name], arguments.manifest.parent)[: arguments.limit]
    dataset = ManifestDataset(entries, recogniser.feature_extractor.sampling_rate)
    references = [normalize_english(entry["text"]) for entry in entries]
    duration_s = sum(entry["duration"] for entry in entries)
    print(
        f"{arguments.manifest.name}: {len(entries)} utterances, {duration_s / 60:.1f} min; percent, Whisper normaliser"
    )
    print(COLUMNS)
    for mode in arguments.mode or ["joint"]:
        options = {**json.loads(arguments.generate), **MODES[mode]}
        texts, seconds = transcribe(recogniser, dataset, options, arguments.batch_size, mode)
        row = figures(references, [normalize_english(text) for text in texts], duration_s, seconds)
        print(ROW.format(mode=mode, **row), flush=True)
        if arguments.results is not None:
            name = arguments.name or arguments.manifest.stem
            with open(arguments.results, "a") as file:
                file.write(json.dumps({"dataset": name, "mode": mode, "options": options, **row}) + "\n")
        if arguments.output is not None:
            with open(f"{arguments.output}.{mode}.jsonl", "w") as file:
                for entry, text in zip(entries, texts, strict=True):
                    file.write(json.dumps({**entry, "pred_text": text}) + "\n")


if __name__ == "__main__":
    main()

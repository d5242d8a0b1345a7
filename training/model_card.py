"""Write the card of a model from measured figures: nothing in it is typed by hand.

    python -m training.model_card NAME --parts FOLDER --results results.jsonl --output model_cards/NAME.md

FOLDER holds the trained parts (training/train.py), results.jsonl is what training/evaluate_asr.py --results wrote.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME
from hf_speechllm.base_models import BASE_MODELS
from hf_speechllm.configuration_speechllm import SpeechLLMConfig

MODE_NAMES = {
    "ctc_greedy": "CTC head alone, greedy",
    "llm": "speech LLM alone",
    "joint": "speech LLM and CTC jointly",
    "ctc_beam": "CTC head alone, beam search",
    "rescoring": "CTC N-best list rescored by the plain LLM",
    "delayed_fusion": "CTC with the plain LLM, delayed fusion",
    "label_fusion": "CTC with the plain LLM, label by label",
}

TEMPLATE = """---
{metadata}
---

# {name}

English speech recognition with a speech LLM: the acoustic encoder of {audio_model}, a `{projector}` projector
and {language_model}, with a CTC head of {ctc_vocab_size} labels for joint decoding.
Text is lower-case without punctuation, numbers as words.

```python
import hf_speechllm
from transformers import pipeline

transcriber = pipeline("automatic-speech-recognition", model={load})
print(transcriber("speech.flac")["text"])
```

## Results

Percent of the reference words, after Whisper's English normaliser (not the Open ASR Leaderboard's), with a bootstrap
95 % interval over utterances. RTFx: seconds of audio per second, batches of 8, on the machine that measured the errors.

{table}

None of these recordings was used for training or tuning. Base models named `base:...` in the recipe come from packages
that hold them quantised (Moonshine tiny in 8 bit, SmolLM2 in 4 bit): their weights are not quite those of the Hub.

## Training

Synthetic speech only. {trained} million parameters were trained ({parts});
the rest are those of the base models. The recipe is `training/configs/{config_file}`.{interpolation}

## Decoding

```json
{generation}
```
"""


def base_name(name: str) -> tuple[str, str]:
    """Hub id and licence of a recipe's model."""
    if name.startswith("base:"):
        base = BASE_MODELS[name.removeprefix("base:")]
        return base.hub_id, base.license
    return name, "other"


def mode_name(mode: str) -> str:
    """A mode in words; one that has none here by its name."""
    return MODE_NAMES.get(mode, mode)


def decoding(row: dict[str, Any]) -> str:
    """How the figures of a row were decoded: the mode, and options other than the model's own."""
    implied = {"mode", "ctc_weight"}
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items() if name not in implied)
    return mode_name(row["mode"]) + (f" ({options})" if options else "")


def results_table(results: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| data | decoding | WER | 95 % interval | CER | substitutions | deletions | insertions | RTFx |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        rates = " | ".join(f"{row[name]:.2f}" for name in ("cer", "substitutions", "deletions", "insertions"))
        lines.append(
            f"| {row['dataset']} ({row['utterances']} utterances, {row['duration_min']:.1f} min) "
            f"| {decoding(row)} | **{row['wer']:.2f}** | {row['wer_low']:.2f} to {row['wer_high']:.2f} "
            f"| {rates} | {row['rtfx']:.1f} |"
        )
    return "\n".join(lines)


def trained_parts(folder: Path) -> tuple[float, str]:
    """Millions of trained parameters, and the parts of the model that they belong to."""
    sizes: dict[str, int] = {}
    with safe_open(folder / TRAINED_WEIGHTS_NAME, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = "LoRA" if "lora_" in name else name.split(".")[0]
            shape = file.get_slice(name).get_shape()
            count = 1
            for size in shape:
                count *= size
            sizes[part] = sizes.get(part, 0) + count
    return sum(sizes.values()) / 1e6, ", ".join(f"{part} {size / 1e6:.2f} M" for part, size in sorted(sizes.items()))


def write_card(name: str, parts: Path, results: list[dict[str, Any]], config_file: str, load: str) -> str:
    """The card as Markdown."""
    recipe = json.loads((parts / RECIPE_NAME).read_text())
    config = SpeechLLMConfig.from_pretrained(parts)
    audio_model, _ = base_name(recipe["audio_model"])
    language_model, licence = base_name(recipe["language_model"])
    evaluations = [
        EvalResult(
            task_type="automatic-speech-recognition",
            # Results are grouped by the type of their data set.
            dataset_type=re.sub(r"[^a-z0-9]+", "-", row["dataset"].lower()),
            dataset_name=row["dataset"],
            metric_type="wer",
            metric_value=round(row["wer"], 2),
            metric_name=f"WER, {mode_name(row['mode'])}",
        )
        for row in results
    ]
    metadata = ModelCardData(
        language="en",
        license=licence.lower(),
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["speech-llm", "ctc", "hf_speechllm"],
        base_model=[audio_model, language_model],
        model_name=name,
        eval_results=evaluations,
    )
    count, description = trained_parts(parts)
    shares = recipe.get("encoder_shares")
    interpolation = (
        f"\nThe encoder lies between two of its stages (`training/interpolate.py`, shares {shares})." if shares else ""
    )
    return TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=name,
        audio_model=audio_model,
        language_model=language_model,
        projector=config.projector,
        ctc_vocab_size=config.ctc_vocab_size,
        load=load,
        table=results_table(results),
        trained=f"{count:.1f}",
        parts=description,
        config_file=config_file,
        interpolation=interpolation,
        generation=(parts / "generation_config.json").read_text().strip(),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--config-file", default="tiny_en.yaml", help="name of the recipe in training/configs")
    parser.add_argument("--load", default="hf_speechllm.default_model()", help="Python expression of the model to load")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    card = write_card(arguments.name, arguments.parts, results, arguments.config_file, arguments.load)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(card)


if __name__ == "__main__":
    main()

"""Write the card of a model from measured figures and from its own files; what nobody measured is left out.

    python -m training.model_card NAME --parts FOLDER --results results.jsonl --output model_cards/NAME.md

FOLDER holds the trained parts (training/train.py), results.jsonl is what training/evaluate_asr.py --results wrote.
`training/publish.py` writes the card of a repository on the Hub in the same way.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME
from hf_speechllm.base_models import BASE_MODELS
from hf_speechllm.configuration_speechllm import SpeechLLMConfig

TASK = "automatic-speech-recognition"
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

Speech recognition with a speech LLM: the acoustic encoder of {audio_model}, a `{projector}` projector
and {language_model}{ctc}.

```python
{usage}
print(transcriber("speech.flac")["text"])
```
{requirements}{results}
## Training

{training}

## Decoding

```json
{generation}
```

## Licence

{license}. Its weights derive from those of {bases}; their licences apply as well.
"""

RESULTS = """
## Results

Percent of the reference words, after Whisper's English normaliser (not the Open ASR Leaderboard's), with a bootstrap
95 % interval over utterances. RTFx: seconds of audio per second, on the machine that measured the errors.

{table}
"""

QUANTISED = """
The base models come from packages that hold them quantised (Moonshine in 8 bit, SmolLM2 in 4 bit): their weights are
not quite those of the Hub."""


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: title of the card, and model name of the metadata.
        usage: Python source that defines `transcriber`.
        config: of the model.
        generation_config: JSON of the decoding options that are stored with the model.
        audio_model, language_model: as a recipe names them, Hub id or `base:NAME`.
        license: identifier of the Hub, such as "apache-2.0"; None for that of the language model.
        trained_parameters: number by part of the model; None if it is not known what was trained.
        total_parameters: None if not counted.
        training: what was learned from what, in words; the caller has to know.
        recipe_notes: further sentences on the training that follow from the files.
        requirements: packages that the code in the repository imports; empty when the code is not in it.
        language: code of what is spoken.
    """

    name: str
    usage: str
    config: SpeechLLMConfig
    generation_config: str
    audio_model: str
    language_model: str
    license: str | None = None
    trained_parameters: dict[str, int] | None = None
    total_parameters: int | None = None
    training: str = ""
    recipe_notes: Sequence[str] = ()
    requirements: Sequence[str] = ()
    language: str = "en"


def base_name(name: str) -> tuple[str, str | None]:
    """Hub id and licence of a recipe's model; the licence is None where it is not known here."""
    if name.startswith("base:"):
        base = BASE_MODELS[name.removeprefix("base:")]
        return base.hub_id, base.license
    return name, next((base.license for base in BASE_MODELS.values() if base.hub_id == name), None)


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


def trained_parameters(folder: Path) -> dict[str, int]:
    """Number of trained parameters of a folder of trained parts, by part of the model."""
    sizes: dict[str, int] = {}
    with safe_open(folder / TRAINED_WEIGHTS_NAME, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = "LoRA" if "lora_" in name else name.split(".")[0]
            sizes[part] = sizes.get(part, 0) + math.prod(file.get_slice(name).get_shape())
    return sizes


def subject_of_parts(
    name: str, usage: str, parts: Path, training: str = "", config_file: str | None = None, **known: Any
) -> Subject:
    """The subject of a folder of trained parts.

    Args:
        name, usage, training: as in [`Subject`].
        parts: the folder.
        config_file: name of the training's configuration in `training/configs`, to refer to.
        known: other attributes of [`Subject`].
    """
    recipe = json.loads((parts / RECIPE_NAME).read_text())
    notes = [f"The recipe is `training/configs/{config_file}`."] if config_file else []
    if shares := recipe.get("encoder_shares"):
        notes.append(f"The encoder lies between two of its stages (`training/interpolate.py`, shares {shares}).")
    return Subject(
        name=name,
        usage=usage,
        config=SpeechLLMConfig.from_pretrained(parts),
        generation_config=(parts / "generation_config.json").read_text().strip(),
        audio_model=recipe["audio_model"],
        language_model=recipe["language_model"],
        trained_parameters=trained_parameters(parts),
        training=training,
        recipe_notes=notes,
        **known,
    )


def training_section(subject: Subject) -> str:
    """What is known about the training, a sentence each line."""
    lines = [subject.training] if subject.training else []
    if subject.trained_parameters is not None:
        count = sum(subject.trained_parameters.values()) / 1e6
        parts = ", ".join(f"{part} {size / 1e6:.2f} M" for part, size in sorted(subject.trained_parameters.items()))
        lines.append(f"{count:.1f} million parameters were trained ({parts});\nthe rest are those of the base models.")
    if subject.total_parameters is not None:
        lines.append(f"The model has {subject.total_parameters / 1e6:.1f} million parameters in total.")
    text = "\n".join([*lines, *subject.recipe_notes]) or "Not described."
    is_quantised = any(name.startswith("base:") for name in (subject.audio_model, subject.language_model))
    return text + (QUANTISED if is_quantised else "")


def write_card(subject: Subject, results: list[dict[str, Any]]) -> str:
    """The card as Markdown, with the figures also as `model-index`.

    Raises:
        ValueError: the licence of the language model is not known and none is given.
    """
    bases = [base_name(name) for name in (subject.audio_model, subject.language_model)]
    license_id = subject.license or bases[1][1]
    if license_id is None:
        raise ValueError(f"license: that of {bases[1][0]} is not known here; give the one of the model")
    metadata = ModelCardData(
        language=subject.language,
        license=license_id,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["speech-llm", "ctc", "hf_speechllm"],
        base_model=[hub_id for hub_id, _ in bases],
        # An index without results is refused.
        model_name=subject.name if results else None,
        eval_results=[index_entry(row) for row in results] or None,
    )
    requirements = f"\nThe code in this repository needs `{' '.join(['pip install', *subject.requirements])}`.\n"
    ctc_labels = subject.config.ctc_vocab_size
    return TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=subject.name,
        audio_model=bases[0][0],
        language_model=bases[1][0],
        projector=subject.config.projector,
        ctc=f", with a CTC head of {ctc_labels} labels for joint decoding" if ctc_labels else "",
        usage=subject.usage,
        requirements=requirements if subject.requirements else "",
        results=RESULTS.format(table=results_table(results)) if results else "",
        training=training_section(subject),
        generation=subject.generation_config,
        license=license_id,
        bases=" and ".join(f"{hub_id} ({known or 'see there'})" for hub_id, known in bases),
    )


def index_entry(row: dict[str, Any]) -> EvalResult:
    """The word error rate of a line of results for the `model-index`."""
    return EvalResult(
        task_type=TASK,
        # Results are grouped by the type of their data set.
        dataset_type=re.sub(r"[^a-z0-9]+", "-", row["dataset"].lower()),
        dataset_name=row["dataset"],
        metric_type="wer",
        metric_value=round(row["wer"], 2),
        metric_name=f"WER, {mode_name(row['mode'])}",
    )


def usage_with_package(model: str) -> str:
    """Python source for a model that is loaded with this package; `model` is an expression."""
    return f'import hf_speechllm\nfrom transformers import pipeline\n\ntranscriber = pipeline("{TASK}", model={model})'


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--config-file", help="name of the recipe in training/configs, to refer to")
    parser.add_argument("--load", default="hf_speechllm.default_model()", help="Python expression of the model to load")
    parser.add_argument("--training", default="", help="what was learned from what, a sentence or several")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    subject = subject_of_parts(
        arguments.name,
        usage_with_package(arguments.load),
        arguments.parts,
        arguments.training,
        arguments.config_file,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(write_card(subject, results))


if __name__ == "__main__":
    main()

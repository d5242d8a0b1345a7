"""Write the card of a model from measured figures and from its own files; what nobody measured is left out.

    python -m training.model_card NAME --parts FOLDER --results results.jsonl --output model_cards/NAME.md

FOLDER holds the trained parts (training/train.py), results.jsonl is what training/evaluate_asr.py --results wrote.
`training/publish.py` writes the card of a repository on the Hub in the same way.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_speechllm.base_models import BASE_MODELS
from hf_speechllm.configuration_speechllm import SpeechLLMConfig
from hf_speechllm.transcription import DECODING_MODES
from training.command_line import errors_in_one_line, make_parent
from training.evaluation_data import UsageError, is_number, read_json_lines, read_json_object
from training.interpolate import SHARES_FIELD
from training.trained_parts import read_recipe, weight_shapes

TASK = "automatic-speech-recognition"
# What a card shows of a line of results.
RATE_FIELDS = ("wer", "wer_low", "wer_high", "cer", "substitutions", "deletions", "insertions", "rtfx")
RESULT_FIELDS = ("dataset", "mode", "options", "utterances", "duration_min", *RATE_FIELDS)

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
{combination}
## Licence

{license}. Its weights derive from those of {bases}; their licences apply as well.
"""

RESULTS = """
## Results

Percent of the reference words, after Whisper's English normaliser (not the Open ASR Leaderboard's), with a bootstrap
95 % interval over utterances. RTFx: seconds of audio per second, on the machine that measured the errors.

{table}
"""

MERGED = """
The LoRA is added to the weights, so the plain language model is not in this repository. The modes `rescoring`,
`delayed_fusion` and `label_fusion` combine CTC with that model: give it with them, `lm="{language_model}"`.
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
        is_merged: whether the LoRA of the language model is added to its weights.
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
    is_merged: bool = False
    requirements: Sequence[str] = ()
    language: str = "en"


def base_name(name: str) -> tuple[str, str | None]:
    """Hub id and licence of a recipe's model; the licence is None where it is not known here.

    Raises:
        UsageError: it is one of the base models, and there is no such one.
    """
    if name.startswith("base:"):
        base = BASE_MODELS.get(name.removeprefix("base:"))
        if base is None:
            raise UsageError(f"expected a Hub id, or base: and one of {', '.join(sorted(BASE_MODELS))}, got {name!r}")
        return base.hub_id, base.license
    return name, next((base.license for base in BASE_MODELS.values() if base.hub_id == name), None)


def mode_name(mode: str) -> str:
    """A mode in words; one that has none here by its name."""
    return DECODING_MODES.get(mode, mode)


def read_results(path: Path) -> list[dict[str, Any]]:
    """What `evaluate_asr --results` wrote; lines without a word error rate are left out.

    Raises:
        UsageError: the file is missing or malformed.
    """
    rows = []
    for row in read_json_lines(path, RESULT_FIELDS):
        if row["wer"] is None:
            continue
        wrong = [name for name in ("utterances", "duration_min", *RATE_FIELDS) if not is_number(row[name])]
        if wrong or not isinstance(row["options"], dict):
            name = wrong[0] if wrong else "options"
            expected = "a number" if wrong else "an object"
            raise UsageError(f"{path}, {row['dataset']} {row['mode']}: {name}: expected {expected}, got {row[name]!r}")
        rows.append(row)
    return rows


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
    for name, shape in weight_shapes(folder).items():
        part = "LoRA" if "lora_" in name else name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + math.prod(shape)
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

    Raises:
        UsageError: a file of the folder is not there, or is no such file.
    """
    recipe = read_recipe(parts)
    for file in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        read_json_object(parts / file)
    notes = [f"The recipe is `training/configs/{config_file}`."] if config_file else []
    if shares := recipe.get(SHARES_FIELD):
        notes.append(f"The weights lie between those of two stages (`training/interpolate.py`, shares {shares}).")
    return Subject(
        name=name,
        usage=usage,
        config=SpeechLLMConfig.from_pretrained(parts),
        generation_config=(parts / GENERATION_CONFIG_NAME).read_text().strip(),
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
        combination=MERGED.format(language_model=bases[1][0]) if subject.is_merged else "",
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
    add = parser.add_argument
    add("name", metavar="NAME", help="of the model, title of the card")
    add("--parts", type=Path, required=True, metavar="FOLDER", help="folder of trained parts")
    add("--results", type=Path, required=True, metavar="JSONL", help="what training.evaluate_asr --results wrote")
    add("--config-file", metavar="NAME", help="of the recipe in training/configs, to refer to (default: none)")
    add(
        "--load",
        default="hf_speechllm.default_model()",
        metavar="PYTHON",
        help="expression of the model in the card's example (default: %(default)s)",
    )
    add("--training", default="", metavar="TEXT", help="what was learned from what, a sentence or several")
    add(
        "--license",
        metavar="ID",
        help="of the model, such as apache-2.0 (default: that of its language model, if known)",
    )
    add("--output", type=Path, required=True, metavar="CARD.md", help="file to write")
    arguments = parser.parse_args()
    with errors_in_one_line("model_card"):
        results = read_results(arguments.results)
        subject = subject_of_parts(
            arguments.name,
            usage_with_package(arguments.load),
            arguments.parts,
            arguments.training,
            arguments.config_file,
            license=arguments.license,
        )
        card = write_card(subject, results)
        make_parent("--output", arguments.output)
        arguments.output.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()

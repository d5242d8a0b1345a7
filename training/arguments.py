"""Options of a training run: a YAML file with differences from the defaults below, one section per dataclass.

model: {...}        what is built (ModelArguments)
tuning: {...}       which parts learn, and how fast (TuningArguments)
data: {...}         what it learns from (DataArguments)
training: {...}     transformers' Seq2SeqTrainingArguments
stages:             run one after the other, each starts from the weights of the one before
  - name: ctc
    tuning: {...}   differences from the sections above, for this stage
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, HfArgumentParser, Seq2SeqTrainingArguments

from hf_speechllm.configuration_speechllm import SpeechLLMConfig
from hf_speechllm.generation_speechllm import OPTION_DEFAULTS


@dataclass
class ModelArguments:
    """What is built.

    Attributes:
        audio_model: Acoustic encoder: Hub id, folder, or `base:NAME` for one of `hf_speechllm.base_model`.
        language_model: Causal language model, likewise.
        ctc_units: CTC labels: `subset` (lower-case tokens of a byte-level BPE), `characters` (the shortest of them),
            `llm` (its whole vocabulary), `none`.
        ctc_subset_size: Number of labels of `subset`.
        llm_units: What the language model writes beside such CTC labels: `native` (its own tokens, each spelled by a
            chain of CTC labels) or `ctc` (just the CTC labels; its tokeniser is restricted to them).
        config: Values of `SpeechLLMConfig`: projector, downsampling, prompt_before, ...
    """

    audio_model: str = ""
    language_model: str = ""
    ctc_units: str = "subset"
    ctc_subset_size: int = 1000
    llm_units: str = "native"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class TuningArguments:
    """Which parts learn, and how.

    Attributes:
        encoder: `freeze` or `full`.
        encoder_layers: With `full`, how many of the top layers learn; the front end learns only if this is null.
        projector: `freeze` or `full`.
        ctc_head: `freeze` or `full`.
        llm: `freeze`, `lora` or `full`.
        encoder_learning_rate: Of the encoder's top layer; by default that of `training`.
        encoder_layer_decay: Factor on the learning rate per layer going down.
        llm_learning_rate: Of the language model or its LoRA; by default that of `training`.
        lora_r: Rank; lora_alpha: Scale; lora_dropout: Dropout on its input; lora_rslora: Scale by 1/sqrt(r).
        lora_targets: Regular expression of the linear layers, below `language_model`.
        ce_loss_weight: Of the cross-entropy; 0 skips the language model.
        ctc_loss_weight: Of the CTC loss; 0 skips it.
    """

    encoder: str = "freeze"
    encoder_layers: int | None = None
    projector: str = "full"
    ctc_head: str = "full"
    llm: str = "freeze"
    encoder_learning_rate: float | None = None
    encoder_layer_decay: float = 1.0
    llm_learning_rate: float | None = None
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_rslora: bool = False
    lora_targets: str = "q_proj|v_proj"
    ce_loss_weight: float = 1.0
    ctc_loss_weight: float = 0.5


@dataclass
class DataArguments:
    """What is learnt from.

    Attributes:
        train_manifests: JSONL manifests (`audio_filepath`, `text`, `duration`, optional `offset`), file names or
            patterns such as `speech/*.jsonl`, relative to `--data-dir`.
        eval_manifests: Name -> manifest, for the error rates while training.
        min_duration_s: Shorter utterances are left out. max_duration_s: Longer ones too.
        batch_duration_s: Utterances of a batch times the longest of them, at most.
        augment: Distort the waveforms on the fly (training/augment.py).
        max_eval_examples: Utterances of each evaluation manifest that are used, from the start.
    """

    train_manifests: list[str] = field(default_factory=list)
    eval_manifests: dict[str, str] = field(default_factory=dict)
    min_duration_s: float = 0.3
    max_duration_s: float = 30.0
    batch_duration_s: float = 120.0
    augment: bool = True
    max_eval_examples: int = 100


@dataclass
class Stage:
    """One stage of a run, with everything resolved."""

    name: str
    model: ModelArguments
    tuning: TuningArguments
    data: DataArguments
    training: Seq2SeqTrainingArguments
    generation: dict[str, Any]


_SECTIONS = {"model": ModelArguments, "tuning": TuningArguments, "data": DataArguments}
_TOP_LEVEL = {*_SECTIONS, "training", "generation", "stages"}


def load_stages(config_path: str | Path, output_dir: str | Path, overrides: list[str] | None = None) -> list[Stage]:
    """Read a run from YAML.

    Args:
        config_path: The YAML file.
        output_dir: Folder of the run; each stage writes into its own folder there.
        overrides: `section.key=value` pairs that win over the file in every stage, value in YAML.

    Raises:
        ValueError: For an unknown key, naming it, or a value of the wrong form.
    """
    run = _read_yaml(Path(config_path).read_text()) or {}
    _reject_unknown(run, _TOP_LEVEL, str(config_path))
    common = {name: run.get(name) or {} for name in (*_SECTIONS, "training", "generation")}
    raw_stages = run.get("stages") or [{"name": "main"}]
    names = [raw.get("name") for raw in raw_stages]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{config_path}: every stage needs a name of its own, got {names}.")
    stages = []
    for raw in raw_stages:
        _reject_unknown(raw, {*common, "name"} - {"model"}, f"stage {raw.get('name')!r} of {config_path}")
        merged = {name: {**common[name], **(raw.get(name) or {})} for name in common}
        for override in overrides or []:
            _apply_override(merged, override)
        _reject_unknown(
            merged["model"].get("config") or {}, set(SpeechLLMConfig.__annotations__), "section 'model', config"
        )
        _reject_unknown(merged["generation"], {*vars(GenerationConfig()), *OPTION_DEFAULTS}, "section 'generation'")
        parts = {name: _parse(cls, merged[name], name) for name, cls in _SECTIONS.items()}
        training = {"output_dir": str(Path(output_dir) / raw["name"]), **_TRAINING_DEFAULTS, **merged["training"]}
        stages.append(
            Stage(
                name=raw["name"],
                training=_parse(Seq2SeqTrainingArguments, training, "training"),
                generation=merged["generation"],
                **parts,
            )
        )
    return stages


_TRAINING_DEFAULTS = {
    "remove_unused_columns": False,
    "predict_with_generate": True,
    "save_strategy": "steps",
    "logging_steps": 20,
    "label_names": ["labels"],
    "use_cpu": not torch.cuda.is_available(),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats too: in YAML 1.1, `5e-4` without a point is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _reject_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {sorted(known)}.")


def _parse(cls: type, values: dict[str, Any], section: str) -> Any:
    try:
        return HfArgumentParser(cls).parse_dict(values, allow_extra_keys=False)[0]
    except (ValueError, TypeError) as error:
        raise ValueError(f"section {section!r}: {error}") from error


def _apply_override(merged: dict[str, dict[str, Any]], override: str) -> None:
    path, separator, value = override.partition("=")
    section, _, key = path.partition(".")
    if not separator or section not in merged or not key:
        raise ValueError(f"override {override!r}: expected SECTION.KEY=VALUE with a section of {sorted(merged)}.")
    merged[section][key] = _read_yaml(value)

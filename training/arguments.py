"""Options of a training run: a YAML file with differences from the defaults below, one section per dataclass.

model: {...}        what is built (ModelArguments)
tuning: {...}       which parts learn, and how fast (TuningArguments)
data: {...}         what it learns from (DataArguments)
training: {...}     transformers' Seq2SeqTrainingArguments
stages:             run one after the other, each starts from the weights of the one before
  - name: ctc
    tuning: {...}   differences from the sections above, for this stage
    interpolate: {...}  start, shares: what it leaves lies between an earlier stage and it (training/interpolate.py)
base: other.yaml    a file beside this one that this one changes: key by key, stages by their name
recipe: {...}       how the data are made, and what becomes of the trained model (training/recipe.py)
"""

import re
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import GenerationConfig, HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_speechllm.audio import one_line
from hf_speechllm.configuration_speechllm import SpeechLLMConfig
from hf_speechllm.generation_speechllm import OPTION_DEFAULTS
from training.augment import SAMPLING_RATE, AugmentOptions
from training.data_sources import SourceOptions
from training.interpolate import Interpolation
from training.row_reader import RowReader
from training.spec_augment import SpecAugmentOptions
from training.trained_parts import lora_options, parts_folder

Options = TypeVar("Options")


@dataclass
class ModelArguments:
    """What is built.

    Attributes:
        audio_model: Acoustic encoder: Hub id, folder, or `base:NAME` for one of `hf_speechllm.base_model`.
        language_model: Causal language model, likewise.
        trained_parts: Goes on from a model instead, and says all of what is built but the attention kernels: `default`
            (the default model), a stage's folder `final`, or what training/export.py writes. `tuning` takes the
            options of its LoRA.
        vocabulary: Tokeniser (training/train_vocabulary.py) in place of the language model's, which gets embeddings and
            output layer for it; they start at means of the old ones and are to be learnt (`llm_embeddings`).
        llm_init: `pretrained`, or `random`: the same architecture with fresh weights, as a control.
        ctc_units: CTC labels: `subset` (lower-case tokens of a byte-level BPE), `characters` (the shortest of them),
            `llm` (the whole vocabulary of the language model), `subwords` (those of `ctc_vocabulary`), `none`.
        ctc_subset_size: Number of labels of `subset`.
        ctc_vocabulary: Tokeniser whose tokens are the labels of `subwords`.
        llm_units: What the language model writes beside such CTC labels: `native` (its own tokens, each spelled by a
            chain of CTC labels) or `ctc` (just the CTC labels; its tokeniser is restricted to them).
        attn_implementation: Attention kernels, as in transformers: `sdpa`, `eager`, `flash_attention_2`, ...; or for
            each part, `{audio_config: sdpa, text_config: eager}`. By default those that transformers chooses.
        config: Values of `SpeechLLMConfig`: interface, projector, downsampling, prompt_before, ...
    """

    audio_model: str = ""
    language_model: str = ""
    trained_parts: str | None = None
    vocabulary: str | None = None
    llm_init: str = "pretrained"
    ctc_units: str = "subset"
    ctc_subset_size: int = 1000
    ctc_vocabulary: str | None = None
    llm_units: str = "native"
    attn_implementation: dict[str, str] | str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class TuningArguments:
    """Which parts learn, and how.

    Attributes:
        encoder: `freeze`, `lora` or `full`.
        encoder_layers: How many of the top layers learn; with `full`, the front end learns only if this is null.
        projector: `freeze`, `lora` or `full`.
        cross_attention: `freeze` or `full`; of the gated layers, if `interface` is `cross_attention`.
        ctc_head: `freeze` or `full`.
        llm: `freeze`, `lora` or `full`.
        llm_embeddings: `freeze` or `full`: with `lora` or `freeze`, whether embeddings and output layer of the language
            model learn, as those of a new `vocabulary` have to.
        llm_frozen_dtype: Of the language model's linear layers that do not learn, here or in an earlier stage; all else
            stays in `float32`. With `bfloat16` they need half the memory, and the language model computes in mixed
            precision.
        encoder_learning_rate: Of the encoder's top layer; by default that of `training`.
        encoder_layer_decay: Factor on the learning rate per layer going down.
        llm_learning_rate: Of the language model or its LoRA; by default that of `training`.
        lora_r: Rank; lora_alpha: Scale; lora_dropout: Dropout on its input; lora_rslora: Scale by 1/sqrt(r).
        lora_targets: Regular expression of the linear layers of the language model. encoder_lora_targets: Of the
            encoder. projector_lora_targets: Of the projector.
        ce_loss_weight: Of the cross-entropy; 0 skips the language model.
        ctc_loss_weight: Of the CTC loss; 0 skips it.
    """

    encoder: str = "freeze"
    encoder_layers: int | None = None
    projector: str = "full"
    cross_attention: str = "full"
    ctc_head: str = "full"
    llm: str = "freeze"
    llm_embeddings: str = "freeze"
    llm_frozen_dtype: str = "float32"
    encoder_learning_rate: float | None = None
    encoder_layer_decay: float = 1.0
    llm_learning_rate: float | None = None
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_rslora: bool = False
    lora_targets: str = "q_proj|v_proj"
    encoder_lora_targets: str = "q_proj|v_proj"
    projector_lora_targets: str = "linear.*"
    ce_loss_weight: float = 1.0
    ctc_loss_weight: float = 0.5


@dataclass
class DataArguments:
    """What is learnt from.

    Attributes:
        train_manifests: JSONL manifests (`audio_filepath`, `text`, `duration`, optional `offset`), file names or
            patterns such as `speech/*.jsonl`, relative to `--data-dir`.
        train_sources: Further sources, one mapping each (`training.data_sources.SourceOptions`), e.g.
            `{path: openslr/librispeech_asr, name: clean, split: train.100, streaming: true}`. With a `weight` in each
            they are mixed, else concatenated. Streamed data has no epochs: `training.max_steps` is required.
        eval_manifests: Name -> manifest, for the error rates while training.
        eval_sources: Name -> source, likewise.
        min_duration_s: Shorter utterances are left out. max_duration_s: Longer ones too.
        batch_duration_s: Utterances of a batch times the longest of them, at most.
        shuffle_buffer: Utterances that each process and worker shuffles and sorts into batches, of streamed data.
        text_normalization: Of all transcripts: `none`, `lower`, `lower_no_punctuation`, `spoken_english` (numbers as
            words, only a-z and apostrophes) or `whisper_english`.
        bad_data: `refuse`: a row that cannot be learnt from ends the run, before it begins if it is one of a manifest
            and that shows without its audio; `skip`: it is reported and left out.
        empty_text: `bad`: an empty transcript is bad data; `keep`: it says that nothing is said.
        convert_audio: Resample other rates and average channels; else they are bad data.
        augment: Distort the waveforms on the fly (training/augment.py).
        augment_options: Differences from its `AugmentOptions`, e.g. `{speed_factors: [0.9, 1.0, 1.1]}`.
        spec_augment: Mask features, or waveforms of encoders that take these (training/spec_augment.py).
        spec_augment_options: Differences from its `SpecAugmentOptions`, e.g. `{schedule_steps: [0, 0, 0]}`.
        max_eval_examples: Utterances of each evaluation set that are used, from the start.
    """

    train_manifests: list[str] = field(default_factory=list)
    train_sources: list[dict[str, Any]] = field(default_factory=list)
    eval_manifests: dict[str, str] = field(default_factory=dict)
    eval_sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    min_duration_s: float = 0.3
    max_duration_s: float = 30.0
    batch_duration_s: float = 120.0
    shuffle_buffer: int = 1000
    text_normalization: str = "none"
    bad_data: str = "refuse"
    empty_text: str = "bad"
    convert_audio: bool = True
    augment: bool = True
    augment_options: dict[str, Any] = field(default_factory=dict)
    spec_augment: bool = False
    spec_augment_options: dict[str, Any] = field(default_factory=dict)
    max_eval_examples: int = 100

    def __post_init__(self) -> None:
        if self.bad_data not in ("refuse", "skip"):
            raise ValueError(f"bad_data must be 'refuse' or 'skip', got {self.bad_data!r}.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}.")
        # Now, not when the stage begins.
        RowReader(SAMPLING_RATE, self.text_normalization, self.convert_audio, self.empty_text)
        parse_options(AugmentOptions, self.augment_options, "augment_options")
        parse_options(SpecAugmentOptions, self.spec_augment_options, "spec_augment_options")
        for number, source in enumerate(self.train_sources, 1):
            SourceOptions.parse(source, f"train_sources, entry {number}")
        for name, source in self.eval_sources.items():
            SourceOptions.parse(source, f"eval_sources, {name}")


@dataclass
class Stage:
    """One stage of a run, with everything resolved; `effective` is the config that says so.

    `interpolate` is not part of it: the stage can be trained from that config alone, without the earlier one.
    """

    name: str
    model: ModelArguments
    tuning: TuningArguments
    data: DataArguments
    training: Seq2SeqTrainingArguments
    generation: dict[str, Any]
    interpolate: Interpolation | None
    effective: dict[str, Any]


_SECTIONS = {"model": ModelArguments, "tuning": TuningArguments, "data": DataArguments}
_TOP_LEVEL = {*_SECTIONS, "training", "generation", "stages", "base", "recipe"}


def load_stages(config_path: str | Path, output_dir: str | Path, overrides: list[str] | None = None) -> list[Stage]:
    """Read a run from YAML.

    Args:
        config_path: The YAML file.
        output_dir: Folder of the run; each stage writes into its own folder there.
        overrides: `section.key=value` pairs that win over the file in every stage, value in YAML.

    Raises:
        ValueError: For an unknown key, naming it, or a value of the wrong form.
    """
    return stages_of(read_run(Path(config_path)), str(config_path), output_dir, overrides)


def stages_of(
    run: dict[str, Any], config_path: str, output_dir: str | Path, overrides: list[str] | None = None
) -> list[Stage]:
    """The stages of a run that [`read_run`] has read; see [`load_stages`]."""
    common = {name: run.get(name) or {} for name in (*_SECTIONS, "training", "generation")}
    raw_stages = run.get("stages") or [{"name": "main"}]
    names = [raw.get("name") for raw in raw_stages]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{config_path}: every stage needs a name of its own, got {names}.")
    stages = []
    for raw in raw_stages:
        where = f"stage {raw['name']!r} of {config_path}"
        reject_unknown(raw, {*common, "name", "interpolate"} - {"model"}, where)
        merged = {name: {**common[name], **(raw.get(name) or {})} for name in common}
        for override in overrides or []:
            apply_override(merged, override)
        _resolve_trained_parts(merged)
        reject_unknown(
            merged["model"].get("config") or {}, set(SpeechLLMConfig.__annotations__), "section 'model', config"
        )
        reject_unknown(merged["generation"], {*vars(GenerationConfig()), *OPTION_DEFAULTS}, "section 'generation'")
        parts = {name: parse_section(cls, merged[name], name) for name, cls in _SECTIONS.items()}
        training = {**_TRAINING_DEFAULTS, **merged["training"]}
        effective = effective_config(parts, training)
        training = {"output_dir": str(Path(output_dir) / raw["name"]), **training}
        stages.append(
            Stage(
                name=raw["name"],
                training=parse_section(Seq2SeqTrainingArguments, training, "training"),
                generation=merged["generation"],
                interpolate=_interpolation(raw.get("interpolate"), [stage.name for stage in stages], where),
                effective={**effective, "generation": merged["generation"], "stages": [{"name": raw["name"]}]},
                **parts,
            )
        )
    return stages


def _interpolation(values: Any, earlier: list[str], where: str) -> Interpolation | None:
    if values is None:
        return None
    if not isinstance(values, dict) or values.keys() != {"start", "shares"}:
        raise ValueError(f"{where}, interpolate: expected {{start: STAGE, shares: [NUMBER, ...]}}, got {values!r}.")
    interpolation = parse_options(Interpolation, values, f"{where}, interpolate")
    if interpolation.start not in earlier:
        raise ValueError(
            f"{where}, interpolate.start: expected one of the earlier stages, {earlier}, got {interpolation.start!r}."
        )
    return interpolation


def _resolve_trained_parts(merged: dict[str, dict[str, Any]]) -> None:
    """Take the options of a LoRA from the trained parts that a run goes on from, where the config gives no others."""
    name = merged["model"].get("trained_parts")
    if name is None:
        return
    own = ("trained_parts", "attn_implementation")
    defaults = defaults_of("model")
    others = sorted(key for key, value in merged["model"].items() if key not in own and value != defaults.get(key))
    if others:
        raise ValueError(f"section 'model': {others[0]} is that of the trained_parts, {name!r}; leave it out.")
    merged["tuning"] = {**lora_options(parts_folder(name)), **merged["tuning"]}


def defaults_of(section: str) -> dict[str, Any]:
    """What the options of a section are where no config gives them."""
    if section != "training":
        return asdict(_SECTIONS[section]())
    own = {each.name: each.default for each in fields(Seq2SeqTrainingArguments) if each.default is not MISSING}
    return {**own, **_TRAINING_DEFAULTS}


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


def read_yaml(text: str) -> Any:
    """The value of a YAML text."""
    return yaml.load(text, Loader=_Loader)


def read_config(path: Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        values = read_yaml(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML ({one_line(error)}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections in YAML, got {values!r:.60}.")
    return values


def read_run(path: Path) -> dict[str, Any]:
    """The values of the file, laid over those of the one that it names as its `base`.

    Raises:
        ValueError: If it is no YAML file, or for an unknown section, naming it.
    """
    run = read_config(path)
    reject_unknown(run, _TOP_LEVEL, str(path))
    if "base" not in run:
        return run
    base = read_run(path.parent / run.pop("base"))
    stages = {stage.get("name"): stage for stage in base.get("stages") or []}
    for stage in run.pop("stages", None) or []:
        stages[stage.get("name")] = _overlay(stages.get(stage.get("name"), {}), stage)
    merged = _overlay(base, run)
    return {**merged, "stages": list(stages.values())} if stages else merged


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section and there key by key."""
    merged = dict(base)
    for name, value in changes.items():
        merged[name] = {**(base.get(name) or {}), **value} if isinstance(value, dict) else value
    return merged


def reject_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    """Raises ValueError for a key that is not among `known`."""
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {sorted(known)}.")


def parse_section(cls: type, values: dict[str, Any], section: str) -> Any:
    """The dataclass of a section; raises ValueError for an unknown key or a value of the wrong form."""
    where = f"section {section!r}"
    reject_unknown(values, {each.name for each in fields(cls) if each.init}, where)
    try:
        if not issubclass(cls, TrainingArguments):  # transformers converts those of its own
            check_types(cls, values)
        return HfArgumentParser(cls).parse_dict(values, allow_extra_keys=False)[0]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_types(cls: type, values: dict[str, Any]) -> None:
    """Raises TypeError for a value that is not of the type of its field in a dataclass; a whole number is a float."""
    for name, expected in typing.get_type_hints(cls).items():
        value = values.get(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        takes_float = expected is float or float in typing.get_args(expected)
        if name in values and not (is_whole and takes_float):
            try:
                type_validator(name, value, expected)
            except TypeError as error:
                shown = expected.__name__ if isinstance(expected, type) else expected
                raise TypeError(f"{name} must be of the type {shown}, got {value!r}.") from error


def effective_config(parts: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """The config with everything resolved: all options of our dataclasses, and what differs from transformers'."""
    return {**{name: asdict(part) for name, part in parts.items()}, "training": training}


def apply_override(merged: dict[str, dict[str, Any]], override: str) -> None:
    """Put `section.key=value`, value in YAML, into the sections; raises ValueError if it has another form."""
    path, separator, value = override.partition("=")
    section, _, key = path.partition(".")
    if not separator or section not in merged or not key:
        raise ValueError(f"override {override!r}: expected SECTION.KEY=VALUE with a section of {sorted(merged)}.")
    merged[section][key] = read_yaml(value)


def parse_options(cls: type[Options], values: dict[str, Any], section: str) -> Options:
    """Options of a frozen dataclass from YAML, which has lists for tuples.

    Raises:
        ValueError: For an unknown key or a value that the class refuses.
    """
    reject_unknown(values, {each.name for each in fields(cls)}, section)
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}: {error}") from error

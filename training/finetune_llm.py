"""Fine-tune a language model on transcripts: `python -m training.finetune_llm CONFIG --data-dir DIR --output-dir DIR`.

The model keeps its vocabulary or gets a new one (training/train_vocabulary.py); all of it learns, or a LoRA. The folder
DIR/final is a language model as any other: `model.language_model` of training/train.py, or `lm=` of a pipeline.
Perplexities before and after are printed and kept in DIR/perplexity.json. A run that was interrupted goes on from its
last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hf_speechllm.adapters import merge_adapters
from hf_speechllm.assembly import resolve_model
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.vocabulary import build_language_model
from training.arguments import apply_override, effective_config, parse_section, read_config, reject_unknown
from training.checkpoints import CONFIG_NAME, CompleteCheckpoints, last_checkpoint, load_trained
from training.command_line import errors_in_one_line
from training.lora import FROZEN_DTYPES, add_lora, cast_frozen, set_lora_trainable
from training.packed_texts import PackedTexts, check_packing, collate
from training.perplexity import measure_perplexity, tokenize
from training.text_sources import read_texts
from training.trainer import check_report_to

logger = logging.getLogger(__name__)

PERPLEXITY_NAME = "perplexity.json"
_DEFAULTS = {"save_strategy": "steps", "logging_steps": 20, "use_cpu": not torch.cuda.is_available()}


@dataclass
class LanguageModelArguments:
    """What is fine-tuned.

    Attributes:
        language_model: Causal language model: Hub id, folder, or `base:NAME` for one of `hf_speechllm.base_model`.
        vocabulary: Tokeniser that takes the place of the model's: Hub id or folder. Embeddings and output layer start
            at means of the old ones.
        llm_init: `pretrained`, or `random`: the same architecture with fresh weights.
    """

    language_model: str = ""
    vocabulary: str | None = None
    llm_init: str = "pretrained"


@dataclass
class LanguageModelTuning:
    """Which weights learn.

    Attributes:
        llm: `full` or `lora`.
        llm_embeddings: `freeze` or `full`: with `lora`, whether embeddings and output layer learn; those of a new
            vocabulary have to.
        llm_frozen_dtype: Of the linear layers that do not learn; all else stays in `float32`. With `bfloat16` they need
            half the memory, and the model computes in mixed precision.
        lora_r: Rank; lora_alpha: Scale; lora_dropout: Dropout on its input; lora_rslora: Scale by 1/sqrt(r).
        lora_targets: Regular expression of the linear layers.
    """

    llm: str = "full"
    llm_embeddings: str = "freeze"
    llm_frozen_dtype: str = "float32"
    lora_r: int = 64
    lora_alpha: float = 128.0
    lora_dropout: float = 0.0
    lora_rslora: bool = False
    lora_targets: str = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@dataclass
class TextArguments:
    """What is learnt from.

    Attributes:
        train_texts: File names or patterns relative to `--data-dir`, JSONL manifests or one text a line; or mappings,
            `{path: speechbrain/LoquaciousSet, name: large, split: train, column: text}`.
        eval_texts: Name -> list of such.
        text_normalization: Of all texts; see `data.text_normalization` of training/train.py.
        max_tokens: Of a row; longer texts are left out.
        packing: Several texts in a row, which do not see each other; else one, in batches of similar length.
        max_eval_texts: Texts of each evaluation set that are used, from the start.
    """

    train_texts: list[Any] = field(default_factory=list)
    eval_texts: dict[str, list[Any]] = field(default_factory=dict)
    text_normalization: str = "none"
    max_tokens: int = 512
    packing: bool = True
    max_eval_texts: int = 1000


@dataclass(frozen=True)
class Run:
    """A run with everything resolved; `effective` is the config that says so."""

    model: LanguageModelArguments
    tuning: LanguageModelTuning
    data: TextArguments
    training: TrainingArguments
    effective: dict[str, Any]


_SECTIONS = {"model": LanguageModelArguments, "tuning": LanguageModelTuning, "data": TextArguments}


def load_run(config_path: str | Path, output_dir: str | Path, overrides: list[str] | None = None) -> Run:
    """Read a run from YAML.

    Args:
        config_path: The YAML file, with differences from the defaults.
        output_dir: Folder of the run.
        overrides: `section.key=value` pairs that win over the file, value in YAML.

    Raises:
        ValueError: For an unknown key, naming it, or a value of the wrong form.
    """
    raw = read_config(Path(config_path))
    reject_unknown(raw, {*_SECTIONS, "training"}, str(config_path))
    merged = {name: dict(raw.get(name) or {}) for name in (*_SECTIONS, "training")}
    for override in overrides or []:
        apply_override(merged, override)
    parts = {name: parse_section(cls, merged[name], name) for name, cls in _SECTIONS.items()}
    training = {**_DEFAULTS, **merged["training"]}
    if not parts["data"].packing:
        training.setdefault("train_sampling_strategy", "group_by_length")
    effective = effective_config(parts, training)
    training = {"remove_unused_columns": False, "output_dir": str(output_dir), **training}
    run = Run(**parts, training=parse_section(TrainingArguments, training, "training"), effective=effective)
    _check(run)
    return run


def _check(run: Run) -> None:
    if not run.model.language_model:
        raise ValueError("model.language_model is required: a Hub id, a folder, or base:NAME.")
    known_values = {"llm": ("full", "lora"), "llm_embeddings": ("freeze", "full"), "llm_frozen_dtype": FROZEN_DTYPES}
    for name, known in known_values.items():
        if getattr(run.tuning, name) not in known:
            raise ValueError(f"tuning.{name} must be one of {known}, got {getattr(run.tuning, name)!r}.")
    if run.tuning.llm == "lora" and run.model.llm_init == "random":
        raise ValueError("llm_init: random needs tuning.llm: full; a LoRA cannot make up for random weights.")
    if run.tuning.llm == "lora" and run.model.vocabulary is not None and run.tuning.llm_embeddings == "freeze":
        raise ValueError("vocabulary: its embeddings have to learn; set tuning.llm_embeddings: full.")


def set_trainable(model: PreTrainedModel, tuning: LanguageModelTuning) -> None:
    """Inject LoRA or leave all weights free, as `tuning` says."""
    if tuning.llm == "full":
        return
    lora = LoraConfig(
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        use_rslora=tuning.lora_rslora,
        target_modules=rf".*\.({tuning.lora_targets})",
    )
    add_lora(model, lora, "tuning.lora_targets")
    model.requires_grad_(False)
    set_lora_trainable(model, True)
    if tuning.llm_embeddings == "full":
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(True)


class LanguageModelTrainer(CompleteCheckpoints):
    """Trains the weights that require gradients, saves just those, and evaluates perplexities.

    Args:
        tokenizer: Of the model.
        eval_texts: Name -> texts.
        args, kwargs: As for `CompleteCheckpoints`.
    """

    def __init__(self, *args: Any, tokenizer: PreTrainedTokenizerBase, eval_texts: dict[str, list[str]], **kwargs: Any):
        super().__init__(*args, eval_dataset=eval_texts or None, **kwargs)
        self.tokenizer = tokenizer
        self.eval_texts = eval_texts

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Perplexities of all evaluation texts; the arguments of the base class are of no use here."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        metrics = {}
        # Every process does all: with sharded weights, all of them have to take part in each call of the model.
        for name, texts in self.eval_texts.items():
            perplexity = measure_perplexity(model, self.tokenizer, texts, self.args.per_device_eval_batch_size)
            metrics[f"{metric_key_prefix}_{name}_perplexity_per_token"] = perplexity.per_token
            metrics[f"{metric_key_prefix}_{name}_perplexity_per_word"] = perplexity.per_word
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def build(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model that is to learn, and its tokeniser."""
    vocabulary = None if run.model.vocabulary is None else resolve_model(run.model.vocabulary)
    model, tokenizer = build_language_model(resolve_model(run.model.language_model), vocabulary, run.model.llm_init)
    set_trainable(model, run.tuning)
    return model, tokenizer


def training_texts(run: Run, scorer: CausalLMScorer, data_dir: Path) -> PackedTexts:
    """The rows to learn from; texts are begun and tokenised as `scorer` does."""
    start = scorer.start_token_ids
    texts = read_texts(run.data.train_texts, data_dir, run.data.text_normalization)
    sequences = [[*start, *tokenize(scorer, text), scorer.eos_token_id] for text in texts]
    kept = [ids for ids in sequences if len(ids) <= run.data.max_tokens]
    if not kept:
        raise ValueError(f"data.max_tokens: all {len(texts)} texts are longer than {run.data.max_tokens} tokens.")
    if len(kept) < len(texts):
        logger.warning(
            "%d of %d texts have more than %d tokens", len(texts) - len(kept), len(texts), run.data.max_tokens
        )
    tokens = sum(map(len, kept))
    logger.info("%d training texts, %d tokens, %.2f per text", len(kept), tokens, tokens / len(kept))
    rows = PackedTexts(
        kept,
        len(start),
        run.data.max_tokens,
        packing=run.data.packing,
        seed=run.training.data_seed or run.training.seed,
    )
    if run.data.packing and len(kept) > 1:
        check_packing(scorer.model, kept[:2], len(start))
    return rows


def finetune(run: Run, data_dir: Path) -> dict[str, dict[str, float]]:
    """Train, and write the folder `final`; returns the perplexities before and after.

    Raises:
        ValueError: If data or options do not fit.
    """
    check_report_to(run.training.report_to)
    output_dir = Path(run.training.output_dir)
    final, record = output_dir / "final", output_dir / PERPLEXITY_NAME
    if final.exists():
        logger.info("the run is finished: %s", final)
        return json.loads(record.read_text())
    set_seed(run.training.seed)
    model, tokenizer = build(run)
    model.config.use_cache = False  # with a cache, transformers does not look for several texts in a row
    scorer = CausalLMScorer(model.eval(), tokenizer)
    evaluation = {
        name: read_texts(sources, data_dir, run.data.text_normalization)[: run.data.max_eval_texts]
        for name, sources in run.data.eval_texts.items()
    }
    rows = training_texts(run, scorer, data_dir)
    cast_frozen(model, run.tuning.llm_frozen_dtype, run.training.device.type)
    trainer = LanguageModelTrainer(
        model=model,
        args=run.training,
        train_dataset=rows,
        data_collator=collate,
        tokenizer=tokenizer,
        eval_texts=evaluation,
        effective=run.effective,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        perplexities = {"before": trainer.evaluate(metric_key_prefix="before")}
        _write_json(record, perplexities, trainer)
    else:
        perplexities = json.loads(record.read_text())
    trainer.train(resume_from_checkpoint=checkpoint)
    perplexities["after"] = trainer.evaluate(metric_key_prefix="after")
    trained = output_dir / "trained"
    trainer.save_model(str(trained))
    if trainer.args.should_save:
        export(run, trained, final)
        shutil.rmtree(trained)
    _write_json(record, perplexities, trainer)
    trainer.accelerator.wait_for_everyone()
    return perplexities


def export(run: Run, trained: Path, folder: Path) -> None:
    """Write the language model with the weights of `trained` to `folder`, a LoRA added to the weights."""
    model, tokenizer = build(run)
    load_trained(model, trained)
    merge_adapters(model)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.copyfile(trained / CONFIG_NAME, unfinished / CONFIG_NAME)
    unfinished.rename(folder)


def _write_json(path: Path, values: dict[str, Any], trainer: LanguageModelTrainer) -> None:
    if trainer.args.should_save:
        path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file, e.g. training/configs/finetune_llm.yaml")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="win over the file")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that the texts are relative to")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the run")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with errors_in_one_line("finetune_llm"):
        run = load_run(arguments.config, arguments.output_dir, arguments.overrides)
        perplexities = finetune(run, arguments.data_dir)
    for metrics in perplexities.values():
        for name, value in metrics.items():
            print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()

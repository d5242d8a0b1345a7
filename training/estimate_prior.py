"""Estimate the prior of a CTC head: what it says of each label regardless of the audio.

    python -m training.estimate_prior MODEL MANIFEST.jsonl [MANIFEST.jsonl ...] --source posterior

Fusion with a language model subtracts it (`prior_weight`), since a CTC model has learned some language itself. MODEL is
a checkpoint or a folder of trained parts; the prior is written into its weights, as `ctc_head.log_prior`. Use training
data or a part of it, never a test set.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.utils import logging

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME, load_trained_parts
from hf_speechllm.audio_encoders import lens_to_mask
from hf_speechllm.data_collator import SpeechLLMDataCollator
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.processing_speechllm import IGNORE_INDEX, SpeechLLMProcessor
from training.command_line import check_at_least_one, errors_in_one_line, loading
from training.data import RowLoader, SpeechDataset
from training.data_sources import Row
from training.evaluation_data import UsageError, read_json_lines
from training.row_reader import RowReader
from training.trained_parts import check_trained_parts

SOURCES = ("posterior", "transcripts")
UNIFORM_SHARE = 0.1  # of the transcripts' prior, so that unseen labels are not impossible
PRIOR_NAME = "ctc_head.log_prior"


def load(folder: str) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Model and processor of a checkpoint or a folder of trained parts.

    Raises:
        UsageError: There is none, or it has no CTC head.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"MODEL: no such folder: {folder}; the prior is written into one")
    with loading("MODEL", folder):
        if (Path(folder) / RECIPE_NAME).is_file():
            check_trained_parts(Path(folder))
            model, processor = load_trained_parts(folder)
        else:
            model = SpeechLLMForConditionalGeneration.from_pretrained(folder).eval()
            processor = AutoProcessor.from_pretrained(folder)
    if model.ctc_head is None:
        raise UsageError(f"MODEL: expected a model with a CTC head, that of {folder} has none")
    return model, processor


def read_rows(manifests: list[Path], limit: int | None = None) -> list[Row]:
    """The first rows of manifests; audio is relative to its manifest.

    Raises:
        UsageError: A manifest is missing or malformed, or there is no row.
    """
    rows = []
    for path in manifests:
        for number, entry in enumerate(read_json_lines(path, ("audio_filepath", "text", "duration")), 1):
            audio = path.parent / entry["audio_filepath"]
            rows.append(Row(str(path), number, audio, entry["text"], entry["duration"], entry.get("offset", 0.0)))
    if not rows:
        raise UsageError(f"{', '.join(map(str, manifests))}: expected at least one utterance, got none")
    return rows[:limit]


@torch.no_grad()
def posterior_prior(model: SpeechLLMForConditionalGeneration, batches: DataLoader) -> torch.Tensor:
    """Log of the mean CTC posterior over all frames, blank removed and renormalised: `[U+1]`, 0 for the blank.

    Source: Zeyer et al. (2017), "CTC in the context of generalized full-sum HMM training".
    """
    blank_id = model.config.blank_id
    total = torch.zeros(blank_id + 1, dtype=torch.float64)
    for batch in tqdm(batches, desc="posteriors", unit="batch", leave=False, disable=None):
        audio = model.encode(batch["input_features"], batch["input_features_mask"])
        probs = audio.ctc_log_probs.double().exp()  # B, T, U+1
        is_valid = lens_to_mask(audio.encoder_out_lens, probs.shape[1])
        total += (probs * is_valid[..., None]).sum((0, 1)).cpu()
    return _log_without_blank(total, blank_id)


def transcript_prior(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor, texts: list[str]
) -> torch.Tensor:
    """Log of the labels' relative frequencies in transcripts, with a uniform share of 0.1: `[U+1]`, 0 for the blank."""
    blank_id = model.config.blank_id
    counts = torch.zeros(blank_id + 1, dtype=torch.float64)
    for text in tqdm(texts, desc="transcripts", unit="text", leave=False, disable=None):
        targets = model.ctc_targets(processor(text=text)["labels"])
        counts += torch.bincount(targets[targets != IGNORE_INDEX], minlength=blank_id + 1)
    counts[:blank_id] = (1.0 - UNIFORM_SHARE) * counts[:blank_id] / counts[:blank_id].sum() + UNIFORM_SHARE / blank_id
    return _log_without_blank(counts, blank_id)


def _log_without_blank(mass: torch.Tensor, blank_id: int) -> torch.Tensor:
    labels = mass[:blank_id]
    if not labels.sum() > 0:
        raise ValueError("manifest: no label was found in it; are its audio or its texts empty?")
    return torch.cat([(labels / labels.sum()).clamp(min=1e-12).log(), labels.new_zeros(1)]).float()


def store(folder: str, model: SpeechLLMForConditionalGeneration, log_prior: torch.Tensor) -> None:
    """Write the prior into the weights in `folder`."""
    path = Path(folder) / TRAINED_WEIGHTS_NAME
    if path.is_file():
        state = load_file(path)
        save_file({**state, PRIOR_NAME: log_prior.to(next(iter(state.values())).dtype)}, path)
    else:
        model.ctc_head.log_prior.copy_(log_prior)
        model.save_pretrained(folder)


def estimate(folder: str, rows: list[Row], source: str = "posterior", batch_size: int = 8) -> float:
    """Estimate the prior of the model in `folder` and write it there; returns its perplexity.

    Args:
        folder: A checkpoint or trained parts.
        rows: Of manifests, as `read_manifests` returns them.
        source: One of SOURCES.
        batch_size: Utterances per forward pass.
    """
    model, processor = load(folder)
    if source == "posterior":
        dataset = SpeechDataset(rows, RowLoader(RowReader(processor.sampling_rate, empty_text="keep")))
        log_prior = posterior_prior(model, DataLoader(dataset, batch_size, collate_fn=SpeechLLMDataCollator(processor)))
    else:
        log_prior = transcript_prior(model, processor, [row.text for row in rows])
    store(folder, model, log_prior)
    return float((-(log_prior[:-1].exp() * log_prior[:-1]).sum()).exp())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder; the prior is written into it")
    parser.add_argument(
        "manifests",
        type=Path,
        nargs="+",
        metavar="MANIFEST.jsonl",
        help="training data with audio_filepath (relative to it), text and duration; never a test set",
    )
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="posterior",
        help="mean CTC posterior, or label frequencies in the texts (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first utterances (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="utterances per forward pass (default: %(default)s)"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with errors_in_one_line("estimate_prior"):
        check_at_least_one(arguments, "limit", "batch_size")
        rows = read_rows(arguments.manifests, arguments.limit)
        perplexity = estimate(arguments.model, rows, arguments.source, arguments.batch_size)
    print(f"{arguments.model}: prior of its labels, perplexity {perplexity:.1f}")


if __name__ == "__main__":
    main()

"""Tune the scales of a language model on the N-best lists of development data.

    python -m training.tune_scales MODEL DEV.jsonl [DEV.jsonl ...] --write
    python -m training.tune_scales MODEL DEV.jsonl --mode label_fusion
    python -m training.tune_scales base:whisper-tiny.en DEV.jsonl --lm base:smollm2-135m-instruct

MODEL is a checkpoint, a folder of trained parts, a Hub id or `base:NAME`. The lists of a speech LLM come from its CTC
head and are scored by its own plain language model, or by --lm, in the tokens that its --mode scores: those of words
with "rescoring" and "delayed_fusion", CTC labels with "label_fusion". Those of other models come from their CTC output
or their beam search, and need --lm.

The scales are found on the scored lists, without decoding again. That is all for rescoring. A search in one pass finds
other hypotheses with other scales, such as ones with fewer words where the language model has much weight and words no
reward: --rounds 2 or 3 decodes again with the scales of the round before and adds what it finds to the lists (minimum
error rate training, Och 2003, section 4).

The word error rate that is printed for the tuned scales is optimistic. Use development data, never a test set: a result
on data that the scales were tuned on is no result.
"""

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tqdm import tqdm
from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig

from hf_speechllm.assembly import resolve_model
from hf_speechllm.fusion_pipeline import FusionPipeline, pipeline_for_lm
from hf_speechllm.hypothesis import Hypothesis
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.metrics import normalize_english, word_errors
from hf_speechllm.rescoring import rescore_nbest
from hf_speechllm.scale_tuning import ScaleChoice, tune_scales
from hf_speechllm.segmented_pipeline import load_language_model
from hf_speechllm.transcription import DECODING_MODES
from training.command_line import add_device, check_at_least_one, errors_in_one_line, loading
from training.evaluation_data import UsageError, Utterance, batches, read_manifest
from training.recognisers import is_speech_llm, load_pipeline

MODES = ("rescoring", "delayed_fusion", "label_fusion")
LM_WEIGHTS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
PRIOR_WEIGHTS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
LENGTH_REWARDS = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
NO_PRIOR = [0.0]
SCALES = ("lm_weight", "prior_weight", "length_reward")

NBests = list[list[Hypothesis]]
NO_SCALES = ScaleChoice(0.0, 0.0, 0.0, math.nan)


@dataclass(frozen=True)
class Search:
    """How the lists are found.

    Attributes:
        mode: One of MODES.
        lm: The language model; None: that of the speech LLM, without its adapter.
        size: Hypotheses per utterance, and width of the search.
        scales: Of the search in one pass; 0 everywhere searches by the acoustic score alone.
    """

    mode: str
    lm: CausalLMScorer | None
    size: int
    scales: ScaleChoice


def main() -> None:
    """Command line."""
    arguments = build_parser().parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with errors_in_one_line("tune_scales"):
        tune(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint, folder of trained parts, Hub id or base:NAME")
    add("manifests", metavar="DEV.jsonl", type=Path, nargs="+", help="development data, never a test set")
    add(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="of a speech LLM: "
        + "; ".join(f"{mode}, {DECODING_MODES[mode]}" for mode in MODES)
        + f" (default: {MODES[0]})",
    )
    add(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="of decoding and tuning, for the modes with one pass (default: %(default)s)",
    )
    add("--lm", help="language model: Hub id, folder or base:NAME (default: that of the speech LLM)")
    add(
        "--nbest",
        type=int,
        default=16,
        metavar="N",
        help="hypotheses per utterance, and width of the search (default: %(default)s)",
    )
    add("--lm-weights", type=grid, default=LM_WEIGHTS, metavar="W,W,...", help=f"to try (default: {LM_WEIGHTS})")
    add(
        "--prior-weights",
        type=grid,
        metavar="W,W,...",
        help=f"to try (default: {PRIOR_WEIGHTS} where the speech LLM has a prior, see training.estimate_prior, "
        "otherwise 0)",
    )
    add(
        "--length-rewards",
        type=grid,
        default=LENGTH_REWARDS,
        metavar="R,R,...",
        help="to try, in nats per token; with a negative one first write --length-rewards=-1,0 "
        f"(default: {LENGTH_REWARDS})",
    )
    add("--write", action="store_true", help="store the scales in generation_config.json of MODEL, a folder")
    add("--batch-size", type=int, default=8, metavar="N", help="utterances of similar length per batch (default: 8)")
    add("--limit", type=int, metavar="N", help="use only the first utterances of each manifest (default: all)")
    add_device(parser)
    return parser


def grid(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}")
    return values


def tune(arguments: argparse.Namespace) -> None:
    """Decode, tune, report; UsageError for what the user has to change."""
    check_at_least_one(arguments, "nbest", "batch_size", "limit", "rounds")
    utterances = read_all(arguments.manifests, arguments.limit)
    pipe = load_pipeline(arguments.model, arguments.device, "MODEL")
    check(arguments, pipe)
    lm = None
    if arguments.lm is not None:
        with loading("--lm", arguments.lm):
            lm = load_language_model(resolve_model(arguments.lm), pipe.device)
    references = [utterance.entry["text"] for utterance in utterances]
    grids = {
        "lm_weights": arguments.lm_weights,
        "prior_weights": arguments.prior_weights or (PRIOR_WEIGHTS if has_prior(pipe) else NO_PRIOR),
        "length_rewards": arguments.length_rewards,
    }
    normalize = functools.cache(normalize_english)
    name = ", ".join(path.stem for path in arguments.manifests)
    nbests: NBests = [[] for _ in utterances]
    choice = NO_SCALES
    for _ in range(arguments.rounds):
        search = Search(arguments.mode, lm, arguments.nbest, choice)
        nbests = joined(nbests, nbest_lists(pipe, search, utterances, arguments.batch_size))
        choice = tune_scales(nbests, references, normalize=normalize, **grids)
        print(report(name, nbests, references, choice, normalize), flush=True)
    for scale, values in zip(SCALES, grids.values(), strict=True):
        if len(values) > 1 and getattr(choice, scale) in (max(values), min(values)) and getattr(choice, scale) != 0.0:
            print(f"{scale} = {getattr(choice, scale):g} is at the end of its grid: widen --{scale.replace('_', '-')}s")
    if arguments.write:
        write(arguments.model, choice)


def read_all(manifests: Sequence[Path], limit: int | None) -> list[Utterance]:
    """Utterances of several manifests, numbered through."""
    utterances = [utterance for path in manifests for utterance in read_manifest(path, limit)]
    return [replace(utterance, index=index) for index, utterance in enumerate(utterances)]


def joined(nbests: NBests, others: NBests) -> NBests:
    """Lists of the same utterances put together, each hypothesis once."""
    return [
        list({hypothesis.labels: hypothesis for hypothesis in [*rows, *more]}.values())
        for rows, more in zip(nbests, others, strict=True)
    ]


def check(arguments: argparse.Namespace, pipe: AutomaticSpeechRecognitionPipeline) -> None:
    """Refuse what cannot be done with this model, before anything is decoded."""
    if arguments.mode == "rescoring" and arguments.rounds > 1:
        raise UsageError("--rounds: expected 1 with --mode rescoring, whose lists do not depend on the scales")
    if is_speech_llm(pipe):
        config = pipe.model.config
        if config.ctc_token_ids is None and (config.ctc_labels is None or arguments.mode == "label_fusion"):
            kind = " whose labels are tokens of the language model" if arguments.mode == "label_fusion" else ""
            raise UsageError(f"MODEL: expected a CTC head{kind}, it has none")
        if arguments.write and not (Path(arguments.model) / "generation_config.json").is_file():
            raise UsageError(f"--write: expected a folder with generation_config.json as MODEL, got {arguments.model}")
        return
    kind = pipe.model.config.model_type
    if arguments.mode != "rescoring":
        raise UsageError(f"--mode: {arguments.mode} is for speech LLMs of this package, this is a {kind} model")
    if arguments.lm is None:
        raise UsageError(f"--lm: expected a language model, since a {kind} has none of its own that is plain")
    if arguments.write:
        raise UsageError(f"--write: is for speech LLMs of this package; give a {kind} its scales in pipeline(lm=...)")
    if arguments.prior_weights not in (None, NO_PRIOR):
        raise UsageError(f"--prior-weights: a {kind} comes without a prior; leave it out")


def has_prior(pipe: AutomaticSpeechRecognitionPipeline) -> bool:
    """Whether the prior of a speech LLM was estimated."""
    return is_speech_llm(pipe) and bool(pipe.model.ctc_head.log_prior.any())


def nbest_lists(
    pipe: AutomaticSpeechRecognitionPipeline, search: Search, utterances: Sequence[Utterance], batch_size: int
) -> NBests:
    """N-best lists in the order of the utterances, each with the separate scores of all models.

    Args:
        pipe: The recogniser.
        search: How to decode; other models than speech LLMs have one way.
        utterances: Each no longer than what the model takes in one piece, their `index` is their place.
        batch_size: Utterances per forward pass of a speech LLM.

    Raises:
        UsageError: If an utterance is too long.
    """
    if not is_speech_llm(pipe):
        is_multilingual = getattr(getattr(pipe.model, "generation_config", None), "is_multilingual", False)
        options = {"generate_kwargs": {"language": "en"}} if is_multilingual else {}
        pipe = pipeline_for_lm(pipe.model)(pipe.model, pipe.feature_extractor, pipe.tokenizer, lm=search.lm, **options)
    for utterance in utterances:
        if utterance.entry["duration"] > pipe.max_piece_s:
            raise UsageError(
                f"{utterance.entry['audio_filepath']}: expected at most {pipe.max_piece_s:g} s, got "
                f"{utterance.entry['duration']:.1f} s; leave long recordings out"
            )
    lists: dict[int, list[Hypothesis]] = {}
    with tqdm(desc="N-best lists", unit="utt", total=len(utterances), leave=False, disable=None) as progress:
        for batch in batches(iter(utterances), batch_size, None):
            waveforms = [utterance.waveform(pipe.feature_extractor.sampling_rate) for utterance in batch]
            if is_speech_llm(pipe):
                nbests = speech_llm_lists(pipe, search, waveforms)
            else:
                nbests = other_lists(pipe, waveforms, search.size)
            lists.update(zip((utterance.index for utterance in batch), nbests, strict=True))
            progress.update(len(batch))
    return [lists[utterance.index] for utterance in utterances]


def speech_llm_lists(
    pipe: AutomaticSpeechRecognitionPipeline, search: Search, waveforms: Sequence[np.ndarray]
) -> NBests:
    """Lists of the CTC head of a speech LLM, in the order of the score that the search had."""
    inputs = pipe.processor(waveforms, sampling_rate=pipe.feature_extractor.sampling_rate)
    nbests = pipe.model.generate(
        **pipe.ensure_tensor_on_device(**inputs),
        mode=search.mode,
        lm=search.lm,
        tokenizer=pipe.tokenizer,
        ctc_beam_size=search.size,
        num_return_sequences=search.size,
        return_dict_in_generate=True,
        **{scale: getattr(search.scales, scale) for scale in SCALES},
    ).hypotheses
    if search.mode != "label_fusion":
        return nbests
    # This mode needs no text, and gives none.
    token_ids = pipe.model.config.ctc_token_ids
    return [
        [replace(row, text=pipe.processor.decode([token_ids[label] for label in row.labels])) for row in rows]
        for rows in nbests
    ]


def other_lists(pipe: FusionPipeline, waveforms: list[np.ndarray], size: int) -> NBests:
    """Lists of another model, scored by the language model of the pipeline."""
    in_lm_case = pipe.lm_case(None)
    nbests = [
        [Hypothesis(row.labels, in_lm_case(row.text), row.am_log_prob) for row in pipe.nbest(waveform, size)]
        for waveform in waveforms
    ]
    return rescore_nbest(nbests, pipe.lm, lm_weight=0.0)


def report(name: str, nbests: NBests, references: list[str], choice: ScaleChoice, normalize: Any) -> str:
    """The table: error rates of the acoustic model alone, with the tuned scales, and of the best hypotheses."""
    scales = {scale: getattr(choice, scale) for scale in SCALES}
    lines = [
        f"{name}: {len(nbests)} utterances, {max(map(len, nbests))}-best lists; percent, Whisper normaliser",
        f"{'':<20} {'WER':>6} {'sub':>6} {'del':>6} {'ins':>6}",
    ]
    for label, texts in (
        ("acoustic model alone", _first_texts(rescore_nbest(nbests, None, lm_weight=0.0))),
        ("with language model", _first_texts(rescore_nbest(nbests, None, **scales))),
        ("oracle of the lists", _oracle_texts(nbests, references, normalize)),
    ):
        errors = word_errors(references, texts, normalize)
        counts = (errors.substitutions, errors.deletions, errors.insertions)
        cells = [100 * errors.wer, *(100 * count / errors.reference_words for count in counts)]
        lines.append(f"{label:<20} " + " ".join(f"{cell:6.2f}" for cell in cells))
    return "\n".join([*lines, ", ".join(f"{scale}={value:g}" for scale, value in scales.items())])


def write(folder: str, choice: ScaleChoice) -> None:
    """Store the scales in the generation config of a checkpoint or of trained parts."""
    config = GenerationConfig.from_pretrained(folder)
    config.update(**{scale: getattr(choice, scale) for scale in SCALES}, allow_custom_entries=True)
    config.save_pretrained(folder)
    print(f"{Path(folder) / 'generation_config.json'}: written")


def _first_texts(nbests: NBests) -> list[str]:
    return [rows[0].text for rows in nbests]


def _oracle_texts(nbests: NBests, references: list[str], normalize: Any) -> list[str]:
    """Of each list the text with the fewest word errors."""

    def errors(reference: str, text: str) -> int:
        counts = word_errors([reference], [text], normalize)
        return counts.substitutions + counts.deletions + counts.insertions

    return [
        min((row.text for row in rows), key=functools.partial(errors, reference))
        for rows, reference in zip(nbests, references, strict=True)
    ]


if __name__ == "__main__":
    main()

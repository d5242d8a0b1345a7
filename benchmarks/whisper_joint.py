"""Whisper alone, with a language model, and jointly with our CTC head: word error rates of one table.

    python -m benchmarks.whisper_joint TEST.jsonl --dev DEV.jsonl [DEV.jsonl ...] --output build/whisper_joint

The same beam search writes the N-best lists of all systems; the language model rescores them. What `--ctc-weight` and
`--lm-weight` leave open is tuned on the development data: first the share of CTC, by the best hypotheses, then the
scale of the language model on the lists of Whisper alone and on those of the joint search. Manifests are JSONL with
audio_filepath, text and optionally offset and duration in seconds.

Lists are kept in --output with what they were made by: the command goes on where it stopped, and after one model was
replaced only its own lists are made again.
"""

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import pipeline

import hf_speechllm
from hf_speechllm.assembly import resolve_model
from hf_speechllm.fusion_pipeline import Seq2SeqRescoringPipeline
from hf_speechllm.hypothesis import Hypothesis
from hf_speechllm.metrics import normalize_english, paired_bootstrap, word_errors
from hf_speechllm.rescoring import rescore_nbest
from hf_speechllm.scale_tuning import tune_scales
from hf_speechllm.transcription import check_model_name
from training.command_line import check_at_least_one, check_folder, errors_in_one_line
from training.evaluate_asr import weights_stamp
from training.evaluation_data import UsageError, Utterance, batches, read_json_lines, read_manifest
from training.leaderboard import leaderboard_normalizer
from training.scoring import SystemScore, counts, score_system
from training.tune_scales import grid

CTC_WEIGHTS = [0.05, 0.1, 0.2]
LM_WEIGHTS = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]


@dataclass(frozen=True)
class Lists:
    """N-best lists of some utterances; `cpu_s` is the time of the search per utterance, without language model."""

    references: list[str]
    nbests: list[list[Hypothesis]]
    cpu_s: float

    def best(self, lm_weight: float) -> list[str]:
        """The best text of each list with this scale of the language model; empty for an empty list."""
        ranked = rescore_nbest(self.nbests, None, lm_weight=lm_weight)
        return [rows[0].text or "" if rows else "" for rows in ranked]


@dataclass(frozen=True)
class Decoder:
    """The pipeline, and the arguments that say by which models its lists are told apart."""

    pipe: Seq2SeqRescoringPipeline
    arguments: argparse.Namespace

    def lists(self, utterances: list[Utterance], ctc_weight: float, name: str) -> Lists:
        """Lists of all utterances with a share of CTC, scored by the search alone."""
        arguments = self.arguments
        models = [weights_stamp(arguments.model), weights_stamp(arguments.ctc_model) if ctc_weight else None]
        search = [ctc_weight, arguments.num_beams, arguments.max_new_tokens]
        path = self._file(f"{name}-ctc{ctc_weight:g}", [models, search, [each.entry for each in utterances]])
        done = {row["index"] for row in _rows(path)}
        missing = [utterance for utterance in utterances if utterance.index not in done]
        with (
            path.open("a") as file,
            tqdm(desc=f"{name}, CTC {ctc_weight:g}", unit="utt", total=len(utterances), disable=None) as bar,
        ):
            bar.update(len(done))
            for batch in batches(iter(missing), arguments.batch_size, None):
                waveforms = [utterance.waveform(self.pipe.feature_extractor.sampling_rate) for utterance in batch]
                start = time.process_time()
                nbests = self.pipe.nbests(waveforms, arguments.num_beams, ctc_weight=ctc_weight)
                cpu_s = (time.process_time() - start) / len(batch)
                for utterance, nbest in zip(batch, nbests, strict=True):
                    scores = [(row.text, row.am_log_prob) for row in nbest]
                    file.write(json.dumps({"index": utterance.index, "cpu_s": cpu_s, "nbest": scores}) + "\n")
                file.flush()
                bar.update(len(batch))
        rows = {row["index"]: row for row in _rows(path)}
        return Lists(
            [utterance.entry["text"] for utterance in utterances],
            [[Hypothesis((), text, score) for text, score in rows[each.index]["nbest"]] for each in utterances],
            sum(row["cpu_s"] for row in rows.values()) / len(rows),
        )

    def scored(self, lists: Lists) -> Lists:
        """The lists with the scores of the language model; a text that several searches found is scored once."""
        path = self._file("language-model", weights_stamp(self.arguments.lm))
        known = {row["text"]: row for row in _rows(path)}
        texts = [text for text in dict.fromkeys(row.text for rows in lists.nbests for row in rows) if text not in known]
        with path.open("a") as file:
            for text in tqdm(texts, desc="language model", unit="text", disable=None):
                ((row,),) = rescore_nbest([[Hypothesis((), text, 0.0)]], self.pipe.lm, lm_weight=0.0)
                known[text] = {"text": text, "lm_log_prob": row.lm_log_prob, "num_tokens": row.num_tokens}
                file.write(json.dumps(known[text]) + "\n")
                file.flush()
        nbests = [[replace(row, **known[row.text]) for row in rows] for rows in lists.nbests]
        return replace(lists, nbests=nbests)

    def _file(self, name: str, made_by: Any) -> Path:
        self.arguments.output.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
        return self.arguments.output / f"{name}-{digest}.jsonl"


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(path, ())) if path.is_file() else []


def best_ctc_weight(lists: dict[float, Lists]) -> float:
    """The share of CTC with the fewest errors of the best hypotheses; `lists` are those of each share."""
    normalize = functools.cache(normalize_english)
    wers = {}
    for weight, development in lists.items():
        wers[weight] = word_errors(development.references, development.best(0.0), normalize).wer
        print(f"development data, share of CTC {weight:g}: WER {100 * wers[weight]:.2f} %")
    return min((weight for weight in lists if weight > 0.0), key=lambda weight: (wers[weight], weight))


def best_lm_weight(development: Lists, lm_weights: list[float]) -> float:
    """The scale of the language model with the fewest errors on lists that have its scores."""
    choice = tune_scales(
        development.nbests,
        development.references,
        lm_weights=lm_weights,
        prior_weights=[0.0],
        length_rewards=[0.0],
        normalize=functools.cache(normalize_english),
    )
    print(f"development data, scale of the language model {choice.lm_weight:g}: WER {100 * choice.wer:.2f} %")
    return choice.lm_weight


def table(systems: list[tuple[str, list[str], float]], references: list[str]) -> str:
    """Markdown: error rates of each system (name, texts, CPU seconds), and how they differ from the first's."""
    normalize = leaderboard_normalizer()
    scores: list[SystemScore] = [score_system(references, texts, normalize) for _, texts, _ in systems]
    lines = [
        "| system | WER % (95 % interval) | sub | del | ins | against the first, points (95 % interval) | CPU s |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    first, words = counts(scores[0].whisper)
    for (name, _, cpu_s), score in zip(systems, scores, strict=True):
        rates = {key: value for key, value in score.figures.items() if isinstance(value, float)}
        difference = paired_bootstrap(first, counts(score.whisper)[0], words)
        against = f"{100 * difference.difference:+.2f} ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
        lines.append(
            f"| {name} | {rates['wer']:.2f} ({rates['wer_low']:.1f} to {rates['wer_high']:.1f}) | "
            f"{rates['substitutions']:.2f} | {rates['deletions']:.2f} | {rates['insertions']:.2f} | "
            f"{against if score is not scores[0] else ''} | {cpu_s:.2f} |"
        )
    return "\n".join(lines)


def development_data(arguments: argparse.Namespace) -> list[Utterance]:
    """Utterances of the wanted length, spread evenly over the manifests."""
    shortest_s, longest_s = arguments.dev_seconds
    found = [
        utterance
        for path in arguments.dev
        for utterance in read_manifest(path)
        if shortest_s <= utterance.entry["duration"] <= longest_s
    ]
    if not found:
        raise UsageError(f"--dev: expected utterances of {shortest_s:g} to {longest_s:g} s, got none")
    count = min(arguments.dev_utterances, len(found))
    chosen = [found[position * len(found) // count] for position in range(count)]
    return [Utterance(index, utterance.entry, utterance.audio) for index, utterance in enumerate(chosen)]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("test", metavar="TEST.jsonl", type=Path, help="test data")
    add("--dev", metavar="DEV.jsonl", type=Path, nargs="+", required=True, help="to tune on, never the test data")
    add("--output", type=Path, required=True, help="folder of the N-best lists")
    add(
        "--model",
        default="base:whisper-tiny.en",
        help="encoder-decoder: Hub id, folder or base:NAME (default: %(default)s)",
    )
    add("--ctc-model", help="model with a CTC head: Hub id, folder or base:NAME (default: the model of this package)")
    add(
        "--lm",
        default="base:smollm2-135m-instruct",
        help="language model: Hub id, folder or base:NAME (default: %(default)s)",
    )
    add(
        "--ctc-weight",
        type=grid,
        default=CTC_WEIGHTS,
        metavar="W,W,...",
        help=f"to try, above 0 (default: {CTC_WEIGHTS})",
    )
    add("--lm-weight", type=grid, default=LM_WEIGHTS, metavar="W,W,...", help=f"to try (default: {LM_WEIGHTS})")
    add(
        "--num-beams",
        type=int,
        default=4,
        metavar="N",
        help="width of the search, and hypotheses of a list (default: 4)",
    )
    add("--max-new-tokens", type=int, default=96, metavar="N", help="of a hypothesis (default: %(default)s)")
    add("--batch-size", type=int, default=4, metavar="N", help="utterances of similar length (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="use only the first test utterances (default: all)")
    add("--dev-utterances", type=int, default=40, metavar="N", help="to tune on, at most (default: %(default)s)")
    add(
        "--dev-seconds",
        type=float,
        nargs=2,
        default=(2.0, 9.0),
        metavar=("SHORTEST", "LONGEST"),
        help="durations of those (default: 2 9)",
    )
    add("--threads", type=int, default=1, metavar="N", help="of the CPU (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with errors_in_one_line("whisper_joint"):
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Decode, tune and print the table; UsageError for what the user has to change."""
    if not all(0.0 < weight <= 1.0 for weight in arguments.ctc_weight):
        raise UsageError(f"--ctc-weight: expected shares above 0 and up to 1, got {arguments.ctc_weight}")
    check_at_least_one(arguments, "num_beams", "max_new_tokens", "batch_size", "limit", "dev_utterances", "threads")
    check_folder("--output", arguments.output)
    torch.set_num_threads(arguments.threads)
    test, development = read_manifest(arguments.test, arguments.limit), development_data(arguments)
    if arguments.ctc_model is None:
        # A folder of its weights, also if others are put in its place.
        arguments.ctc_model = hf_speechllm.default_model()
    for name in ("model", "ctc_model", "lm"):
        check_model_name(f"--{name.replace('_', '-')}", getattr(arguments, name))
    pipe = pipeline(
        "automatic-speech-recognition",
        model=resolve_model(arguments.model),
        ctc_model=resolve_model(arguments.ctc_model),
        lm=resolve_model(arguments.lm),
        max_new_tokens=arguments.max_new_tokens,
    )
    decoder = Decoder(pipe, arguments)
    lists = {weight: decoder.lists(development, weight, "dev") for weight in (0.0, *arguments.ctc_weight)}
    ctc_weight = best_ctc_weight(lists)
    systems, references = [], [utterance.entry["text"] for utterance in test]
    for weight, name in ((0.0, "alone"), (ctc_weight, f"jointly with CTC ({ctc_weight:g})")):
        lm_weight = best_lm_weight(decoder.scored(lists[weight]), arguments.lm_weight)
        found = decoder.scored(decoder.lists(test, weight, "test"))
        systems.append((name, found.best(0.0), found.cpu_s))
        systems.append((f"{name}, rescored by the language model ({lm_weight:g})", found.best(lm_weight), found.cpu_s))
    minutes = sum(utterance.entry["duration"] for utterance in test) / 60
    print(f"{arguments.test.stem}: {len(test)} utterances, {minutes:.1f} min, {arguments.num_beams} beams")
    print(table(systems, references))


if __name__ == "__main__":
    main()

"""CTC beam search without a language model against flashlight-text (C++) and pyctcdecode (Python), on one CPU thread.

All systems decode the same synthetic peaky posteriors with the same beam. Times are CPU time of the process, per
utterance, the best of several runs, without the start of the process. The peers decode one utterance after the other.
Agreement is the share of utterances with the same best transcript as `ctc_beam_search`. Prints a Markdown table.

Settings: the 20 most probable labels per frame (flashlight-text: beam_size_token=20, log_add, ZeroLM, no threshold;
pyctcdecode: its own pruning, token_min_logp=-5 and beam_prune_logp=-10). "merged" searches the frames that
`merge_blank_frames` leaves, its time included.

The peers run in an environment of their own (pyctcdecode needs numpy<2), which executes this file with numpy alone:

    python -m venv PEERS && PEERS/bin/python -m pip install flashlight-text==0.0.7 pyctcdecode==0.5.0
    python -m benchmarks.ctc_beam_search --peer-python PEERS/bin/python [--frames 250] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BLANK, SPACE = 0, 1
TOP_K = 20
FRAMES_PER_LABEL = 5
PEERS = ("flashlight-text", "pyctcdecode")

Transcripts = list[list[int]]
Decoder = Callable[[np.ndarray, int], Transcripts]  # log-probs [B, T, A] and the beam size


def posteriors(num_utterances: int, num_frames: int, num_labels: int) -> np.ndarray:
    """[B, T, A] float32 log-probs: a label every 5 frames or so, mostly clear, with a competitor; blank between."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(num_utterances, num_frames, num_labels))
    logits[:, :, BLANK] += 14.0
    for utterance in logits:
        t = 2
        while t < num_frames:
            label, other = draw.integers(1, num_labels, size=2)
            utterance[t, BLANK] -= 10.0
            utterance[t, label] += 11.0
            utterance[t, other] += draw.uniform(4.0, 11.0)
            t += 1 + draw.poisson(FRAMES_PER_LABEL - 1)
    logits -= logits.max(-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def timed(decode: Decoder, log_probs: np.ndarray, beam_size: int, runs: int) -> tuple[float, Transcripts]:
    """CPU time in ms per utterance, the best of `runs` after a short first one, and the transcripts."""
    decode(log_probs[:, :20], beam_size)
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        transcripts = decode(log_probs, beam_size)
        best = min(best, time.process_time() - start)
    return 1000.0 * best / len(log_probs), transcripts


def own_decoder(merges: bool) -> Decoder:
    """`ctc_beam_search`, with or without `merge_blank_frames`."""
    import torch

    from hf_speechllm.ctc_beam_search import ctc_beam_search
    from hf_speechllm.ctc_frames import merge_blank_frames

    torch.set_num_threads(1)

    def decode(log_probs: np.ndarray, beam_size: int) -> Transcripts:
        emissions = torch.from_numpy(log_probs)
        lengths = torch.full((len(log_probs),), log_probs.shape[1])
        if merges:
            emissions, lengths, _ = merge_blank_frames(emissions, lengths, BLANK)
        best = ctc_beam_search(emissions, lengths, blank_id=BLANK, beam_size=beam_size, label_top_k=TOP_K)
        return [list(rows[0].labels) for rows in best]

    return decode


def flashlight_decoder(num_labels: int) -> Decoder:
    """Flashlight's lexicon-free decoder."""
    from flashlight.lib.text.decoder import CriterionType, LexiconFreeDecoder, LexiconFreeDecoderOptions, ZeroLM

    def decode(log_probs: np.ndarray, beam_size: int) -> Transcripts:
        options = LexiconFreeDecoderOptions(
            beam_size=beam_size,
            beam_size_token=min(TOP_K, num_labels),
            beam_threshold=1e6,
            lm_weight=0.0,
            sil_score=0.0,
            log_add=True,
            criterion_type=CriterionType.CTC,
        )
        decoder = LexiconFreeDecoder(options, ZeroLM(), -1, BLANK, [])
        transcripts = []
        for utterance in log_probs:
            utterance = np.ascontiguousarray(utterance)
            path = decoder.decode(utterance.ctypes.data, *utterance.shape)[0].tokens
            changed = [label for label, before in zip(path, [BLANK, *path], strict=False) if label != before]
            transcripts.append([label for label in changed if label not in (BLANK, -1)])
        return transcripts

    return decode


def pyctcdecode_decoder(num_labels: int) -> Decoder:
    """pyctcdecode without language model and vocabulary; each label is a character of the private-use area."""
    logging.disable(logging.WARNING)
    from pyctcdecode import build_ctcdecoder

    characters = ["", " ", *(chr(0xE000 + label) for label in range(2, num_labels))]
    decoder = build_ctcdecoder(characters)
    label_of = {character: label for label, character in enumerate(characters)}

    def decode(log_probs: np.ndarray, beam_size: int) -> Transcripts:
        texts = [decoder.decode(utterance, beam_width=beam_size) for utterance in log_probs]
        return [[label_of[character] for character in text] for text in texts]

    return decode


def run_peer(system: str, path: str, beam_size: int, runs: int) -> None:
    """Worker in the peers' environment: decodes the posteriors in `path` and prints time and transcripts as JSON."""
    log_probs = np.load(path)
    build = flashlight_decoder if system == "flashlight-text" else pyctcdecode_decoder
    print(json.dumps(timed(build(log_probs.shape[2]), log_probs, beam_size, runs)))


def words_of(transcript: list[int]) -> list[list[int]]:
    """Runs between delimiters: pyctcdecode writes one delimiter for several, and none at the ends."""
    words: list[list[int]] = [[]]
    for label in transcript:
        if label == SPACE:
            words.append([])
        else:
            words[-1].append(label)
    return [word for word in words if word]


def compare(log_probs: np.ndarray, beam_size: int, peer_python: str | None, runs: int) -> list[str]:
    """The cells of one row of the table."""
    own_ms, own = timed(own_decoder(False), log_probs, beam_size, runs)
    merged_ms, merged = timed(own_decoder(True), log_probs, beam_size, runs)

    def agreement(other: Transcripts) -> str:
        same = [words_of(one) == words_of(two) for one, two in zip(own, other, strict=True)]
        return f"{sum(same)}/{len(same)}"

    cells = [f"{own_ms:.1f}", f"{merged_ms:.1f} ({agreement(merged)})"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posteriors.npy"
        np.save(path, log_probs)
        for system in PEERS:
            if peer_python is None:
                cells.append("not run")
                continue
            command = [peer_python, __file__, "--worker", system, str(path), "--beam", str(beam_size)]
            result = subprocess.run([*command, "--runs", str(runs)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                print(result.stderr, file=sys.stderr)
                cells.append("failed")
                continue
            peer_ms, transcripts = json.loads(result.stdout)
            cells.append(f"{peer_ms:.1f} = {peer_ms / own_ms:.2f}x ({agreement(transcripts)})")
    return cells


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of the environment with flashlight-text and pyctcdecode")
    number = {"type": int, "nargs": "+"}
    add = parser.add_argument
    add("--frames", **number, default=[250, 750], metavar="T", help="frames of an utterance (default: 250 750)")
    add("--labels", **number, default=[29, 1000], metavar="A", help="label axis, blank included (default: 29 1000)")
    add("--beam", **number, default=[16, 64], metavar="N", help="hypotheses that are kept (default: 16 64)")
    add("--utterances", **number, default=[1, 8], metavar="B", help="of a batch (default: 1 8)")
    add("--runs", type=int, default=3, metavar="N", help="of each system, of which the fastest counts (default: 3)")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        run_peer(*arguments.worker, arguments.beam[0], arguments.runs)
        return
    from training.command_line import check_at_least_one, errors_in_one_line  # which the peers do not have

    with errors_in_one_line("ctc_beam_search"):
        check_at_least_one(arguments, "frames", "labels", "beam", "utterances", "runs")
        if arguments.peer_python is not None and shutil.which(arguments.peer_python) is None:
            raise FileNotFoundError(f"--peer-python: expected a program, got {arguments.peer_python}")
    print("| A | T | beam | B | ctc_beam_search, ms | merged, ms (same best) | flashlight-text, ms | pyctcdecode, ms |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for num_labels in arguments.labels:
        for num_frames in arguments.frames:
            log_probs = posteriors(max(arguments.utterances), num_frames, num_labels)
            for beam_size in arguments.beam:
                for count in arguments.utterances:
                    cells = compare(log_probs[:count], beam_size, arguments.peer_python, arguments.runs)
                    row = [str(num_labels), str(num_frames), str(beam_size), str(count), *cells]
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

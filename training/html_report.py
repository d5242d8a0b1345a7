"""A self-contained HTML page about what recognisers got wrong: no scripts, nothing loaded from elsewhere.

Systems side by side on the same utterances: figures, plots (inline SVG), and the utterances with the most errors of the
first system, each with an audio player and the words coloured by error.
"""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import soundfile as sf

from training.evaluation_data import Utterance
from training.scoring import Hallucination, SystemScore, UtteranceScore

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#00798c", "#6a4c93", "#66a182")  # of systems
ERROR_COLOURS = {"substitutions": "#d9822b", "deletions": "#7a7a7a", "insertions": "#c0392b"}
DURATION_BINS_S = (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, float("inf"))
EMBEDDED_RATE_HZ = 16000
COLUMNS = {
    "wer": "WER",
    "wer_low": "95 % from",
    "wer_high": "to",
    "leaderboard_wer": "WER, leaderboard rules",
    "cer": "CER",
    "substitutions": "substitutions",
    "deletions": "deletions",
    "insertions": "insertions",
    "hallucinations": "hallucinated utterances",
    "loops": "loops",
    "silence_outputs": "text on silence",
    "rtfx": "RTFx",
    "peak_memory_mib": "peak memory, MiB",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
article { border-top: 1px solid #ccc; padding: .7em 0; } audio { height: 2em; vertical-align: middle; }
.system { display: grid; grid-template-columns: 11em 1fr; gap: 1em; } .label { color: #555; }
del { color: #7a7a7a; } ins { color: #c0392b; text-decoration: none; font-weight: 600; }
.substitute { background: #fbe6c8; border-radius: 3px; padding: 0 .2em; } .flag { color: #c0392b; font-size: 85%; }
svg text { font: 12px system-ui, sans-serif; fill: #333; } .plots { display: flex; flex-wrap: wrap; gap: 2em; }
"""


@dataclass(frozen=True)
class SystemReport:
    """A system in the report; its scores are in the order of the report's utterances."""

    name: str
    score: SystemScore
    figures: dict[str, Any]


def html_report(
    title: str,
    utterances: Sequence[Utterance],
    systems: Sequence[SystemReport],
    folder: Path,
    notes: Sequence[str] = (),
    most: int = 200,
    embed_audio: bool = False,
) -> str:
    """The page.

    Args:
        title: of the page, as plain text like everything else here.
        utterances: what was recognised.
        systems: at least one; the first decides on the order.
        folder: where the page will lie; audio files are referred to from there.
        notes: shown under the figures.
        most: how many utterances to show.
        embed_audio: put the audio into the page (16 kHz) rather than refer to the files.
    """
    order = sorted(range(len(utterances)), key=lambda index: _badness(systems[0].score.whisper[index]), reverse=True)
    shown = order[:most]
    articles = [_article(utterances[index], index, systems, folder, embed_audio) for index in shown]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(utterances)} utterances. Percent of the reference words; Whisper's English normaliser unless named "
        "otherwise.</p>",
        _figures_table(systems),
        *(f"<p>{escape(note)}</p>" for note in notes),
        '<div class="plots">',
        wer_by_duration([utterance.entry["duration"] for utterance in utterances], systems),
        error_types(systems),
        "</div>",
        f"<h2>The {len(shown)} utterances with the most errors of {escape(systems[0].name)}</h2>",
        '<p><span class="substitute"><del>said</del> <ins>recognised</ins></span> substitution, '
        "<del>said</del> deletion, <ins>recognised</ins> insertion</p>",
        *articles,
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def diff(score: UtteranceScore) -> str:
    """Words of both sides as HTML: deletions `<del>`, insertions `<ins>`, substitutions both."""
    parts = []
    for edit in score.edits:
        reference, hypothesis = escape(edit.reference), escape(edit.hypothesis)
        if edit.kind == "equal":
            parts.append(hypothesis)
        elif edit.kind == "substitute":
            parts.append(f'<span class="substitute"><del>{reference}</del> <ins>{hypothesis}</ins></span>')
        else:
            parts.append(f"<del>{reference}</del>" if edit.kind == "delete" else f"<ins>{hypothesis}</ins>")
    return " ".join(parts)


def wer_by_duration(durations_s: Sequence[float], systems: Sequence[SystemReport]) -> str:
    """SVG: one group of bars for each class of durations with reference words, one bar for each system."""
    groups = []
    for low, high in zip(DURATION_BINS_S, DURATION_BINS_S[1:], strict=False):
        members = [index for index, duration_s in enumerate(durations_s) if low <= duration_s < high]
        words = sum(systems[0].score.whisper[index].reference_words for index in members)
        if words:
            name = f"{low:g}+ s" if high == float("inf") else f"{low:g}-{high:g} s"
            errors = [sum(system.score.whisper[index].errors for index in members) for system in systems]
            groups.append((f"{name} ({len(members)})", [100 * count / words for count in errors]))
    top = max((max(rates) for _, rates in groups), default=0.0) or 1.0
    width, height, bar = 90 * max(len(groups), 1), 180, 70 / len(systems)
    parts = ['<text x="0" y="14">WER by duration, percent (number of utterances)</text>']
    for group, (name, rates) in enumerate(groups):
        for number, rate in enumerate(rates):
            x, size = 90 * group + number * bar, 120 * rate / top
            colour = COLOURS[number % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{160 - size:.1f}" width="{bar - 2:.1f}" height="{size:.1f}" fill="{colour}">'
                f"<title>{escape(systems[number].name)}: {rate:.1f}</title></rect>"
                f'<text x="{x + bar / 2:.1f}" y="{156 - size:.1f}" text-anchor="middle">{rate:.0f}</text>'
            )
        parts.append(f'<text x="{90 * group + 35}" y="175" text-anchor="middle">{escape(name)}</text>')
    for number, system in enumerate(systems):
        y = height + 16 * (number + 1)
        parts.append(
            f'<rect x="0" y="{y - 10}" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>'
            f'<text x="16" y="{y}">{escape(system.name)}</text>'
        )
    return _svg(max(width, 320), height + 16 * len(systems) + 8, parts)


def error_types(systems: Sequence[SystemReport]) -> str:
    """SVG: one bar for each system, divided into substitutions, deletions and insertions."""
    totals = [
        {kind: sum(getattr(s, kind) for s in system.score.whisper) for kind in ERROR_COLOURS} for system in systems
    ]
    top = max(max(sum(counts.values()) for counts in totals), 1)
    parts = ['<text x="0" y="14">Errors by type, words</text>']
    for number, (system, counts) in enumerate(zip(systems, totals, strict=True)):
        x, y = 0.0, 28 + 44 * number
        parts.append(f'<text x="0" y="{y + 8}">{escape(system.name)}</text>')
        for kind, colour in ERROR_COLOURS.items():
            width = 380 * counts[kind] / top
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 13}" width="{width:.1f}" height="16" fill="{colour}">'
                f"<title>{kind}: {counts[kind]}</title></rect>"
            )
            x += width
    y = 40 + 44 * len(systems)
    for number, (kind, colour) in enumerate(ERROR_COLOURS.items()):
        parts.append(
            f'<rect x="{130 * number}" y="{y - 10}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{130 * number + 16}" y="{y}">{kind}</text>'
        )
    return _svg(400, y + 10, parts)


def _badness(score: UtteranceScore) -> tuple[int, float]:
    return score.errors, score.errors / max(score.reference_words, 1)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    # Without a name space: inside HTML none is needed, and the page then contains no address at all.
    return f'<svg width="{width:.0f}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'


def _figures_table(systems: Sequence[SystemReport]) -> str:
    header = "".join(f"<th>{label}</th>" for label in COLUMNS.values())
    rows = []
    for system in systems:
        cells = []
        for name in COLUMNS:
            value = system.figures.get(name)
            text = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
            cells.append(f"<td>{text}</td>")
        rows.append(f"<tr><td>{escape(system.name)}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>system</th>{header}</tr>{''.join(rows)}</table>"


def _article(utterance: Utterance, index: int, systems: Sequence[SystemReport], folder: Path, embed_audio: bool) -> str:
    entry = utterance.entry
    lines = [
        f"<article><div>{escape(entry['audio_filepath'])}, {entry['duration']:.1f} s "
        f"{_player(utterance, folder, embed_audio)}</div>",
        f'<div class="system"><span class="label">reference</span><span>{escape(entry["text"])}</span></div>',
    ]
    for system in systems:
        score = system.score.whisper[index]
        flags = _flags(system.score.hallucinations[index])
        lines.append(
            f'<div class="system"><span class="label">{escape(system.name)}: {score.errors} / {score.reference_words}'
            f"</span><span>{diff(score)}{flags}</span></div>"
        )
    return "\n".join([*lines, "</article>"])


def _flags(signs: Hallucination) -> str:
    found = []
    if signs.inserted_run_words:
        found.append(f"{signs.inserted_run_words} words inserted in a run")
    if signs.loop_repeats:
        found.append(f"loop of {signs.loop_repeats}")
    if signs.words_on_silence:
        found.append("text on silence")
    return f' <span class="flag">[{", ".join(found)}]</span>' if found else ""


def _player(utterance: Utterance, folder: Path, embed_audio: bool) -> str:
    if embed_audio:
        buffer = io.BytesIO()
        sf.write(buffer, utterance.waveform(EMBEDDED_RATE_HZ), EMBEDDED_RATE_HZ, format="WAV", subtype="PCM_16")
        source = "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    elif isinstance(utterance.audio, bytes):
        return "(audio not in a file; --embed-audio puts it here)"
    else:
        source = quote(Path(os.path.relpath(utterance.audio, folder)).as_posix())
        if "offset" in utterance.entry:  # a media fragment: the part of the file to play
            start_s = utterance.entry["offset"]
            source += f"#t={start_s:.2f},{start_s + utterance.entry['duration']:.2f}"
    return f'<audio controls preload="none" src="{escape(source)}"></audio>'

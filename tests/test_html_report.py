"""The report is a well-formed page that needs nothing else, and shows what the scores say."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile as sf

from training.evaluation_data import Utterance
from training.html_report import SystemReport, diff, html_report
from training.scoring import score_system, score_utterance

HOSTILE = "<script>alert(\"x\")</script> & 'b'"
VOID = {"meta", "rect", "audio"}


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and texts."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.sources = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta" and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID or self.open and self.open[-1] == tag:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def audio(tmp_path):
    path = tmp_path / "audio" / "a b#1.wav"
    path.parent.mkdir()
    sf.write(path, np.linspace(-0.5, 0.5, 8000, dtype=np.float32), 8000)
    return path


def report(utterances, hypotheses, **options):
    references = [utterance.entry["text"] for utterance in utterances]
    systems = []
    for name, texts in hypotheses.items():
        score = score_system(references, texts, str.lower)
        systems.append(SystemReport(name, score, {**score.figures, "rtfx": 2.0, "peak_memory_mib": None}))
    return html_report(options.pop("title", "T"), utterances, systems, **options)


def utterance(index, path, text, **entry):
    return Utterance(index, {"audio_filepath": str(path), "text": text, "duration": 0.5, **entry}, path)


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path, audio):
    utterances = [utterance(0, audio, f"hello {HOSTILE}"), utterance(1, audio, "good day", offset=0.25)]
    systems = {f"A {HOSTILE}": [f"hullo {HOSTILE}", "good day"], "B": ["hello", "good grey day"]}
    text = report(utterances, systems, title=HOSTILE, folder=tmp_path, notes=[HOSTILE])
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "<script" not in text
    assert "http:" not in text and "https:" not in text and "//" not in text.replace("<!DOCTYPE html>", "")
    assert page.tags.count("svg") == 2 and page.tags.count("article") == 2
    assert any(HOSTILE in data for data in page.texts)
    assert sorted(page.sources) == ["audio/a%20b%231.wav", "audio/a%20b%231.wav#t=0.25,0.75"]


def test_worst_utterances_come_first_and_the_rest_is_left_out(tmp_path, audio):
    references = ["one word", "two of these words", "three"]
    utterances = [utterance(index, audio, text) for index, text in enumerate(references)]
    text = report(utterances, {"A": ["one word", "no", ""]}, folder=tmp_path, most=2)
    assert "The 2 utterances with the most errors of A" in text
    assert text.index(">two of these words<") < text.index(">three<") and ">one word<" not in text


def test_differences_are_marked():
    score = score_utterance("a b c", "a x c d")
    assert diff(score) == 'a <span class="substitute"><del>b</del> <ins>x</ins></span> c <ins>d</ins>'
    assert diff(score_utterance("a <b>", "a")) == "a <del>&lt;b&gt;</del>"


def test_flags_of_hallucinations(tmp_path, audio):
    utterances = [utterance(0, audio, ""), utterance(1, audio, "a")]
    text = report(utterances, {"A": ["so so so", "a b b b b"]}, folder=tmp_path)
    assert "[3 words inserted in a run, loop of 3, text on silence]" in text
    assert "[4 words inserted in a run, loop of 4]" in text


def test_plots_show_the_rates(tmp_path, audio):
    utterances = [
        utterance(0, audio, "a b", duration=1.0),
        utterance(1, audio, "a b c d", duration=7.0),
        utterance(2, audio, "a b c d", duration=9.9),
        utterance(3, audio, "a", duration=99.0),
    ]
    text = report(utterances, {"A": ["a x", "a b c d", "a b c", "a b b"]}, folder=tmp_path)
    titles = text.split("<title>")[1:]
    assert [title.split("</title>")[0] for title in titles[1:5]] == [
        "A: 50.0",
        "A: 12.5",
        "A: 200.0",
        "substitutions: 1",
    ]
    assert ">0-2 s (1)<" in text and ">5-10 s (2)<" in text and ">30+ s (1)<" in text and ">2-5 s" not in text
    assert "deletions: 1" in text and "insertions: 2" in text


def test_only_silence_has_a_report_too(tmp_path, audio):
    page = Page(report([utterance(0, audio, "")], {"A": [""]}, folder=tmp_path))
    assert page.tags.count("article") == 1
    assert "nan" not in " ".join(page.texts).lower() and "inf" not in " ".join(page.texts).lower()


def test_embedded_audio_is_the_part_that_was_recognised(tmp_path, audio):
    cut = utterance(0, audio, "x", offset=0.25)
    (source,) = Page(report([cut], {"A": ["y"]}, folder=tmp_path, embed_audio=True)).sources
    head, data = source.split(",")
    assert head == "data:audio/wav;base64"
    samples, rate = sf.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 16000 and len(samples) == 8000 and samples[0] == pytest.approx(-0.25, abs=0.02)


def test_bytes_have_no_player(tmp_path):
    text = report([utterance(0, b"", "x")], {"A": ["y"]}, folder=tmp_path)
    assert "<audio" not in text and "audio not in a file" in text

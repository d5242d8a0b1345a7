"""Manifests of recorded speech: references in the form of the training targets, decoding to 16 kHz."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from training import real_speech
from training.real_speech import POCKETSPHINX, Recording, librivox_recordings, reference_text
from training.real_speech import write_manifest as write


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Press 2, then # or *.", "press two then pound or star"),
        ("3D sound", "three d sound"),
        ("the 2nd of 14", "the second of fourteen"),
        ("A frog.", "a frog"),
    ],
)
def test_reference_text(raw: str, text: str):
    assert reference_text(raw) == text


def test_librivox_transcription(tmp_path):
    folder = tmp_path / POCKETSPHINX.folder_name / "usr/share/pocketsphinx/test/data/librivox"
    folder.mkdir(parents=True)
    (folder / "transcription").write_text("<s> he was not an ill disposed young man </s> (sense-0880)\n")
    (recording,) = librivox_recordings(tmp_path)
    assert recording.text == "he was not an ill disposed young man"
    assert recording.audio == folder / "sense-0880.wav"


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg decodes the recordings")
def test_write_manifest_cuts_clips(tmp_path):
    audio = tmp_path / "clip.wav"
    soundfile.write(audio, np.repeat(np.float32([0.0, 0.5, 0.0]), 16000), 16000)
    (record,) = write(iter([Recording(audio, "middle", "here", "CC0", clip_s=(1.0, 2.0))]), tmp_path, "set")
    waveform, _ = soundfile.read(tmp_path / record["audio_filepath"])
    assert len(waveform) == 16000
    assert waveform.min() > 0.4


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg decodes the recordings")
def test_write_manifest_resamples(tmp_path):
    audio = tmp_path / "clip.wav"
    soundfile.write(audio, np.zeros((4410, 2), np.float32), 44100)
    (record,) = write(iter([Recording(audio, "Hello, 2!", "here", "CC0")]), tmp_path / "out", "set")
    assert soundfile.info(tmp_path / "out" / record["audio_filepath"]).samplerate == 16000
    assert record["text"] == "hello two"
    assert record["duration"] == pytest.approx(0.1, abs=0.001)
    assert [json.loads(line) for line in (tmp_path / "out/set.jsonl").read_text().splitlines()] == [record]


def test_manifest_needs_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="ffmpeg"):
        write(iter([]), tmp_path, "set")


def test_a_share_of_the_recordings_is_the_first_of_each_set(tmp_path, monkeypatch):
    written = {}

    def note(recordings, out, name):
        written[name] = [recording.text for recording in recordings]
        return [{"duration": 1.0 + index % 2} for index in range(len(written[name]))]

    recordings = [Recording(tmp_path, str(index), "here", "CC0") for index in range(100)]
    for name in ("asterisk", "librivox", "dev"):
        monkeypatch.setattr(real_speech, f"{name}_recordings", lambda cache: iter(recordings))
    monkeypatch.setattr(real_speech, "write_manifest", note)
    for share, count in ((1.0, 100), (0.5, 50), (0.001, 20)):
        real_speech.make_manifests(tmp_path, tmp_path, share)
        assert written == dict.fromkeys(("asterisk", "librivox", "dev"), [str(index) for index in range(count)])
    assert len((tmp_path / "asterisk_2s.jsonl").read_text().splitlines()) == 10
    assert not real_speech.is_made(tmp_path)

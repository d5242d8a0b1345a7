"""Readers of the games' archives, on archives written here by the same specification, and labels by a recogniser."""

import io
import json
import struct

import numpy as np
import pytest
import soundfile
import torch
from transformers import MoonshineConfig, MoonshineForConditionalGeneration

from training import game_speech, pseudo_labels
from training.game_speech import Clip, amazon_queen_clips, drascula_clips, steel_sky_clips
from training.pseudo_labels import Transcription, joined_lines, label, transcribe, transcribe_clips, write_shards
from training.shards import Utterance


def _tone(samples: int, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)).astype(np.float32)


def _bytes(waveform: np.ndarray) -> bytes:
    return np.round(waveform * 127 + 128).astype(np.uint8).tobytes()


def _is_tone(waveform: np.ndarray) -> bool:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return abs(spectrum.argmax() * 16000 / len(waveform) - 440) < 5


@pytest.fixture
def package_folder(tmp_path, monkeypatch):
    """Where `fetch` finds the package under test."""
    monkeypatch.setattr(game_speech, "fetch", lambda package, cache: cache)
    return tmp_path


def test_amazon_queen_speech_is_found_by_its_suffix(package_folder):
    folder = package_folder / "usr/share/scummvm/flight-of-the-amazon-queen"
    folder.mkdir(parents=True)
    audio = io.BytesIO()
    soundfile.write(audio, _tone(22050, 11025), 11025, format="MP3")
    files = {b"020001P2.SB": audio.getvalue(), b"QUEEN.JAS": b"not speech", b"020006J1.SB": audio.getvalue()}
    start, entries, contents = 15 + 21 * len(files), b"", b""
    for name, content in files.items():
        entries += struct.pack(">12sBII", name, 1, start + len(contents), len(content))
        contents += content
    header = b"QTBLCEM10\0\0\0\x01" + struct.pack(">H", len(files))
    (folder / "queen.1c").write_bytes(header + entries + contents)
    clips = list(amazon_queen_clips(package_folder))
    assert [clip.name for clip in clips] == ["020001P2", "020006J1"]
    assert all(abs(len(clip.waveform) / 16000 - 2.0) < 0.2 and _is_tone(clip.waveform) for clip in clips)


@pytest.mark.parametrize("shifted", [False, True])
def test_steel_sky_speech_is_found_by_its_number(package_folder, monkeypatch, shifted):
    monkeypatch.setattr(game_speech.shutil, "which", lambda name: name)
    folder = package_folder / "usr/share/scummvm/beneath-a-steel-sky"
    folder.mkdir(parents=True)
    line = b"\0" * 22 + _bytes(_tone(11025, 11025))
    offset = 1600
    (folder / "sky.dsk").write_bytes(b"\x55" * offset + line + b"\x55" * 100)
    field = (1 << 23 | offset >> 4) if shifted else offset
    entries = [(40001, 0, 1000), (50007, field, len(line) | 1 << 22), (60111, 0, 1000)]
    directory = struct.pack("<I", len(entries))
    for number, where, size in entries:
        directory += struct.pack("<H", number) + where.to_bytes(3, "little") + size.to_bytes(3, "little")
    (folder / "sky.dnr").write_bytes(directory)
    (clip,) = steel_sky_clips(package_folder)
    assert clip.name == "50007" and len(clip.waveform) == 16000 and _is_tone(clip.waveform)


def test_steel_sky_needs_the_unpacker(package_folder, monkeypatch):
    monkeypatch.setattr(game_speech.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="`ancient`, install it"):
        next(steel_sky_clips(package_folder))


def test_drascula_speech(package_folder):
    folder = package_folder / "usr/share/scummvm/drascula/en"
    folder.mkdir(parents=True)
    (folder / "D2.ALS").write_bytes(_bytes(_tone(11025, 11025)))
    (folder / "D1.ALG").write_bytes(b"a picture")
    (clip,) = drascula_clips(package_folder)
    assert clip.name == "D2" and len(clip.waveform) == 16000 and _is_tone(clip.waveform)


def test_labels_are_the_words_of_a_sure_recogniser():
    assert label(Transcription("It's 5 o'clock, Joe!", -0.1)) == "it's five o'clock joe"
    assert label(Transcription("It's 5 o'clock, Joe!", -0.26)) is None
    assert label(Transcription("...", -0.1)) is None
    assert label(Transcription("Aaah, too far!", -0.1)) == "aaah too far"
    assert label(Transcription("Ahhhhhhhhh!", -0.1)) is None


def _clips(lengths_s: list[float]) -> list[Clip]:
    return [Clip(f"{i:02d}", np.full(int(s * 16000), 0.01 * (i + 1), np.float32)) for i, s in enumerate(lengths_s)]


def test_joined_lines_keep_every_line_once_and_in_order():
    clips = _clips([1.0, 2.0, 9.0, 1.0, 6.0, 3.0, 1.0, 1.0])
    texts = {clip.name: f"line{clip.name}" for clip in clips if clip.name != "03"}
    utterances = list(joined_lines(clips, texts, np.random.default_rng(3), {"engine": "queen"}))
    assert all(utterance.origin == {"engine": "queen"} for utterance in utterances)
    assert " ".join(utterance.text for utterance in utterances).split() == [
        f"line{i:02d}" for i in (0, 1, 2, 4, 5, 6, 7)
    ]
    assert any(len(utterance.text.split()) > 1 for utterance in utterances)
    for waveform, text in ((utterance.waveform, utterance.text) for utterance in utterances):
        assert len(waveform) / 16000 <= 14.0 + 0.7 * len(text.split())
        assert "line02 line04" not in text  # line 3 lies between them
        heard = [f"line{round(value * 100) - 1:02d}" for value in dict.fromkeys(waveform[waveform > 0].tolist())]
        assert heard == text.split()


def test_shards_hold_the_utterances(tmp_path):
    utterances = [
        Utterance(clip.waveform, f"text {clip.name}", {"licence": "free"}) for clip in _clips([1.0, 2.0, 1.5])
    ]
    assert write_shards(iter(utterances), tmp_path, "queen", 2.5) == ["queen-00000", "queen-00001"]
    records = [json.loads(line) for path in sorted(tmp_path.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert [record["audio_filepath"] for record in records] == ["queen-00000.flac"] * 2 + ["queen-00001.flac"]
    for record, utterance in zip(records, utterances, strict=True):
        start, waveform, text = round(record["offset"] * 16000), utterance.waveform, utterance.text
        read, _ = soundfile.read(tmp_path / record["audio_filepath"], start=start, frames=len(waveform))
        assert record["text"] == text and record["licence"] == "free"
        assert np.abs(read - waveform).max() < 1e-4 and round(record["duration"] * 16000) == len(waveform)


@pytest.fixture
def recogniser():
    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
        decoder_start_token_id=1,
    )
    model = MoonshineForConditionalGeneration(config).eval()
    model.proj_out.weight.data *= 30  # sure of itself, so that lengths differ

    class Processor:
        class tokenizer:
            @staticmethod
            def batch_decode(ids, skip_special_tokens):
                return [" ".join(str(i) for i in row.tolist()[1:] if i != 2) for row in ids]

        def __call__(self, waveforms, sampling_rate, return_tensors, padding):
            longest = max(map(len, waveforms))
            values = torch.stack([torch.tensor(np.pad(w, (0, longest - len(w)))) for w in waveforms])
            mask = torch.stack([(torch.arange(longest) < len(w)).long() for w in waveforms])
            return {"input_values": values, "attention_mask": mask}

    return model, Processor()


def test_mean_log_prob_is_that_of_the_models_own_choice(recogniser):
    model, processor = recogniser
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(16000).astype(np.float32) for _ in range(4)]
    for row, heard in zip(waveforms, transcribe(model, processor, waveforms), strict=True):
        tokens = [int(word) for word in heard.text.split()]
        decoder_ids = torch.tensor([[1, *tokens]])
        with torch.no_grad():
            output = model(input_values=torch.tensor(row)[None], decoder_input_ids=decoder_ids)
        log_probs = output.logits[0].log_softmax(-1)
        ended = len(tokens) < 16 + 7  # otherwise the limit cut it off, without EOS
        chosen = [*tokens, 2] if ended else tokens
        expected = sum(log_probs[i, token].item() for i, token in enumerate(chosen)) / len(chosen)
        assert heard.mean_log_prob == pytest.approx(expected, abs=1e-3)


def test_transcription_goes_on_after_a_kill(recogniser, tmp_path, monkeypatch):
    model, processor = recogniser
    monkeypatch.setattr(pseudo_labels.hf_speechllm, "base_model", lambda name: "somewhere")
    monkeypatch.setattr(pseudo_labels.AutoModelForSpeechSeq2Seq, "from_pretrained", lambda folder: model)
    monkeypatch.setattr(pseudo_labels.AutoProcessor, "from_pretrained", lambda folder: processor)
    rng = np.random.default_rng(1)
    clips = [Clip(str(i), rng.standard_normal(16000).astype(np.float32)) for i in range(5)]
    path = tmp_path / "game.jsonl"
    whole = transcribe_clips(clips, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])
    assert transcribe_clips(clips, path) == whole
    assert transcribe_clips(clips, path) == whole


def test_the_last_shard_of_a_game_is_development_data(tmp_path, monkeypatch):
    clips = _clips([1.0, 2.0, 1.5, 20.0, 0.1])
    heard = {clip.name: Transcription(f"Line {clip.name}.", -0.1) for clip in clips}
    package = game_speech.Package("debian", "some-game", "", "free")
    monkeypatch.setattr(pseudo_labels, "GAMES", {"some": (package, lambda cache: iter(reversed(clips)))})
    monkeypatch.setattr(pseudo_labels, "transcribe_clips", lambda clips, path: {c.name: heard[c.name] for c in clips})
    monkeypatch.setattr(pseudo_labels, "JOIN_PROBABILITY", 0.0)
    monkeypatch.setattr(pseudo_labels, "SHARD_S", 2.5)
    arguments = ["--cache", tmp_path, "--out", tmp_path / "train", "--dev-out", tmp_path / "dev"]
    monkeypatch.setattr("sys.argv", ["pseudo_labels", *map(str, arguments)])
    pseudo_labels.main()
    texts = {
        folder: [
            json.loads(line)["text"]
            for path in sorted((tmp_path / folder).glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        for folder in ("train", "dev")
    }
    assert texts == {"train": ["line zero", "line one"], "dev": ["line two"]}  # too long and too short: left out
    before = sorted(path.name for path in tmp_path.rglob("*"))
    pseudo_labels.main()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert {path.suffix for path in (tmp_path / "dev").iterdir()} == {".flac", ".jsonl"}


def test_a_game_is_made_once_all_of_its_shards_are_there(tmp_path, monkeypatch):
    """A kill between two shards leaves some of them in the folder for training, and none for development."""
    clips = _clips([1.0] * 8)
    heard = {clip.name: Transcription(f"Line {clip.name}.", -0.1) for clip in clips}
    package = game_speech.Package("debian", "some-game", "", "free")
    monkeypatch.setattr(pseudo_labels, "GAMES", {"some": (package, lambda cache: iter(clips))})
    monkeypatch.setattr(pseudo_labels, "transcribe_clips", lambda clips, path: {c.name: heard[c.name] for c in clips})
    monkeypatch.setattr(pseudo_labels, "SHARD_S", 1.0)
    train, dev = tmp_path / "train", tmp_path / "dev"
    write_shard = pseudo_labels.write_shard
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(utterances, out, name):
            if name.endswith("2"):
                raise KeyboardInterrupt
            return write_shard(utterances, out, name)

        patch.setattr(pseudo_labels, "write_shard", interrupted)
        pseudo_labels.make_game("some", tmp_path, train, dev)
    assert list(train.glob("*.jsonl")) and not pseudo_labels.is_made("some", dev)
    pseudo_labels.make_game("some", tmp_path, train, dev)
    assert pseudo_labels.is_made("some", dev)


def test_a_share_of_a_game_is_its_first_lines_in_shorter_shards(tmp_path, monkeypatch):
    clips = _clips([1.0] * 60)
    package = game_speech.Package("debian", "some-game", "", "free")
    monkeypatch.setattr(pseudo_labels, "GAMES", {"some": (package, lambda cache: iter(clips))})
    sure = Transcription("Yes.", -0.1)
    monkeypatch.setattr(pseudo_labels, "transcribe_clips", lambda clips, path: {c.name: sure for c in clips})
    monkeypatch.setattr(pseudo_labels, "SHARD_S", 40.0)
    words = []
    for share in (0.01, 0.5):
        out = tmp_path / str(share)
        pseudo_labels.make_game("some", tmp_path, out / "train", out / "dev", share)
        manifests = out.rglob("*.jsonl")
        words.append("".join(path.read_text() for path in manifests).count("yes"))
        share_s = max(sum(json.loads(x)["duration"] for x in p.read_text().splitlines()) for p in out.rglob("*.jsonl"))
        assert share_s < 40 * share + 16
    assert words == [pseudo_labels.MIN_LINES, 30]


def test_too_few_sure_lines_are_an_error(tmp_path, monkeypatch):
    clips = _clips([1.0, 1.0])
    package = game_speech.Package("debian", "some-game", "", "free")
    monkeypatch.setattr(pseudo_labels, "GAMES", {"some": (package, lambda cache: iter(clips))})
    monkeypatch.setattr(
        pseudo_labels, "transcribe_clips", lambda clips, path: {c.name: Transcription("hm", -1) for c in clips}
    )
    with pytest.raises(RuntimeError, match="some: 0 of 2 lines are sure, too few for two shards"):
        pseudo_labels.make_game("some", tmp_path, tmp_path / "train", tmp_path / "dev")
    assert not pseudo_labels.is_made("some", tmp_path / "dev")

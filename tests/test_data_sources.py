"""training.data_sources, row_reader, data: formats, bad rows, mixing, streaming, resuming."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_data import RATE, encoded, loquacious_columns, sweep, write_hub_folder, write_parquet
from tiny_models import AUDIO_CONFIGS, tiny_model, tiny_processor
from torch.utils.data import DataLoader

from hf_speechllm.data_collator import SpeechLLMDataCollator
from training.arguments import DataArguments
from training.augment import AugmentOptions
from training.batching import DurationBatchSampler, duration_classes, plan_batches
from training.ctc_fit import CTCFit
from training.data import (
    LeftOut,
    RowLoader,
    SpeechDataset,
    StreamingBatches,
    TrainingCollator,
    load_evaluation_data,
    load_training_data,
)
from training.data_report import BadRow, DataReport, merge
from training.data_sources import Row, SourceOptions, Stream, Table, open_source
from training.row_reader import Recording, RowReader
from training.trainer import StreamLoader

pytestmark = pytest.mark.usefixtures("quick_data_sets")

TEXTS = ["the thing", "an inn", "a ring", "the king", "in the", "hat", "thing a"]
DURATIONS_S = [1.0, 0.6, 0.8, 0.9, 0.5, 0.4, 0.7]
NO_DISTORTION = RowLoader(RowReader(RATE))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """The same utterances in every format."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        columns = loquacious_columns(TEXTS, DURATIONS_S)
        files = [{name: values[start : start + 2] for name, values in columns.items()} for start in range(0, 7, 2)]
        write_hub_folder(folder / "hub", {("small", "train"): files, ("small", "dev"): files[:1]}, "wav")
        plain = {name: values for name, values in columns.items() if name != "duration"}
        write_parquet(folder / "plain.parquet", plain, "wav")
        dataset = datasets.load_dataset("parquet", data_files=str(folder / "plain.parquet"), split="train")
        dataset.save_to_disk(folder / "saved")
        datasets.DatasetDict({"train": dataset}).save_to_disk(folder / "saved_dict")
        for name in ("audio", "audio/train"):
            (folder / name).mkdir()
        for index, content in enumerate(columns["wav"]):
            (folder / f"audio/train/{index}.flac").write_bytes(content)
        lines = [json.dumps({"file_name": f"{index}.flac", "text": text}) for index, text in enumerate(TEXTS)]
        (folder / "audio/train/metadata.jsonl").write_text("\n".join(lines))
        lines = [f"train/{index}.flac,{text}" for index, text in enumerate(TEXTS)]
        (folder / "audio/metadata.csv").write_text("\n".join(["file_name,sentence", *lines]))
        lines = [
            json.dumps({"audio_filepath": f"audio/train/{index}.flac", "text": text, "duration": duration_s})
            for index, (text, duration_s) in enumerate(zip(TEXTS, DURATIONS_S, strict=True))
        ]
        (folder / "m.jsonl").write_text("\n".join(lines))
        yield folder


SOURCES = {
    "hub": {"path": "hub", "name": "small", "split": "train"},
    "parquet": {"path": "parquet", "data_files": "plain.parquet"},
    "saved": {"path": "saved"},
    "saved_dict": {"path": "saved_dict", "split": "train", "text_column": "text", "audio_column": "wav"},
    "audiofolder": {"path": "audiofolder", "data_dir": "audio"},
    "audiofolder csv": {"path": "audiofolder", "data_dir": "audio", "split": "."},
    "manifest": {"path": "m*.jsonl"},
}
STREAMED = ("hub", "parquet", "saved", "saved_dict")


def opened(values: dict, data_dir: Path):
    return open_source(SourceOptions.parse(values, "here"), data_dir)


def options(**values) -> DataArguments:
    return DataArguments(**{"batch_duration_s": 2.0, "max_duration_s": 2.0, "augment": False, **values})


# Formats.


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_gives_the_same_utterances(data_dir, name):
    table = opened(SOURCES[name], data_dir)
    assert len(table) == 7
    np.testing.assert_allclose(table.durations_s(), DURATIONS_S, atol=1e-6)
    for index in (0, 3, 6):
        recording = RowReader(RATE).read(table[index])
        assert recording.text == TEXTS[index] and recording.conversions == ()
        expected = sweep(DURATIONS_S[index], 150 * (index + 1))
        np.testing.assert_allclose(recording.waveform, expected, atol=1e-4)


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_data_gives_the_same_utterances_to_one_process_each(data_dir, name):
    stream = opened({**SOURCES[name], "streaming": True}, data_dir)
    assert isinstance(stream, Stream)
    assert [row.text for row in stream.first(3)] == TEXTS[:3]
    whole = [row.text for row in stream.rows(0, seed=1, process_index=0, num_processes=1)]
    assert sorted(whole) == sorted(TEXTS)
    for processes in (2, 3):
        shares = [[row.text for row in stream.rows(0, 1, index, processes)] for index in range(processes)]
        assert sorted(sum(shares, [])) == sorted(TEXTS)


def test_every_pass_over_a_stream_takes_the_files_in_another_order_and_the_same_for_a_seed(data_dir):
    stream = opened({**SOURCES["hub"], "streaming": True}, data_dir)
    passes = [[row.text for row in stream.rows(number, 3, 0, 1)] for number in range(6)]
    assert len({tuple(each) for each in passes}) > 1
    again = opened({**SOURCES["hub"], "streaming": True}, data_dir)
    assert [[row.text for row in again.rows(number, 3, 0, 1)] for number in range(6)] == passes


def test_rows_are_named_by_position_and_id(data_dir):
    assert opened(SOURCES["hub"], data_dir)[2].row == "3 (utterance-2)"
    assert opened(SOURCES["manifest"], data_dir)[2].row == 3
    assert opened(SOURCES["audiofolder"], data_dir)[2].source == "audiofolder:audio:train"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "small"}, "here: expected a mapping with 'path', got"),
        ("hub", "here: expected a mapping with 'path', got 'hub'"),
        ({"path": "hub", "splits": "train"}, "here: unknown key 'splits'; known are"),
        ({"path": "hub", "weight": 0}, "here: weight must be positive, got 0"),
    ],
    ids=str,
)
def test_a_source_of_another_form_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SourceOptions.parse(values, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**SOURCES["hub"], "text_column": "words"}, "text_column must be a column .'words' is expected"),
        ({**SOURCES["hub"], "audio_column": "sound"}, "audio_column must be a column"),
        ({**SOURCES["hub"], "duration_column": "length"}, "duration_column must be a column"),
        ({**SOURCES["hub"], "split": "test"}, "data source hub:small:test: cannot be opened"),
        ({"path": "none.jsonl"}, "manifest 'none.jsonl' matches no file"),
        ({"path": "audiofolder", "data_dir": "hub"}, "no metadata.jsonl or metadata.csv in .*hub"),
        ({"path": "audiofolder", "data_dir": "audio", "text_column": "words"}, "row 1: expected 'file_name' and words"),
    ],
    ids=str,
)
def test_a_source_that_cannot_be_opened_is_told(data_dir, values, message):
    with pytest.raises(ValueError, match=message):
        opened(values, data_dir)


@pytest.mark.parametrize(("line", "found"), [("{", "expected a JSON object, got '{'"), ("3", "a JSON object, got '3'")])
def test_a_manifest_line_that_is_no_object_is_named(tmp_path, line, found):
    (tmp_path / "m.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"m.jsonl:1: .*{found}"):
        opened({"path": "m.jsonl"}, tmp_path)


# Bad rows.


def bad_rows(folder: Path) -> dict[str, Row]:
    """One row of each kind, by kind."""
    tone = sweep(0.5, 300)
    with_nan = tone.copy()
    with_nan[100:103] = np.nan, np.inf, -np.inf
    contents = {
        "not_finite": encoded(with_nan, kind="WAV", subtype="FLOAT"),
        "empty_audio": encoded(tone[:0], kind="WAV"),
        "unreadable": b"this is no audio",
        "sampling_rate": encoded(tone, 8000),
        "channels": encoded(np.stack([tone, tone], 1)),
    }
    rows = {kind: Row("s", kind, content, "a") for kind, content in contents.items()}
    good = encoded(tone)
    (folder / "good.flac").write_bytes(good)
    return {
        **rows,
        "missing_file": Row("s", "missing_file", folder / "none.wav", "a"),
        "truncated": Row("s", "truncated", folder / "good.flac", "a", 0.9, 0.0),
        "no_text": Row("s", "no_text", good, None),
        "empty_text": Row("s", "empty_text", good, " \n"),
        "unspellable": Row("s", "unspellable", good, "a B"),
        "too_many_labels": Row("s", "too_many_labels", good, "a hat " * 9),
        "duration": Row("s", "duration", good, "a", math.nan, 0.0),
    }


@pytest.fixture(scope="module")
def strict_reader() -> RowReader:
    return RowReader(RATE, convert_audio=False, ctc_fit=CTCFit.of_model(tiny_model(), tiny_processor()))


def test_each_kind_of_bad_row_is_recognised(tmp_path, strict_reader):
    rows = bad_rows(tmp_path)
    found = {kind: strict_reader.read(row) for kind, row in rows.items() if kind != "duration"}
    found["duration"] = strict_reader.duration_s(rows["duration"])
    assert {kind: each.kind for kind, each in found.items()} == {kind: kind for kind in rows}
    assert found["not_finite"].detail == "3 of 8000 samples"
    assert found["too_many_labels"].detail.startswith("45 frames needed, ")
    assert found["truncated"].detail == "0.50 s of 0.90 s are there"
    assert isinstance(strict_reader.read(Row("s", 1, encoded(sweep(0.5, 300)), "a hat")), Recording)
    assert strict_reader.read(Row("s", 1, None, "a")).kind == "missing_file"


def test_another_rate_and_several_channels_are_converted_on_demand():
    left, right = sweep(0.5, 300), sweep(0.5, 500)
    recording = RowReader(RATE).read(Row("s", 1, encoded(np.stack([left, right], 1)), "a"))
    assert recording.conversions == ("channels_averaged",)
    np.testing.assert_allclose(recording.waveform, (left + right) / 2, atol=1e-4)
    time_s = np.arange(4000) / 8000
    recording = RowReader(RATE).read(Row("s", 1, encoded(np.sin(2 * np.pi * 400 * time_s) / 2, 8000), "a"))
    assert recording.conversions == ("resampled",) and len(recording.waveform) == 8000
    expected = np.sin(2 * np.pi * 400 * np.arange(8000) / RATE) / 2
    np.testing.assert_allclose(recording.waveform[500:-500], expected[500:-500], atol=2e-3)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("none", "Dr. O'Neil\u2019s 'Rock-n-roll', 2 x!"),
        ("lower", "dr. o'neil\u2019s 'rock-n-roll', 2 x!"),
        ("lower_no_punctuation", "dr o'neil's rock n roll 2 x"),
        ("spoken_english", "doctor o'neil's rock n roll two x"),
    ],
)
def test_transcripts_are_normalised_by_name(normalization, expected):
    row = Row("s", 1, encoded(sweep(0.5, 300)), "Dr. O'Neil\u2019s 'Rock-n-roll', 2 x!")
    assert RowReader(RATE, normalization).read(row).text == expected


def test_empty_texts_may_be_kept():
    row = Row("s", 1, encoded(sweep(0.5, 300)), "")
    assert RowReader(RATE, empty_text="keep").read(row).text == ""
    assert RowReader(RATE, "lower_no_punctuation").read(replace(row, text="...")).kind == "empty_text"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bad_data": "ignore"}, "bad_data must be 'refuse' or 'skip', got 'ignore'"),
        ({"text_normalization": "upper"}, "text_normalization must be one of .*got 'upper'"),
        ({"empty_text": "skip"}, "empty_text must be 'bad' or 'keep', got 'skip'"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
        ({"augment_options": {"speed": 1}}, "augment_options: unknown key 'speed'; known are"),
        ({"augment_options": {"noise_prob": 2}}, "augment_options: noise_prob: expected a probability"),
        ({"augment_options": {"speed_factors": [0.9, 0]}}, "speed_factors: expected positive factors"),
        ({"spec_augment_options": {"schedule_steps": [3, 2, 1]}}, "schedule_steps: expected three steps in order"),
        ({"train_sources": [{"path": "x", "nam": "y"}]}, "train_sources, entry 1: unknown key 'nam'"),
        ({"eval_sources": {"dev": {}}}, "eval_sources, dev: expected a mapping with 'path'"),
    ],
    ids=str,
)
def test_options_of_the_data_are_verified(values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**values)


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_frames_are_counted_as_the_encoder_makes_them(audio):
    model, processor = tiny_model(audio), tiny_processor(audio)
    fit = CTCFit.of_model(model, processor)
    for samples in (1600, 5003, 16000, 40001, 100_000):
        inputs = processor(np.zeros(samples, np.float32))
        frames = int(model.encode(inputs["input_features"], inputs["input_features_mask"]).encoder_out_lens)
        assert frames - 3 < fit.num_frames(samples / RATE) <= frames
    assert fit.frames_needed("") == 0 and fit.frames_needed("x B") is None


def test_labels_in_a_row_need_a_blank_between_them():
    fit = CTCFit.of_model(tiny_model(), tiny_processor())
    targets = tiny_model().ctc_targets(tiny_processor()(text="a hoot")["labels"])
    assert fit.frames_needed("a hoot") == int((targets >= 0).sum()) + 1


def test_a_distortion_after_which_the_labels_do_not_fit_is_not_used(strict_reader):
    fast = AugmentOptions(**{name: 0.0 for name in vars(AugmentOptions()) if name.endswith("_prob")})
    fast = replace(fast, speed_prob=1.0, speed_factors=(1.9,))
    loader = RowLoader(strict_reader, fast)
    audio = encoded(sweep(0.5, 300))
    long = loader.load(Row("s", 1, audio, "bcbcbcbcbcbcbc"), [0])
    assert long["conversions"] == ("undistorted",) and len(long["waveform"]) == 8000
    short = loader.load(Row("s", 1, audio, "hat"), [0])
    assert short["conversions"] == () and len(short["waveform"]) < 4300


# The report.


def test_bad_rows_are_refused_or_counted_once_each():
    row = BadRow("s", 3, "empty_text", "''")
    with pytest.raises(ValueError, match=r"^s, row 3: empty_text .the transcript is empty.: ''; correct it, or leave"):
        DataReport(refuse=True).add_bad(row)
    report = DataReport()
    for each in (row, row, BadRow("s", 4, "empty_text", "''"), BadRow("t", 3, "unreadable", "x")):
        report.add_bad(each)
    assert report.bad_counts() == {"unreadable": 1, "empty_text": 2}
    assert report.bad["s", 3] == (row, 2)


def test_a_report_is_saved_with_every_row_and_comes_back(tmp_path):
    report = DataReport(utterances=5, audio_s=7200.0)
    report.add_bad(BadRow("s", "3 (x)", "unreadable", "\u00e4"))
    report.outside_limits["s", "too_long"] += 4
    report.add_conversion("s", 1, "resampled")
    report.save(tmp_path)
    loaded = DataReport.load(tmp_path)
    assert loaded == report
    content = json.loads((tmp_path / "data_report.json").read_text())
    assert content["bad_rows"] == [
        {"source": "s", "row": "3 (x)", "kind": "unreadable", "detail": "\u00e4", "times": 1}
    ]
    assert report.summary().splitlines() == [
        "5 utterances, 2.00 h of audio were learnt from",
        "1 bad rows: unreadable (the audio cannot be decoded)",
        "4 left out: too_long, s",
        "1 converted: resampled, s",
    ]
    both = merge([report, loaded])
    assert (both.utterances, both.bad["s", "3 (x)"][1], both.outside_limits["s", "too_long"]) == (10, 2, 8)


def test_rows_that_are_bad_or_outside_the_limits_are_counted_when_the_data_is_opened(data_dir, tmp_path):
    rows = [*(data_dir / "m.jsonl").read_text().splitlines()]
    for duration in (0.0, -1.0, "long", None, True):
        rows.append(json.dumps({"audio_filepath": "x", "text": "a", "duration": duration}))
    (data_dir / "bad.jsonl").write_text("\n".join(rows))
    report = DataReport()
    values = options(train_manifests=["bad.jsonl"], min_duration_s=0.45, max_duration_s=0.85)
    dataset, sampler = load_training_data(values, NO_DISTORTION, data_dir, report)
    assert sorted(row.text for row in dataset.rows) == sorted(TEXTS[index] for index in (1, 2, 4, 6))
    assert dict(report.outside_limits) == {("bad.jsonl", "too_short"): 1, ("bad.jsonl", "too_long"): 2}
    assert report.bad_counts() == {"duration": 4, "missing_file": 1}
    assert sampler.total_s == pytest.approx(2.6)
    with pytest.raises(ValueError, match="bad.jsonl, row 8: duration .*: 0.0; correct it"):
        load_training_data(values, NO_DISTORTION, data_dir, DataReport(refuse=True))


def test_bad_rows_are_left_out_of_their_batch_and_told_by_it(tmp_path, strict_reader):
    rows = [row for kind, row in bad_rows(tmp_path).items() if kind != "duration"]
    rows.insert(3, Row("s", "good", encoded(sweep(0.5, 300)), "a hat"))
    dataset = SpeechDataset(rows, RowLoader(strict_reader), return_bad=True)
    batch = TrainingCollator(SpeechLLMDataCollator(tiny_processor()))([dataset[index] for index in range(len(rows))])
    assert batch["labels"].shape[0] == batch["input_features"].shape[0] == 1
    info = batch["data_info"]
    assert (info.utterances, info.audio_s) == (1, 0.5)
    assert [row.kind for row in info.left_out] == [row.row for row in rows if row.row != "good"]
    plain = SpeechDataset(rows, RowLoader(strict_reader))
    with pytest.raises(ValueError, match="s, row not_finite: not_finite"):
        plain[0]


def test_a_batch_without_any_good_row_has_no_labels():
    bad = [BadRow("s", 1, "empty_text", "''"), LeftOut("s", "too_long")]
    batch = TrainingCollator(SpeechLLMDataCollator(tiny_processor()))(bad)
    assert batch["data_info"].utterances == 0 and batch["data_info"].left_out == bad
    assert bool((batch["labels"] == -100).all()) and batch["input_features"].shape[0] == 1


def test_evaluation_data_is_the_first_readable_utterances(data_dir):
    lines = (data_dir / "m.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"audio_filepath": "none.wav", "text": "a", "duration": 1.0})
    (data_dir / "eval.jsonl").write_text("\n".join(lines))
    report = DataReport()
    values = options(
        eval_manifests={"some": "eval.jsonl"},
        eval_sources={"dev": {**SOURCES["hub"], "split": "dev", "streaming": True}, "all": SOURCES["saved"]},
        max_eval_examples=3,
    )
    found = load_evaluation_data(values, RowReader(RATE), data_dir, report)
    texts = {name: [dataset[index]["text"] for index in range(len(dataset))] for name, dataset in found.items()}
    assert texts == {"some": [TEXTS[0], TEXTS[2]], "dev": TEXTS[:2], "all": TEXTS[:3]}
    assert report.bad_counts() == {"missing_file": 1}
    with pytest.raises(ValueError, match="'dev' is in eval_manifests and in eval_sources"):
        load_evaluation_data(
            options(eval_manifests={"dev": "eval.jsonl"}, eval_sources={"dev": SOURCES["hub"]}),
            RowReader(RATE),
            data_dir,
            report,
        )


# Tables: mixing and batches.


def test_tables_are_concatenated(data_dir):
    values = options(train_manifests=["m.jsonl"], train_sources=[SOURCES["hub"], SOURCES["audiofolder"]])
    dataset, sampler = load_training_data(values, NO_DISTORTION, data_dir, DataReport())
    texts = Counter(dataset.rows[index].text for batch in sampler for index in batch)
    assert texts == dict.fromkeys(TEXTS, 3)
    assert {dataset[index]["source"] for index in range(21)} == {
        str(data_dir / "m.jsonl"),
        "hub:small:train",
        "audiofolder:audio:train",
    }


def test_tables_are_mixed_by_weight(data_dir):
    sources = [{**SOURCES["manifest"], "path": "m.jsonl", "weight": 3.0}, {**SOURCES["hub"], "weight": 1}]
    dataset, sampler = load_training_data(options(train_sources=sources), NO_DISTORTION, data_dir, DataReport())
    names = {str(data_dir / "m.jsonl"): 0, "hub:small:train": 0}
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for index in (index for batch in sampler for index in batch):
            names[dataset.rows[index].source] += 1
    # Three quarters of the fourteen rows: each row of the first once or twice.
    assert names[str(data_dir / "m.jsonl")] >= 2 * names["hub:small:train"] > 0


def test_some_weights_only_and_no_sources_are_refused(data_dir):
    sources = [{**SOURCES["saved"], "weight": 3.0}, SOURCES["hub"]]
    for values, message in (
        (options(train_sources=sources), "all training sources must have a weight, or none"),
        (options(train_manifests=["m.jsonl"], train_sources=sources[:1]), "all training sources must have a weight"),
        (options(), "train_manifests or train_sources must name something"),
    ):
        with pytest.raises(ValueError, match=message):
            load_training_data(values, NO_DISTORTION, data_dir, DataReport())


class Epochs:
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


durations = st.lists(st.floats(0.3, 20.0), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(durations, st.integers(1, 4), st.integers(0, 3))
def test_batches_are_a_multiple_of_the_processes_and_hold_each_utterance_once(durations_s, processes, seed):
    sampler = DurationBatchSampler(durations_s, 20.0, Epochs(), seed, num_processes=processes)
    counts = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(len(durations_s)))
        assert max(len(batch) * max(durations_s[index] for index in batch) for batch in batches) <= 20.0 + 1e-6
        assert len(batches) % processes == 0 or max(map(len, batches)) == 1
        counts.add(len(batches))
    assert len(counts) == 1


@settings(max_examples=40, deadline=None)
@given(durations, st.floats(0.1, 3.0), st.integers(0, 3))
def test_repeated_draws_are_as_many_in_every_epoch_and_differ_by_one_at_most(durations_s, factor, seed):
    repeats = np.full(len(durations_s), factor)
    sampler = DurationBatchSampler(durations_s, 20.0, Epochs(), seed, repeats)
    totals = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = Counter(index for batch in sampler for index in batch)
        totals.add((sum(drawn.values()), len(sampler)))
        assert max(drawn.values()) <= math.ceil(factor) + 1
    assert len(totals) == 1


def test_a_sampler_asks_the_data_set_for_the_epoch():
    # accelerate tells only the data set when it has wrapped the sampler twice, after a restart of several processes.
    dataset = Epochs()
    sampler = DurationBatchSampler(np.linspace(1, 2, 50), 20.0, dataset)
    first = list(sampler)
    dataset.set_epoch(1)
    assert list(sampler) != first
    dataset.set_epoch(0)
    assert list(sampler) == first


def test_no_batches_of_no_utterances():
    assert plan_batches(duration_classes(np.array([]), 20.0), np.random.default_rng(0)) == []


# Streams.


def stream(data_dir, values: DataArguments, processes=(0, 1), loader=NO_DISTORTION, seed=1) -> StreamingBatches:
    dataset, sampler = load_training_data(values, loader, data_dir, DataReport(), seed, *processes)
    assert sampler is None
    return dataset


def texts_of(batches) -> list[list[str]]:
    return [[each["text"] for each in batch if isinstance(each, dict)] for batch in batches]


STREAMED_HUB = {**SOURCES["hub"], "streaming": True}


@pytest.mark.parametrize("buffer", [3, 1000])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_pass_over_a_stream_gives_each_utterance_to_one_process(data_dir, buffer, processes):
    values = options(train_sources=[STREAMED_HUB], train_manifests=["m.jsonl"], shuffle_buffer=buffer)
    counts = []
    for index in range(processes):
        batches = stream(data_dir, values, (index, processes))
        seen = Counter()
        own = Counter(row.text for source in batches.sources for row in batches._rows(source, 0, index, processes))
        iterator = iter(batches)
        while sum(seen.values()) < sum(own.values()):
            batch = next(iterator)
            assert len(batch) * max(len(each["waveform"]) for each in batch) <= 2.0 * RATE + 1
            seen.update(each["text"] for each in batch)
        assert seen == own
        counts.append(own)
    assert sum(counts, Counter()) == dict.fromkeys(TEXTS, 2)


def test_streams_are_the_same_for_a_seed_only_and_shuffled_anew_in_every_pass(data_dir):
    values = options(train_sources=[STREAMED_HUB])
    first = texts_of(islice(stream(data_dir, values), 20))
    assert texts_of(islice(stream(data_dir, values), 20)) == first
    assert texts_of(islice(stream(data_dir, values, seed=2), 20)) != first
    flat = sum(first, [])
    assert flat[:7] != flat[7:14] and sorted(flat[:7]) == sorted(flat[7:14]) == sorted(TEXTS)


def test_streams_are_mixed_by_weight(data_dir):
    sources = [{**STREAMED_HUB, "weight": 3}, {"path": "m.jsonl", "weight": 1}]
    batches = list(islice(stream(data_dir, options(train_sources=sources, shuffle_buffer=50)), 120))
    names = Counter(Path(each["source"]).name for batch in batches for each in batch)
    assert names["hub:small:train"] / sum(names.values()) == pytest.approx(0.75, abs=0.05)


LOUD = AugmentOptions(gain_prob=1.0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 4, 11])
def test_a_resumed_stream_goes_on_with_the_next_batch(data_dir, workers, seen, monkeypatch):
    values = options(train_sources=[STREAMED_HUB], train_manifests=["m.jsonl"], shuffle_buffer=5)

    def loader(batches_seen: int):
        dataset = stream(data_dir, values, loader=RowLoader(RowReader(RATE), LOUD))
        collator = TrainingCollator(SpeechLLMDataCollator(tiny_processor()))
        return StreamLoader(DataLoader(dataset, None, num_workers=workers, collate_fn=collator), lambda: batches_seen)

    whole = list(islice(loader(0), seen + 3))
    decoded = []
    read = RowReader.read
    monkeypatch.setattr(RowReader, "read", lambda self, row: decoded.append(row) or read(self, row))
    rest = list(islice(loader(seen), 3))
    for expected, found in zip(whole[seen:], rest, strict=True):
        assert expected["data_info"] == found["data_info"]
        for name in ("input_features", "labels"):
            np.testing.assert_array_equal(expected[name], found[name])
    if workers == 0:
        assert len(decoded) == sum(batch["data_info"].utterances for batch in rest), "what is skipped is not decoded"


def test_bad_rows_of_a_stream_are_told_with_a_batch(data_dir, tmp_path):
    columns = loquacious_columns(TEXTS[:4], [0.5, 0.6, 0.7, 3.0])
    columns["text"][1] = ""
    columns["wav"][2] = b"noise"
    del columns["duration"]
    write_hub_folder(tmp_path / "bad", {("small", "train"): [columns]}, "wav")
    values = options(train_sources=[{**STREAMED_HUB, "path": "bad"}])
    report = DataReport()
    collator = TrainingCollator(SpeechLLMDataCollator(tiny_processor()))
    for batch in islice(stream(tmp_path, values), 6):
        collator(batch)["data_info"].add_to(report)
    assert report.bad_counts() == {"unreadable": 1, "empty_text": 1}
    assert {row for _, row in report.bad} == {"2 (utterance-1)", "3 (utterance-2)"}
    assert report.outside_limits["bad:small:train", "too_long"] >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_duration_s": 1.5}, "share 1 of 1 .* has no utterance of 1.5 to 2.0 s; use fewer workers"),
        ({"max_duration_s": 3.0}, "batch_duration_s must hold the longest utterance .max_duration_s = 3.0., got 2.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight", [None, 1.0])
def test_a_stream_without_utterances_within_the_limits_is_refused(data_dir, values, message, weight):
    with pytest.raises(ValueError, match=message):
        next(iter(stream(data_dir, options(train_sources=[{**STREAMED_HUB, "weight": weight}], **values))))


def test_more_workers_than_files_are_refused(data_dir):
    dataset = stream(data_dir, options(train_sources=[STREAMED_HUB]))
    loader = DataLoader(dataset, None, num_workers=5, collate_fn=list)
    with pytest.raises(ValueError, match="dataloader_num_workers must be at most .* 4, got 5"):
        next(iter(loader))


def test_a_table_of_fewer_rows_than_shares_is_told():
    table = Table("t", [Row("t", 1, encoded(sweep(0.5, 300)), "a", 0.5)], weight=1.0)
    batches = StreamingBatches([table], NO_DISTORTION, options(), process_index=1, num_processes=2)
    with pytest.raises(ValueError, match="t has no row for share 2 of 2"):
        next(iter(batches))

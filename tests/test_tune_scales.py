"""Tuning the scales of a language model: lists, table and what is written, for our models and those of others."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from test_fusion_pipeline import ctc_parts, seq2seq_parts
from tiny_models import loud_model, noise, tiny_model, tiny_processor, tiny_tokenizer
from transformers import GenerationConfig, GenerationMixin, pipeline

from hf_speechllm.hypothesis import Hypothesis
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.scale_tuning import ScaleChoice
from training import tune_scales
from training.evaluation_data import read_manifest

RATE = 16_000
WAVEFORMS = noise(0.5, 0.9, 0.3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = loud_model()
    torch.manual_seed(3)
    model.ctc_head.log_prior[:-1] = torch.randn(model.config.blank_id).log_softmax(0)
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture
def pipe(model_folder):
    return pipeline("automatic-speech-recognition", model=str(model_folder))


@pytest.fixture
def manifest(tmp_path) -> Path:
    path = tmp_path / "dev.jsonl"
    with path.open("w") as file:
        for index, (waveform, text) in enumerate(zip(WAVEFORMS, REFERENCES, strict=True)):
            sf.write(tmp_path / f"{index}.wav", waveform, RATE, subtype="FLOAT")
            file.write(json.dumps({"audio_filepath": f"{index}.wav", "text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def scorer() -> CausalLMScorer:
    return CausalLMScorer(loud_model(seed=5).language_model, tiny_tokenizer())


def search(mode: str = "rescoring", lm=None, size: int = 2, scales=tune_scales.NO_SCALES) -> tune_scales.Search:
    return tune_scales.Search(mode, lm, size, scales)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["tune_scales", *map(str, arguments)])
    tune_scales.main()


def test_lists_of_a_speech_llm_hold_the_separate_scores_in_the_order_of_the_manifest(pipe, manifest):
    utterances = read_manifest(manifest)
    nbests = tune_scales.nbest_lists(pipe, search(size=3), utterances, batch_size=2)
    scorer = CausalLMScorer(pipe.model.language_model, pipe.tokenizer)
    prior = pipe.model.ctc_head.log_prior.double()
    for waveform, rows in zip(WAVEFORMS, nbests, strict=True):
        alone = pipe.model.generate(
            **tiny_processor()(waveform, sampling_rate=RATE),
            mode="ctc_beam",
            ctc_beam_size=3,
            num_return_sequences=3,
            return_dict_in_generate=True,
        ).hypotheses[0]
        assert [row.labels for row in rows] == [row.labels for row in alone]
        for row, ctc in zip(rows, alone, strict=True):
            tokens = scorer.tokenize(row.text)
            assert row.am_log_prob == pytest.approx(ctc.am_log_prob, abs=1e-3)
            assert row.lm_log_prob == pytest.approx(float(scorer.score([tokens])[0]), abs=1e-3)
            assert row.prior_log_prob == pytest.approx(float(prior[list(row.labels)].sum()), abs=1e-6)
            assert row.num_tokens == len(tokens)


def test_another_language_model_scores_the_lists_of_a_speech_llm(pipe, manifest, scorer):
    for rows in tune_scales.nbest_lists(pipe, search(lm=scorer), read_manifest(manifest), batch_size=3):
        for row in rows:
            assert row.lm_log_prob == pytest.approx(float(scorer.score([scorer.tokenize(row.text)])[0]), abs=1e-3)


@pytest.mark.parametrize("name", ["ctc", "moonshine"])
def test_lists_of_other_models_are_scored_too(name, tmp_path, manifest, scorer):
    parts = ctc_parts("wav2vec2-large", tmp_path) if name == "ctc" else seq2seq_parts(name)
    if name == "moonshine":
        parts["model"].generation_config.max_new_tokens = 6
    pipe = pipeline("automatic-speech-recognition", **parts)
    fused = pipeline("automatic-speech-recognition", **parts, lm=scorer)
    nbests = tune_scales.nbest_lists(pipe, search(lm=scorer), read_manifest(manifest), batch_size=2)
    assert len(nbests) == len(WAVEFORMS) and len({rows[0].am_log_prob for rows in nbests}) == len(WAVEFORMS)
    for waveform, rows in zip(WAVEFORMS, nbests, strict=True):
        assert len(rows) == 2
        for row, own in zip(rows, fused.nbest(waveform, 2), strict=True):
            assert (row.labels, row.text, row.am_log_prob) == (own.labels, own.text.lower(), own.am_log_prob)
            assert row.lm_log_prob == pytest.approx(float(scorer.score([scorer.tokenize(row.text)])[0]), abs=1e-6)


def test_multilingual_whisper_hears_english(manifest, scorer, monkeypatch):
    pipe = pipeline("automatic-speech-recognition", **seq2seq_parts("whisper"))
    pipe.model.generation_config.update(
        is_multilingual=True,
        lang_to_id={"<|de|>": 20, "<|en|>": 21},
        task_to_id={"transcribe": 22},
        max_new_tokens=3,
        allow_custom_entries=True,
    )
    prompts = []
    generate = GenerationMixin.generate

    def spy(*arguments, **options):
        prompts.append(options["decoder_input_ids"][0, 1:].tolist())
        return generate(*arguments, **options)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    tune_scales.nbest_lists(pipe, search(lm=scorer), read_manifest(manifest, 1), batch_size=1)
    assert prompts == [[21, 22]]


def test_lists_of_label_fusion_are_scored_label_by_label(pipe, manifest):
    """The language model's score of the CTC labels as they are, whatever its own tokens of the text would be."""
    scorer = CausalLMScorer(pipe.model.language_model, pipe.tokenizer)
    token_ids = pipe.model.config.ctc_token_ids
    found = tune_scales.nbest_lists(pipe, search("label_fusion", size=3), read_manifest(manifest), batch_size=2)
    rescored = tune_scales.nbest_lists(pipe, search(size=3), read_manifest(manifest), batch_size=2)
    for rows, others in zip(found, rescored, strict=True):
        assert [row.labels for row in rows] == [row.labels for row in others]  # of the same search without scales
        for row in rows:
            tokens = [token_ids[label] for label in row.labels]
            assert row.lm_log_prob == pytest.approx(float(scorer.score([tokens])[0]), abs=1e-3)
            assert row.num_tokens == len(tokens) and row.text == tiny_processor().decode(tokens)


@pytest.mark.parametrize("mode", ["delayed_fusion", "label_fusion"])
def test_the_search_has_the_scales(pipe, manifest, mode):
    utterances = read_manifest(manifest)
    scales = ScaleChoice(1.5, 0.2, 1.0, 0.0)
    lists = [
        tune_scales.nbest_lists(pipe, search(mode, size=3, scales=each), utterances, batch_size=3)
        for each in (tune_scales.NO_SCALES, scales)
    ]
    for rows, others in zip(*lists, strict=True):
        if mode == "label_fusion":  # the tiny model writes hardly a space: there is no word to score before the end
            assert {row.labels for row in rows} != {row.labels for row in others}
        assert [row.log_score for row in rows] == pytest.approx([row.am_log_prob for row in rows], abs=1e-6)
        assert [row.log_score for row in others] == pytest.approx(
            [row.combined(1.5, 0.2, 1.0) for row in others], abs=1e-6
        )


def test_lists_are_joined_without_repeating_what_both_have():
    first, again, other = (Hypothesis((label,), text, 0.0) for label, text in ((1, "a"), (1, "a"), (2, "b")))
    assert tune_scales.joined([[], [first]], [[other], [again, other]]) == [[other], [first, other]]


def test_rounds_search_with_the_scales_of_the_round_before(model_folder, manifest, monkeypatch, capsys):
    scales, sizes = [], []
    found = iter([[rows[:1] for rows in NBESTS], [rows[1:] for rows in NBESTS]])

    def nbest_lists(pipe, search, utterances, batch_size):
        scales.append(search.scales)
        return next(found)

    def tune(nbests, *arguments, **options):
        sizes.append([len(rows) for rows in nbests])
        return ScaleChoice(0.5, 0.0, 0.25 * len(sizes), 0.1)

    monkeypatch.setattr(tune_scales, "nbest_lists", nbest_lists)
    monkeypatch.setattr(tune_scales, "tune_scales", tune)
    run(monkeypatch, model_folder, manifest, "--mode", "label_fusion", "--rounds", "2")
    assert scales == [tune_scales.NO_SCALES, ScaleChoice(0.5, 0.0, 0.25, 0.1)]
    assert sizes == [[1, 1, 1], [2, 2, 2]]
    assert "length_reward=0.5" in capsys.readouterr().out.splitlines()[-1]


def test_utterances_of_several_manifests_are_numbered_through(manifest):
    utterances = tune_scales.read_all([manifest, manifest], 2)
    assert [utterance.index for utterance in utterances] == [0, 1, 2, 3]
    assert [utterance.entry["text"] for utterance in utterances] == 2 * REFERENCES[:2]


NBESTS = [
    [Hypothesis((1,), "the cat sat", -1.0, -9.0, 0.0, 3), Hypothesis((2,), "the cat sat on", -2.0, -3.0, 0.0, 4)],
    [Hypothesis((1,), "a bog", -1.0, -9.0, 0.0, 2), Hypothesis((2,), "a dog", -1.5, -2.0, 0.0, 2)],
    [Hypothesis((1,), "yes", -1.0, -1.0, 0.0, 1), Hypothesis((2,), "yes sir", -5.0, -9.0, 0.0, 2)],
]
REFERENCES = ["the cat sat on", "a dog", "yes sir"]  # 8 words


def test_the_table_counts_errors_without_and_with_the_language_model_and_of_the_best_entries():
    table = tune_scales.report("dev", NBESTS, REFERENCES, ScaleChoice(0.5, 0.25, 0.0, 0.125), None).splitlines()
    assert table[0] == "dev: 3 utterances, 2-best lists; percent, Whisper normaliser"
    rows = [line.rsplit(maxsplit=4)[1:] for line in table[2:5]]
    assert rows == [
        ["37.50", "12.50", "25.00", "0.00"],
        ["12.50", "0.00", "12.50", "0.00"],
        ["0.00", "0.00", "0.00", "0.00"],
    ]
    assert table[5] == "lm_weight=0.5, prior_weight=0.25, length_reward=0"


def test_the_command_prints_the_best_scales_and_writes_them(model_folder, manifest, monkeypatch, capsys):
    monkeypatch.setattr(tune_scales, "nbest_lists", lambda *arguments: NBESTS)
    before = json.loads((model_folder / "generation_config.json").read_text())
    grids = ["--lm-weights", "0,0.4,2", "--prior-weights", "0", "--length-rewards=-1,0"]
    run(monkeypatch, model_folder, manifest, *grids, "--write")
    output = capsys.readouterr().out
    assert "with language model   12.50" in output and "lm_weight=0.2, prior_weight=0, length_reward=0" in output
    written = json.loads((model_folder / "generation_config.json").read_text())
    scales = {"lm_weight": 0.2, "prior_weight": 0.0, "length_reward": 0.0}
    assert written == {**before, **scales}
    config = GenerationConfig.from_pretrained(model_folder)
    assert {name: getattr(config, name) for name in scales} == scales


def test_an_end_of_a_grid_is_pointed_out(model_folder, manifest, monkeypatch, capsys):
    monkeypatch.setattr(tune_scales, "nbest_lists", lambda *arguments: NBESTS[:2])
    run(monkeypatch, model_folder, manifest, "--limit", "2", "--lm-weights", "0,0.18", "--length-rewards", "0")
    assert "lm_weight = 0.18 is at the end of its grid: widen --lm-weights" in capsys.readouterr().out


def test_without_write_nothing_is_written(model_folder, manifest, monkeypatch, capsys):
    before = (model_folder / "generation_config.json").read_bytes()
    run(monkeypatch, model_folder, manifest, "--nbest", "2", "--lm-weights", "0,0.5", "--prior-weights", "0,0.3")
    assert "3 utterances, 2-best lists" in capsys.readouterr().out
    assert (model_folder / "generation_config.json").read_bytes() == before


def test_the_prior_is_tuned_where_there_is_one(pipe):
    assert tune_scales.has_prior(pipe)
    pipe.model.ctc_head.log_prior.zero_()
    assert not tune_scales.has_prior(pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nbest", "0"], "--nbest: expected at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--rounds", "2"], "--rounds: expected 1 with --mode rescoring, whose lists do not depend on the scales"),
        (["--lm-weights", "0,x"], "expected numbers separated by commas, got '0,x'"),
        (["--lm-weights", "nan"], "expected numbers separated by commas, got 'nan'"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant_are_refused(model_folder, manifest, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, model_folder, manifest, *arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--lm: expected a language model, since a wav2vec2 has none"),
        (["--mode", "label_fusion"], "--mode: label_fusion is for speech LLMs of this package, this is a wav2vec2"),
        (["--lm", "gpt2", "--write"], "--write: is for speech LLMs of this package"),
        (["--lm", "gpt2", "--prior-weights", "0.1"], "--prior-weights: a wav2vec2 comes without a prior"),
    ],
    ids=str,
)
def test_what_other_models_lack_is_refused(tmp_path, manifest, monkeypatch, capsys, arguments, message):
    pipe = pipeline("automatic-speech-recognition", **ctc_parts("wav2vec2-large", tmp_path))
    monkeypatch.setattr(tune_scales, "load_pipeline", lambda *arguments: pipe)
    with pytest.raises(SystemExit):
        run(monkeypatch, "other", manifest, *arguments)
    assert message in capsys.readouterr().err


def test_models_without_labels_and_without_a_folder_and_long_recordings_are_refused(
    pipe, manifest, monkeypatch, capsys
):
    monkeypatch.setattr(tune_scales, "load_pipeline", lambda *arguments: pipe)
    with pytest.raises(SystemExit):
        run(monkeypatch, "someone/model", manifest, "--write")
    assert "--write: expected a folder with generation_config.json as MODEL" in capsys.readouterr().err
    sf.write(manifest.parent / "1.wav", np.zeros(31 * RATE, np.float32), RATE)
    with pytest.raises(SystemExit):
        run(monkeypatch, "someone/model", manifest)
    assert "1.wav: expected at most 30 s, got 31.0 s" in capsys.readouterr().err
    pipe.model = tiny_model(ctc_token_ids=None)
    with pytest.raises(SystemExit):
        run(monkeypatch, "someone/model", manifest)
    assert "MODEL: expected a CTC head, it has none" in capsys.readouterr().err
    pipe.model = tiny_model(ctc_token_ids=None, ctc_labels=["a", "b"])
    with pytest.raises(SystemExit):
        run(monkeypatch, "someone/model", manifest, "--mode", "label_fusion")
    assert "MODEL: expected a CTC head whose labels are tokens of the language model" in capsys.readouterr().err


def test_the_help_warns_of_test_sets(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    assert "never a test set" in capsys.readouterr().out

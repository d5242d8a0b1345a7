"""The label prior: from posteriors and from transcripts, written into the weights that modes with a prior read."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_processor

from hf_speechllm.data_collator import SpeechLLMDataCollator
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from training import estimate_prior
from training.estimate_prior import posterior_prior, store, transcript_prior


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(size).astype(np.float32) for size in (6_000, 9_000, 4_000)]
    return [{"waveform": waveform, "text": "the thing"} for waveform in waveforms]


def test_the_posterior_prior_is_the_mean_over_valid_frames_without_blank(examples):
    model, processor = tiny_model(), tiny_processor()
    collate = SpeechLLMDataCollator(processor)
    prior = posterior_prior(model, [collate(examples[:2]), collate(examples[2:])])
    with torch.no_grad():
        single = [model.encode(**_features(collate([example]))).ctc_log_probs[0] for example in examples]
    expected = torch.cat(single).exp().sum(0)[:-1]
    torch.testing.assert_close(prior[:-1].exp(), expected / expected.sum(), atol=1e-5, rtol=1e-4)
    assert prior[-1] == 0.0


def _features(batch):
    return {name: batch[name] for name in ("input_features", "input_features_mask")}


def test_the_transcript_prior_counts_labels_and_keeps_unseen_ones_possible():
    model, processor = tiny_model(), tiny_processor()
    labels = processor(text="the thing")["labels"]
    targets = model.ctc_targets(labels)
    targets = targets[targets >= 0]
    prior = transcript_prior(model, processor, ["the thing", "the thing"])[:-1].exp()
    assert prior.sum() == pytest.approx(1.0, abs=1e-5)
    unseen = 0.1 / model.config.blank_id
    seen = set(targets.tolist())
    for label in range(model.config.blank_id):
        share = float((targets == label).float().mean())
        assert float(prior[label]) == pytest.approx(0.9 * share + unseen, rel=1e-4)
    assert len(seen) < model.config.blank_id


def test_it_is_stored_in_a_checkpoint_and_in_trained_parts(tmp_path):
    model = tiny_model()
    prior = torch.linspace(-3, -1, model.config.blank_id + 1)
    model.save_pretrained(tmp_path / "model")
    store(str(tmp_path / "model"), model, prior)
    reloaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(reloaded.ctc_head.log_prior, prior)
    (tmp_path / "parts").mkdir()
    save_file({"weight": torch.ones(2).half()}, tmp_path / "parts" / "trained.safetensors")
    store(str(tmp_path / "parts"), model, prior)
    parts = load_file(tmp_path / "parts" / "trained.safetensors")
    assert set(parts) == {"weight", "ctc_head.log_prior"}
    torch.testing.assert_close(parts["ctc_head.log_prior"].float(), prior, atol=1e-2, rtol=0)


def test_the_command_writes_the_prior_of_a_manifest(tmp_path, monkeypatch, capsys, examples):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    with open(tmp_path / "m.jsonl", "w") as file:
        for index, example in enumerate(examples):
            sf.write(tmp_path / f"{index}.wav", example["waveform"], 16_000)
            entry = {
                "audio_filepath": f"{index}.wav",
                "text": "the thing",
                "duration": len(example["waveform"]) / 16_000,
            }
            file.write(json.dumps(entry) + "\n")
    for source in ("transcripts", "posterior"):
        command = ["estimate_prior", str(tmp_path / "model"), str(tmp_path / "m.jsonl"), "--source", source]
        monkeypatch.setattr("sys.argv", command)
        estimate_prior.main()
        assert "perplexity" in capsys.readouterr().out
        model = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "model")
        assert float(model.ctc_head.log_prior[:-1].exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_all_manifests_count_up_to_the_limit(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    for name, texts in (("first", ["an ant", "a"]), ("second", ["the thing", "tin"])):
        rows = [{"audio_filepath": "0.wav", "text": text, "duration": 1.0} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = []

    def count(model, processor, texts):
        counted.append(texts)
        return transcript_prior(model, processor, texts)

    monkeypatch.setattr(estimate_prior, "transcript_prior", count)
    manifests = [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")]
    command = ["estimate_prior", str(tmp_path / "model"), *manifests, "--source", "transcripts", "--limit", "3"]
    monkeypatch.setattr("sys.argv", command)
    estimate_prior.main()
    assert counted == [["an ant", "a", "the thing"]]


def test_a_manifest_without_labels_is_refused():
    with pytest.raises(ValueError, match="manifest: no label was found"):
        transcript_prior(tiny_model(), tiny_processor(), [""])

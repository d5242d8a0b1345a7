"""The prompt is computed once per utterance, not once per beam, and that changes nothing."""

import numpy as np
import pytest
import torch
from tiny_models import TEXT_CONFIGS, tiny_model, tiny_processor

OPTIONS = {
    "joint beam search": {"num_beams": 3, "ctc_weight": 0.3},
    "plain beam search": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "n-best": {"num_beams": 4, "num_return_sequences": 2, "ctc_weight": 0.5},
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return tiny_processor()([rng.standard_normal(n).astype(np.float32) * 0.1 for n in (16000, 24000, 9000)])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_prefill_once_equals_prefill_per_beam(text, options, inputs, monkeypatch):
    model = tiny_model("moonshine", text, projector="ctc_posterior")

    def run():
        torch.manual_seed(0)
        return model.generate(**inputs, return_dict_in_generate=True, output_scores=True, **options)

    once = run()
    monkeypatch.setattr(model, "_prefill_once", lambda *_: None)
    per_beam = run()
    assert torch.equal(once.sequences, per_beam.sequences)
    for a, b in zip(once.scores, per_beam.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_prompt_runs_through_the_language_model_with_one_row_per_utterance(inputs, monkeypatch):
    model = tiny_model("moonshine", "llama", projector="ctc_posterior")
    shapes = []
    forward = model.language_model.forward

    def recorded(*args, **kwargs):
        embeds = kwargs.get("inputs_embeds")
        shapes.append(tuple((kwargs["input_ids"] if embeds is None else embeds).shape[:2]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", recorded)
    model.generate(**inputs, num_beams=4)
    assert shapes[0][0] == 3 and shapes[0][1] > 1
    assert all(shape == (12, 1) for shape in shapes[1:])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_other_caches_are_left_to_transformers(options, inputs):
    model = tiny_model("moonshine", "llama", projector="ctc_posterior")
    expected = model.generate(**inputs, num_beams=2)
    assert torch.equal(model.generate(**inputs, num_beams=2, **options), expected)

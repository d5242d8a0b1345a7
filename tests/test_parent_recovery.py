"""Joint beam search of whole speech LLMs: three ways to find the parents of the beams give the same beams.

The hook tells them, they are found by comparing rows, or every state is computed anew from its tokens.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import loud_model, noise, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_speechllm
from hf_speechllm import generation_speechllm
from hf_speechllm.audio import load_audio
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor

SAMPLES = Path(__file__).parent.parent / "samples"


def generate(model, inputs: dict, monkeypatch: pytest.MonkeyPatch, way: str, num_beams: int):
    """Beams of the joint search, and how often parents were looked for among the rows and told by the hook."""
    counts = {"matched": 0, "told": 0}
    processors = []

    def counted(name: str, function: Callable) -> Callable:
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    def build(*args) -> CTCPrefixLogitsProcessor:
        processors.append(CTCPrefixLogitsProcessor(*args, parents="recompute" if way == "recomputation" else "auto"))
        processors[-1]._match = counted("matched", processors[-1]._match)
        return processors[-1]

    def reorder_cache(cache, beam_idx: torch.Tensor):
        cache.reorder_cache(beam_idx)
        processors[-1].reorder(beam_idx)
        return cache

    with monkeypatch.context() as patch:
        patch.setattr(generation_speechllm, "CTCPrefixLogitsProcessor", build)
        if way == "hook":
            patch.setattr(model.language_model, "_reorder_cache", counted("told", reorder_cache), raising=False)
        output = model.generate(
            **inputs,
            ctc_weight=0.4,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=0.0,
            early_stopping="never",
            max_new_tokens=12,
            return_dict_in_generate=True,
        )
    assert len(processors) == 1
    return output, counts


def check_that_beams_agree(model, inputs: dict, monkeypatch: pytest.MonkeyPatch, num_beams: int) -> None:
    hook, hook_counts = generate(model, inputs, monkeypatch, "hook", num_beams)
    matching, matching_counts = generate(model, inputs, monkeypatch, "matching", num_beams)
    recomputation, recomputation_counts = generate(model, inputs, monkeypatch, "recomputation", num_beams)
    assert hook_counts["told"] > 1 and hook_counts["matched"] == 0
    assert matching_counts["matched"] > 1 and matching_counts["told"] == 0
    assert recomputation_counts == {"matched": 0, "told": 0}
    beams = {tuple(row) for row in hook.sequences.tolist()}
    assert len(beams) > len(hook.sequences) // 2
    for other in (matching, recomputation):
        assert torch.equal(other.sequences, hook.sequences)
        torch.testing.assert_close(other.sequences_scores, hook.sequences_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_beams", [2, 4])
def test_the_beams_of_a_tiny_model_agree(monkeypatch: pytest.MonkeyPatch, num_beams: int) -> None:
    inputs = dict(tiny_processor()(noise(0.9, 0.31, 0.62)))
    check_that_beams_agree(loud_model(), inputs, monkeypatch, num_beams)


@pytest.mark.slow
def test_the_beams_of_the_default_model_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_speechllm.default_model()
    model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    rate = processor.sampling_rate
    waveforms = [load_audio(str(path), rate)[: 3 * rate] for path in sorted(SAMPLES.glob("*.flac"))[:2]]
    inputs = dict(processor(waveforms, sampling_rate=rate))
    check_that_beams_agree(model, inputs, monkeypatch, 4)

"""The CTC loss from features and output layer, against F.ctc_loss on all log-probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import noise, tiny_model, tiny_processor
from torch import Tensor
from torch.nn import functional

from hf_speechllm.ctc_loss import linear_ctc_loss

NUM_LABELS, WIDTH, BLANK = 12, 5, 11


def reference(features, weight, bias, targets, lens, blank_id) -> Tensor:
    log_probs = functional.linear(features, weight, bias)
    log_probs = (log_probs if log_probs.dtype == torch.float64 else log_probs.float()).log_softmax(-1)
    rows = [row[row >= 0] for row in targets]
    return functional.ctc_loss(
        log_probs.transpose(0, 1),
        torch.cat(rows),
        lens,
        torch.tensor([len(row) for row in rows]),
        blank=blank_id,
        reduction="sum",
        zero_infinity=True,
    )


def problem(seed: int, dtype: torch.dtype, num_frames: int = 9, scale: float = 1.0) -> list[Tensor]:
    """Features, weight, bias; features of the padding are as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, num_frames, WIDTH), (NUM_LABELS, WIDTH), (NUM_LABELS,)]
    return [(scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


# A repeated label, padding in the middle, nothing at all, and one that does not fit into its frames.
TARGETS = torch.tensor([[3, 3, -100, 5, 1], [-100, 0, 2, -100, 1], [-100] * 5, [7, 7, 7, 7, -100]])
LENS = torch.tensor([9, 5, 4, 6])


@pytest.mark.parametrize("logits_per_chunk", [1, 4 * NUM_LABELS, 1 << 24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("blank_id", [0, BLANK])
def test_loss_and_gradients_are_those_of_all_log_probabilities(blank_id, dtype, tolerance, logits_per_chunk):
    targets = TARGETS + 1 - (TARGETS < 0).long() if blank_id == 0 else TARGETS
    inputs = problem(0, dtype)
    expected = reference(*inputs, targets, LENS, blank_id)
    loss = linear_ctc_loss(*inputs, targets, LENS, blank_id=blank_id, logits_per_chunk=logits_per_chunk)
    assert loss.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for gradient, wanted in zip(
        torch.autograd.grad(0.7 * loss, inputs), torch.autograd.grad(0.7 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(
            gradient, wanted, rtol=10 * tolerance, atol=10 * tolerance * float(wanted.abs().max())
        )


def test_gradients_are_those_of_finite_differences():
    features, weight, bias = problem(1, torch.float64)

    def loss(*inputs: Tensor) -> Tensor:
        return linear_ctc_loss(*inputs, TARGETS[:2, :4], LENS[:2], blank_id=BLANK, logits_per_chunk=2 * NUM_LABELS)

    inputs = (features[:2, :, :3], weight[:, :3], bias)
    assert torch.autograd.gradcheck(loss, [values.detach().requires_grad_() for values in inputs])


@given(
    targets=st.lists(st.lists(st.integers(-1, BLANK - 1), min_size=4, max_size=4), min_size=4, max_size=4),
    lens=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    frames_per_chunk=st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_any_targets_and_lengths(targets, lens, seed, frames_per_chunk):
    inputs = problem(seed, torch.float64, num_frames=7, scale=3.0)
    targets, lens = torch.tensor(targets), torch.tensor(lens)
    loss = linear_ctc_loss(*inputs, targets, lens, blank_id=BLANK, logits_per_chunk=frames_per_chunk * NUM_LABELS)
    expected = reference(*inputs, targets, lens, BLANK)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, inputs)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), wanted, rtol=1e-9, atol=1e-9)


def test_a_transcript_that_does_not_fit_counts_zero_and_has_no_gradient():
    features, weight, bias = problem(2, torch.float32)
    loss = linear_ctc_loss(features, weight, bias, TARGETS[3:].expand(4, -1), LENS - 3, blank_id=BLANK)
    assert loss == 0.0
    loss.backward()
    assert all(not bool(values.grad.any()) for values in (features, weight, bias))


def test_padding_is_without_effect_whatever_it_holds():
    features, weight, bias = problem(3, torch.float32)
    padded = torch.where(torch.arange(9)[None, :, None] < LENS[:, None, None], features, 1e4).detach().requires_grad_()
    loss, again = (linear_ctc_loss(x, weight, bias, TARGETS, LENS, blank_id=BLANK) for x in (features, padded))
    assert torch.equal(loss, again)
    again.backward()
    assert not bool(padded.grad[torch.arange(9) >= LENS[:, None]].any())


def test_the_batch_is_the_sum_of_its_utterances():
    inputs = problem(4, torch.float64)
    together = linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK)
    apart = [
        linear_ctc_loss(
            inputs[0][row : row + 1], *inputs[1:], TARGETS[row : row + 1], LENS[row : row + 1], blank_id=BLANK
        )
        for row in range(4)
    ]
    torch.testing.assert_close(together, torch.stack(apart).sum(), rtol=1e-12, atol=0)


def test_bfloat16_outputs_are_summed_in_float32():
    inputs = problem(5, torch.bfloat16)
    loss = linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK, logits_per_chunk=3 * NUM_LABELS)
    assert loss.dtype == torch.float32
    # The outputs are rounded to bfloat16 in both, and nothing after them.
    torch.testing.assert_close(loss, reference(*inputs, TARGETS, LENS, BLANK), rtol=1e-5, atol=0)
    exact = [values.detach().double().requires_grad_() for values in inputs]
    wanted = torch.autograd.grad(reference(*exact, TARGETS, LENS, BLANK), exact)
    for gradient, expected in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert float((gradient.double() - expected).norm() / expected.norm()) < 0.02


def test_under_autocast_it_computes_as_the_layer_would():
    inputs = problem(6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK)
        expected = reference(*inputs, TARGETS, LENS, BLANK)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert not torch.equal(loss, linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK))
    assert [gradient.dtype for gradient in torch.autograd.grad(loss, inputs)] == [torch.float32] * 3


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1), (2,)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    inputs = problem(7, torch.float64)
    wanted = torch.autograd.grad(linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK), inputs)
    for index in frozen:
        inputs[index].requires_grad_(False)
    linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK).backward()
    for index, (values, gradient) in enumerate(zip(inputs, wanted, strict=True)):
        assert values.grad is None if index in frozen else torch.equal(values.grad, gradient)


def test_without_gradients_none_are_computed(monkeypatch):
    inputs = problem(8, torch.float32)
    expected = linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK)
    monkeypatch.setattr("hf_speechllm.ctc_loss._Gradients.add", None)
    with torch.no_grad():
        loss = linear_ctc_loss(*inputs, TARGETS, LENS, blank_id=BLANK)
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_a_head_without_bias():
    features, weight, _ = problem(9, torch.float64)
    loss = linear_ctc_loss(features, weight, None, TARGETS, LENS, blank_id=BLANK)
    torch.testing.assert_close(loss, reference(features, weight, None, TARGETS, LENS, BLANK), rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(reference(features, weight, None, TARGETS, LENS, BLANK), (features, weight))
    torch.testing.assert_close(torch.autograd.grad(loss, (features, weight)), wanted, rtol=1e-10, atol=1e-10)


def test_no_tensor_has_all_outputs(monkeypatch):
    """The largest tensor that any operation makes is a chunk, or the head's gradient."""
    largest = 0

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            result = operation(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return result

    features, weight = torch.randn(2, 200, 3, requires_grad=True), torch.randn(5000, 3, requires_grad=True)
    with Spy():
        linear_ctc_loss(
            features,
            weight,
            None,
            torch.tensor([[1, 4999], [7, 7]]),
            torch.tensor([200, 200]),
            blank_id=0,
            logits_per_chunk=20_000,
        ).backward()
    assert 15_000 <= largest <= 20_000 < 2 * 200 * 5000


@pytest.mark.parametrize("wrong", [BLANK, NUM_LABELS, 99])
def test_a_target_that_is_no_label_is_an_error(wrong):
    message = rf"targets: expected labels from 0 to {NUM_LABELS - 1} other than the blank {BLANK}, got {wrong}"
    with pytest.raises(ValueError, match=message):
        linear_ctc_loss(*problem(0, torch.float32), torch.tensor([[1], [2], [wrong], [3]]), LENS, blank_id=BLANK)


def test_a_chunk_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="logits_per_chunk: expected a positive number of outputs, got 0"):
        linear_ctc_loss(*problem(0, torch.float32), TARGETS, LENS, blank_id=BLANK, logits_per_chunk=0)


# In the model.


@pytest.mark.parametrize("overrides", [{}, {"ctc_layers": [0, -1]}, {"projector": "ctc_posterior"}], ids=str)
def test_the_model_has_the_loss_of_its_log_probabilities(overrides):
    model = tiny_model(**overrides).train()
    batch = tiny_processor()(noise(0.9, 0.5), text=["the thing", "an inn"])
    output = model(**batch)
    # A training step has them only where the projector reads them.
    assert (output.audio.ctc_log_probs is None) == (overrides.get("projector") != "ctc_posterior")
    targets = model.ctc_targets(batch["labels"])
    audio = model.encode(batch["input_features"], batch["input_features_mask"])
    rows = [row[row >= 0] for row in targets]
    expected = functional.ctc_loss(
        audio.ctc_log_probs.transpose(0, 1),
        torch.cat(rows),
        audio.encoder_out_lens,
        torch.tensor([len(row) for row in rows]),
        blank=model.config.blank_id,
        reduction="sum",
        zero_infinity=True,
    ) / int((batch["labels"] >= 0).sum())
    torch.testing.assert_close(output.ctc_loss, expected, rtol=1e-5, atol=1e-6)
    parameters = [p for name, p in model.named_parameters() if name.startswith(("audio_tower.", "ctc_head."))]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    gradients = torch.autograd.grad(output.ctc_loss, parameters, allow_unused=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) + 1e-7)


def test_log_probabilities_are_there_without_labels_and_outside_of_training():
    model = tiny_model()
    batch = tiny_processor()(noise(0.5), text=["the"])
    assert model(**batch).audio.ctc_log_probs is not None
    assert model.train()(input_features=batch["input_features"]).audio.ctc_log_probs is not None

"""CTC loss of a linear output layer over a large vocabulary, without its outputs in memory.

The head of a speech LLM may have as many labels as the language model has tokens. Logits of 4 utterances of 45 s over
151k labels are 1.8 GB in float32, and the usual path holds them three times: logits, log-probabilities, gradient. Yet
the loss needs them for the labels of the transcripts only; of all others just the log-normaliser of each frame. With
frame logits z, targets y and R the labels that occur in the batch, the blank included,

    -log P(y) = CTC(log_softmax(z[R]), y) + sum_t (logsumexp(z_t) - logsumexp(z_t[R]))

exactly. The normaliser is computed for a chunk of frames at a time. The loss is a sum, so that the gradient of the
normaliser is known up to a factor as soon as the logits of a chunk are: it is formed there, and no logits are kept or
computed twice.

Shape legend: B utterances, T frames, F scored frames of the whole batch, D width of the features, A = U + 1 label axis
(U labels and the blank), R labels that occur, N targets.

Sources: Graves et al. (2006), "Connectionist Temporal Classification", eq. 15 (gradient: softmax minus occupancy); the
gradient in the forward pass as in Hsu et al. (2024), "Liger Kernel", arXiv 2410.10989, for cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in float32


def linear_ctc_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    feature_lens: Tensor,
    *,
    blank_id: int,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> Tensor:
    """CTC loss of the outputs `features @ weight.T + bias`, summed over the utterances, in nats.

    Equal to `F.ctc_loss(log_softmax(outputs), ..., reduction="sum", zero_infinity=True)`: a transcript that does not
    fit into its frames counts zero and has no gradient. Outputs are computed in the type of `weight`, or that of
    autocast; normaliser, CTC and accumulated gradients in float32 (float64 if that is float64).

    Args:
        features: [B, T, D] what the output layer reads; padding may hold anything finite.
        weight: [A, D] of the output layer.
        bias: [A], or None.
        targets: [B, N] integer labels; negative entries are skipped, wherever they stand.
        feature_lens: [B] integer, 0 to T valid frames of each utterance.
        blank_id: position of the blank on the label axis.
        logits_per_chunk: outputs computed at a time; bounds the memory.

    Returns:
        [] float32 (float64).

    Raises:
        ValueError: A target is the blank or off the label axis, or `logits_per_chunk` is not positive.
    """
    if logits_per_chunk < 1:
        raise ValueError(f"logits_per_chunk: expected a positive number of outputs, got {logits_per_chunk}.")
    num_labels = weight.shape[0]
    occurring = _occurring_labels(targets.to(features.device), num_labels, blank_id)
    is_scored = _scored_frames(occurring, feature_lens.to(features.device), features.shape[1])
    frames_per_chunk = max(1, logits_per_chunk // num_labels)
    return _LinearCTCLoss.apply(features, weight, bias, occurring, is_scored, frames_per_chunk, torch.is_grad_enabled())


@dataclass(frozen=True, eq=False)
class _OccurringLabels:
    """The transcripts in labels of their own: positions among the labels that occur, of which the blank is the first.

    Attributes:
        label_ids: [R] positions on the label axis, blank first.
        targets: [sum of target_lens] positions in `label_ids` of all transcripts, one after the other.
        target_lens: [B].
        min_frames: [B] frames that a transcript needs: one per label, and one between equal neighbours.
    """

    label_ids: Tensor
    targets: Tensor
    target_lens: Tensor
    min_frames: Tensor


def _occurring_labels(targets: Tensor, num_labels: int, blank_id: int) -> _OccurringLabels:
    is_label = targets >= 0  # B, N
    flat = targets[is_label].long()
    is_wrong = (flat >= num_labels) | (flat == blank_id)
    if bool(is_wrong.any()):
        raise ValueError(
            f"targets: expected labels from 0 to {num_labels - 1} other than the blank {blank_id}, got "
            f"{int(flat[is_wrong][0])}."
        )
    labels, position = flat.unique(return_inverse=True)
    row = is_label.nonzero()[:, 0]  # of each target
    is_repeated = (flat[1:] == flat[:-1]) & (row[1:] == row[:-1])
    target_lens = is_label.sum(1)
    repeats = torch.bincount(row[1:][is_repeated], minlength=len(targets))
    label_ids = torch.cat([labels.new_tensor([blank_id]), labels])
    return _OccurringLabels(label_ids, position + 1, target_lens, target_lens + repeats)


def _scored_frames(occurring: _OccurringLabels, feature_lens: Tensor, num_frames: int) -> Tensor:
    """[B, T] the frames of utterances whose transcripts fit into them."""
    lens = feature_lens.masked_fill(feature_lens < occurring.min_frames, 0)
    return torch.arange(num_frames, device=lens.device) < lens[:, None]


class _LinearCTCLoss(torch.autograd.Function):
    """See `linear_ctc_loss`; the gradients of features, weight and bias are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        occurring: _OccurringLabels,
        is_scored: Tensor,
        frames_per_chunk: int,
        with_gradients: bool,
    ) -> Tensor:
        device = features.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(device, enabled=False):
            inputs = features[is_scored].to(dtype)  # B, T, D -> F, D
            head = _Head(weight.to(dtype), None if bias is None else bias.to(dtype))
            gradients = _Gradients.zeros(inputs, head, needs)
            logits, normaliser = _normalise(inputs, head, occurring.label_ids, frames_per_chunk, gradients)
            loss, occupancy = _ctc_of_occurring(logits, normaliser, occurring, is_scored, any(needs))
            if occupancy is not None:
                gradients.subtract(inputs, head, occurring.label_ids, occupancy)
        grad_features = None
        if gradients.inputs is not None:
            grad_features = torch.zeros_like(features)
            grad_features[is_scored] = gradients.inputs.to(features.dtype)
        ctx.save_for_backward(
            grad_features,
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * grad_loss for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


@dataclass(frozen=True, eq=False)
class _Head:
    """Output layer in the type that is computed in: weight [A, D], bias [A] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Sums in float32 (float64), updated in place; None where no gradient is needed.

    Attributes:
        inputs: [F, D]; weight: [A, D]; bias: [A].
    """

    inputs: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, inputs: Tensor, head: _Head, needs: list[bool]) -> _Gradients:
        values = (inputs, head.weight, head.bias)
        dtype = _sum_dtype(inputs)
        return cls(
            *(torch.zeros_like(value, dtype=dtype) if need else None for value, need in zip(values, needs, strict=True))
        )

    def add(self, rows: slice, inputs: Tensor, head: _Head, probs: Tensor) -> None:
        """Of the normaliser of some frames: their inputs [C, D] and softmax [C, A]."""
        if self.bias is not None:
            self.bias.add_(probs.sum(0))
        probs = probs.to(inputs.dtype)
        if self.inputs is not None:
            self.inputs[rows] = (probs @ head.weight).to(self.inputs.dtype)
        if self.weight is not None:
            _add_product(self.weight, probs.T, inputs)

    def subtract(self, inputs: Tensor, head: _Head, label_ids: Tensor, occupancy: Tensor) -> None:
        """Of the transcripts: how much of each frame the labels `label_ids` [R] occupy, [F, R]."""
        if self.bias is not None:
            self.bias.index_add_(0, label_ids, occupancy.sum(0), alpha=-1)
        occupancy = occupancy.to(inputs.dtype)
        if self.inputs is not None:
            self.inputs.sub_(occupancy @ head.weight[label_ids])
        if self.weight is not None:
            self.weight.index_add_(0, label_ids, (occupancy.T @ inputs).to(self.weight.dtype), alpha=-1)


def _normalise(
    inputs: Tensor, head: _Head, label_ids: Tensor, frames_per_chunk: int, gradients: _Gradients
) -> tuple[Tensor, Tensor]:
    """Logits [F, R] of the labels that occur and log-normaliser [F] of all; adds the latter's gradients."""
    dtype = _sum_dtype(inputs)
    occurring = inputs.new_empty(len(inputs), len(label_ids), dtype=dtype)
    normaliser = inputs.new_empty(len(inputs), dtype=dtype)
    needs_gradients = any(sums is not None for sums in (gradients.inputs, gradients.weight, gradients.bias))
    for start in range(0, len(inputs), frames_per_chunk):
        rows = slice(start, start + frames_per_chunk)
        logits = torch.nn.functional.linear(inputs[rows], head.weight, head.bias).to(dtype)  # F, D -> C, A
        occurring[rows] = logits[:, label_ids]
        normaliser[rows] = logits.logsumexp(1)
        if needs_gradients:
            gradients.add(rows, inputs[rows], head, logits.sub_(normaliser[rows, None]).exp_())
    return occurring, normaliser


def _ctc_of_occurring(
    logits: Tensor, normaliser: Tensor, occurring: _OccurringLabels, is_scored: Tensor, with_occupancy: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss [] from the logits [F, R] and normaliser [F], and the occupancy [F, R] of the labels."""
    with torch.set_grad_enabled(with_occupancy):
        logits.requires_grad_(with_occupancy)
        padded = logits.new_zeros(*is_scored.shape, logits.shape[1])
        padded = padded.index_put((is_scored,), logits)  # F, R -> B, T, R
        loss = torch.nn.functional.ctc_loss(
            padded.log_softmax(2).transpose(0, 1),
            occurring.targets,
            is_scored.sum(1),
            occurring.target_lens,
            blank=0,
            reduction="sum",
            zero_infinity=True,
        )
        # Differences frame by frame: they are small once the model is good, while their parts are not.
        loss = loss + (normaliser - logits.logsumexp(1)).sum()
    occupancy = -torch.autograd.grad(loss, logits)[0] if with_occupancy else None
    return loss.detach(), occupancy


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32

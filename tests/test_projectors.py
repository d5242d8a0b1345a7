"""Projectors and the CTC head against what they are defined to compute."""

import math

import pytest
import torch
from tiny_models import ctc_token_ids, tiny_config
from torch import nn

from hf_speechllm.audio_encoders import AudioEncoding, lens_to_mask
from hf_speechllm.configuration_speechllm import PROJECTORS
from hf_speechllm.modeling_speechllm import SpeechLLMPreTrainedModel
from hf_speechllm.projectors import PROJECTOR_CLASSES, CTCHead, drop_blank_positions, stack_frames

WIDTH, HIDDEN = 16, 24  # of the tiny encoder and language model
NUM_LABELS = len(ctc_token_ids())


def random_projector(projector: str, downsampling: int, **values) -> nn.Module:
    torch.manual_seed(0)
    module = PROJECTOR_CLASSES[projector](tiny_config(projector=projector, downsampling=downsampling, **values))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def project(projector: nn.Module, frames: torch.Tensor, lens: torch.Tensor, ctc_log_probs: torch.Tensor):
    """Runs any projector on `[B, T, D]` as the model does: padded frames are zero."""
    mask = lens_to_mask(lens, frames.shape[1])
    frames = frames * mask[..., None]
    name = type(projector).__name__
    if name == "CTCPosteriorProjector":
        generator = torch.Generator().manual_seed(1)
        return projector(frames, ctc_log_probs, mask, torch.randn(NUM_LABELS, HIDDEN, generator=generator))
    return projector(frames, mask) if name in ("ConvProjector", "PoolProjector") else projector(frames)


def random_frames(batch_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    frames = torch.randn(batch_size, length, WIDTH, generator=generator)
    return frames, (2 * torch.randn(batch_size, length, NUM_LABELS + 1, generator=generator)).log_softmax(-1)


def test_there_is_a_projector_for_every_name_in_the_config():
    assert set(PROJECTOR_CLASSES) == set(PROJECTORS)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("downsampling", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_a_projector_gives_one_position_for_each_started_group_of_frames(projector, downsampling, length):
    frames, ctc_log_probs = random_frames(2, length)
    module = random_projector(projector, downsampling, projector_hidden_size=10)
    embeds = project(module, frames, torch.tensor([length, length]), ctc_log_probs)
    assert embeds.shape == (2, math.ceil(length / downsampling), HIDDEN)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("downsampling", [1, 2, 4, 8])
def test_padding_changes_nothing(projector, downsampling):
    frames, ctc_log_probs = random_frames(3, 21)
    lens = torch.tensor([21, 10, 3])
    module = random_projector(projector, downsampling)
    together = project(module, frames, lens, ctc_log_probs)
    for row, length in enumerate(lens.tolist()):
        alone = project(
            module, frames[row : row + 1, :length], lens[row : row + 1], ctc_log_probs[row : row + 1, :length]
        )
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_frame_reaches_its_position(projector):
    """And no frame but a neighbour reaches another one."""
    frames, ctc_log_probs = random_frames(1, 12)
    frames.requires_grad_()
    embeds = project(random_projector(projector, 4), frames, torch.tensor([12]), ctc_log_probs)
    embeds[0, 1].sum().backward()
    reached = frames.grad[0].abs().sum(-1) > 0
    neighbour = 1 if projector == "conv" else 0
    assert reached.nonzero().flatten().tolist() == list(range(4 - neighbour, 8 + neighbour))


def test_stack_frames_puts_consecutive_frames_side_by_side_and_zeros_at_the_end():
    x = torch.arange(10.0).view(1, 5, 2)
    assert stack_frames(x, 2).tolist() == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 0]]]]


def test_stack_is_one_linear_layer_on_stacked_frames():
    module = random_projector("stack", 3)
    frames, ctc_log_probs = random_frames(1, 6)
    expected = frames.view(1, 2, 3 * WIDTH) @ module.linear.weight.T + module.linear.bias
    torch.testing.assert_close(project(module, frames, torch.tensor([6]), ctc_log_probs), expected)


def test_pool_is_one_linear_layer_on_the_mean_of_the_valid_frames():
    module = random_projector("pool", 4)
    frames, ctc_log_probs = random_frames(2, 9)
    embeds = project(module, frames, torch.tensor([9, 6]), ctc_log_probs)
    for row, position, group in ((0, 0, slice(0, 4)), (0, 2, slice(8, 9)), (1, 1, slice(4, 6))):
        expected = frames[row, group].mean(0) @ module.linear.weight.T + module.linear.bias
        torch.testing.assert_close(embeds[row, position], expected)


def test_hidden_size_and_activation_come_from_the_config():
    for projector in ("mlp", "conv", "ctc_posterior"):
        module = random_projector(projector, 2, projector_hidden_size=10, projector_hidden_act="relu")
        assert isinstance(module.act, nn.ReLU)
        assert 10 in {parameter.shape[0] for parameter in module.parameters()}


@pytest.mark.parametrize("downsampling", [1, 3])
def test_ctc_posterior_starts_as_the_expected_embedding_of_the_labels(downsampling):
    """Oracle: in each group, expected label counts, at most one label in all, times the embeddings."""
    module = random_projector("ctc_posterior", downsampling)
    SpeechLLMPreTrainedModel(module_config := tiny_config())._init_weights(module)
    assert module_config.initializer_range > 0 and module.linear_2.weight.abs().max() == 0
    nn.init.zeros_(module.linear_2.bias)
    frames, ctc_log_probs = random_frames(2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    embeddings = torch.randn(NUM_LABELS, HIDDEN)
    embeds = module(frames, ctc_log_probs, mask, embeddings)
    for row in range(2):
        for position in range(embeds.shape[1]):
            counts = torch.zeros(NUM_LABELS)
            for frame in range(position * downsampling, min(8, (position + 1) * downsampling)):
                counts += ctc_log_probs[row, frame, :-1].exp()
            expected = (counts / max(1.0, float(counts.sum()))) @ embeddings
            torch.testing.assert_close(embeds[row, position], expected, atol=1e-5, rtol=1e-5)


def test_ctc_posterior_shows_what_is_missing_to_a_label_as_the_blank_embedding():
    module = random_projector("ctc_posterior", 2)
    nn.init.zeros_(module.linear_2.weight)
    nn.init.zeros_(module.linear_2.bias)
    log_probs = torch.full((1, 4, NUM_LABELS + 1), -100.0)
    log_probs[0, :2, -1] = 0.0  # blank, blank
    log_probs[0, 2, 5] = 0.0  # a label of probability one, twice
    log_probs[0, 3, 5] = 0.0
    embeddings = torch.randn(NUM_LABELS, HIDDEN)
    embeds = module(torch.zeros(1, 4, WIDTH), log_probs, torch.ones(1, 4, dtype=torch.bool), embeddings)
    torch.testing.assert_close(embeds[0, 0], module.blank_embedding)
    torch.testing.assert_close(embeds[0, 1], embeddings[5], atol=1e-5, rtol=1e-5)


def head_input(num_layers: int) -> tuple[AudioEncoding, dict[int, torch.Tensor]]:
    torch.manual_seed(3)
    layers = {index: 5 * torch.randn(2, 6, WIDTH) + 1 for index in range(num_layers)}
    return AudioEncoding(layers, layers[num_layers - 1], torch.tensor([6, 4])), layers


def test_ctc_head_on_the_last_layer_is_a_linear_layer():
    encoding, layers = head_input(3)
    head = CTCHead(tiny_config())
    assert head.layer_norm is None and head.layer_weights is None
    log_probs = head(encoding, 3)
    assert log_probs.dtype == torch.float32 and log_probs.shape == (2, 6, NUM_LABELS + 1)
    torch.testing.assert_close(log_probs, head.linear(layers[2]).log_softmax(-1))


@pytest.mark.parametrize("index", [1, -2])
def test_ctc_head_on_a_lower_layer_normalises_it(index):
    encoding, layers = head_input(3)
    head = CTCHead(tiny_config(ctc_layers=[index]))
    expected = head.linear(nn.functional.layer_norm(layers[1], (WIDTH,))).log_softmax(-1)
    torch.testing.assert_close(head(encoding, 3), expected)


def test_ctc_head_mixes_layers_with_softmax_weights():
    encoding, layers = head_input(3)
    head = CTCHead(tiny_config(ctc_layers=[0, -1]))
    with torch.no_grad():
        head.layer_weights.copy_(torch.tensor([0.0, math.log(3.0)]))
    mixed = 0.25 * layers[0] + 0.75 * layers[2]
    expected = head.linear(nn.functional.layer_norm(mixed, (WIDTH,))).log_softmax(-1)
    torch.testing.assert_close(head(encoding, 3), expected)


@pytest.mark.parametrize("downsampling", [1, 3])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.999])
def test_drop_blank_positions_against_a_loop(downsampling, threshold):
    torch.manual_seed(7)
    blank = torch.rand(4, 11)
    blank[1] = 1.0  # silence: one position stays
    blank[2, :6] = 1.0
    log_probs = torch.stack([1 - blank, blank], -1).clamp(min=1e-9).log()
    lens = torch.tensor([11, 8, 9, 1])
    mask = lens_to_mask(lens, 11)
    embeds_lens = (lens + downsampling - 1) // downsampling
    embeds = torch.randn(4, math.ceil(11 / downsampling), HIDDEN)
    kept, kept_lens = drop_blank_positions(embeds, log_probs, mask, downsampling, threshold)
    for row in range(4):
        expected = []
        for position in range(int(embeds_lens[row])):
            frames = range(position * downsampling, min(int(lens[row]), (position + 1) * downsampling))
            if any(blank[row, frame] <= threshold for frame in frames):
                expected.append(embeds[row, position])
        expected = expected or [embeds[row, 0]]
        assert kept_lens[row] == len(expected)
        assert torch.equal(kept[row, : len(expected)], torch.stack(expected))
    assert kept.shape[1] == kept_lens.max()

"""Acoustic encoders: the output of an utterance depends on nothing but the utterance."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import AUDIO_CONFIGS, noise, tiny_config, tiny_processor
from torch import nn
from transformers import AutoModel, AutoModelForCTC, AutoModelForSpeechSeq2Seq, ParakeetCTCConfig, ParakeetForCTC

from hf_speechllm.audio_encoders import (
    build_audio_tower,
    encode_audio,
    encoder_layers,
    encoder_width,
    extract_audio_tower,
    masked_group_norm,
)

DURATIONS_S = (0.61, 1.3, 0.05, 0.987)  # the third is one frame or two of every encoder
# Their plain forward, on one clip without padding, is what we compute. Whisper's insists on 30 s.
WITH_PLAIN_FORWARD = [audio for audio in AUDIO_CONFIGS if audio != "whisper"]


def tiny_tower(audio: str, seed: int = 0, **values):
    """Encoder with fixed random weights, larger than the usual initialisation so that differences show."""
    torch.manual_seed(seed)
    config = tiny_config(audio).audio_config
    for name, value in values.items():
        setattr(config, name, value)
    tower = build_audio_tower(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.mul_(2.0)
    return tower


def features(audio: str, *durations_s: float) -> dict[str, torch.Tensor]:
    """Input of an encoder for clips of noise; clip i is the same noise in whatever company."""
    waveforms = [noise(duration_s, seed=round(duration_s * 1000))[0] for duration_s in durations_s]
    return dict(tiny_processor(audio)(waveforms))


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_an_utterance_is_encoded_the_same_alone_and_in_a_padded_batch(audio):
    tower = tiny_tower(audio)
    with torch.no_grad():
        together = encode_audio(tower, **features(audio, *DURATIONS_S), layers=(0, -1))
        for row, duration_s in enumerate(DURATIONS_S):
            alone = encode_audio(tower, **features(audio, duration_s), layers=(0, -1))
            length = int(alone.encoder_out_lens)
            assert together.encoder_out_lens[row] == length
            for layer in alone.layers:
                ours, theirs = together.layers[layer][row, :length], alone.layers[layer][0, :length]
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert together.encoder_out.isfinite().all(), "frames of padding are multiplied by zero later on"


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_what_the_padding_holds_does_not_matter(audio):
    tower = tiny_tower(audio)
    inputs = features(audio, 0.61, 1.3)
    time_axis = 2 if audio == "whisper" else 1
    mask = inputs["input_features_mask"].bool()
    mask = mask[:, None] if time_axis == 2 else mask.view(mask.shape + (1,) * (inputs["input_features"].dim() - 2))
    filled = torch.where(mask, inputs["input_features"], torch.tensor(3.0))
    with torch.no_grad():
        clean = encode_audio(tower, **inputs)
        dirty = encode_audio(tower, filled, inputs["input_features_mask"])
    length = int(clean.encoder_out_lens[0])
    torch.testing.assert_close(dirty.encoder_out[0, :length], clean.encoder_out[0, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("audio", WITH_PLAIN_FORWARD)
def test_one_clip_is_encoded_as_by_the_plain_forward(audio):
    tower = tiny_tower(audio)
    inputs = features(audio, 0.987)
    unpadded = inputs["input_features"][:, : int(inputs["input_features_mask"].sum())]
    with torch.no_grad():
        ours = encode_audio(tower, **inputs)
        plain = tower(**{tower.main_input_name: unpadded}).last_hidden_state
    assert ours.encoder_out_lens.tolist() == [plain.shape[1]]
    torch.testing.assert_close(ours.encoder_out[:, : plain.shape[1]], plain, atol=1e-5, rtol=1e-5)


def test_whisper_is_encoded_as_by_the_plain_forward_where_the_clip_fills_its_positions():
    tower = tiny_tower("whisper", max_source_positions=30)
    mel = features("whisper", 0.6)["input_features"][:, :, :60]
    with torch.no_grad():
        ours = encode_audio(tower, mel)
        plain = tower(mel).last_hidden_state
    torch.testing.assert_close(ours.encoder_out, plain, atol=1e-5, rtol=1e-5)
    assert ours.encoder_out_lens.tolist() == [30]


def test_whisper_features_padded_to_30_s_cost_and_change_nothing():
    tower, processor, (waveform,) = tiny_tower("whisper"), tiny_processor("whisper"), noise(0.6)
    with torch.no_grad():
        short = encode_audio(tower, **processor(waveform))
        padded = encode_audio(tower, **processor(waveform, padding="max_length"))
    assert padded.encoder_out.shape == short.encoder_out.shape == (1, 30, 16)
    torch.testing.assert_close(padded.encoder_out, short.encoder_out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_without_mask_everything_is_valid(audio):
    tower, inputs = tiny_tower(audio), features(audio, 0.64)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_audio(tower, inputs["input_features"]).encoder_out,
            encode_audio(tower, inputs["input_features"], torch.ones_like(inputs["input_features_mask"])).encoder_out,
        )


@pytest.mark.parametrize(("audio", "frames"), [("moonshine", 40), ("whisper", 50), ("parakeet", 13)])
def test_number_of_frames_of_a_second(audio, frames):
    encoding = encode_audio(tiny_tower(audio), **features(audio, 1.0))
    assert encoding.encoder_out_lens.tolist() == [frames] and encoding.encoder_out.shape == (1, frames, 16)


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
@pytest.mark.parametrize("num_samples", [20, 100, 560])
def test_a_clip_shorter_than_a_frame_is_encoded_alone_and_in_a_batch(audio, num_samples):
    tower, processor, (waveform,) = tiny_tower(audio), tiny_processor(audio), noise(1.0)
    with torch.no_grad():
        alone = encode_audio(tower, **processor(waveform[:num_samples]))
        together = encode_audio(tower, **processor([waveform[:num_samples], waveform]))
    length = int(alone.encoder_out_lens)
    assert length == together.encoder_out_lens[0] and 1 <= length <= 3
    assert alone.encoder_out.isfinite().all() and together.encoder_out.isfinite().all()
    torch.testing.assert_close(together.encoder_out[0, :length], alone.encoder_out[0, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("audio", ["moonshine", "wav2vec2", "wav2vec2-layer-norm", "hubert", "wavlm"])
def test_samples_fewer_than_the_convolutions_span_count_as_followed_by_silence(audio):
    tower, waveform = tiny_tower(audio), torch.from_numpy(noise(1.0)[0])[None]
    silence = torch.nn.functional.pad(waveform[:, :100], (0, 15900))
    mask = torch.ones(2, 16000)
    mask[0, 100:] = 0
    with torch.no_grad():
        alone = encode_audio(tower, waveform[:, :100])
        together = encode_audio(tower, torch.cat([silence, waveform]), mask)
    assert alone.encoder_out.shape == (1, 1, 16) and together.encoder_out_lens[0] == 1
    torch.testing.assert_close(together.encoder_out[0, :1], alone.encoder_out[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_layers_are_captured_by_positive_and_negative_index(audio):
    tower, inputs = tiny_tower(audio), features(audio, 0.7)
    outputs = []
    handle = encoder_layers(tower)[0].register_forward_hook(lambda *call: outputs.append(call[2]))
    num_layers = len(encoder_layers(tower))
    with torch.no_grad():
        encoding = encode_audio(tower, **inputs, layers=(0, -num_layers, -1))
    handle.remove()
    first = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    assert set(encoding.layers) == {0, num_layers - 1}
    assert torch.equal(encoding.layers[0], first)
    assert torch.equal(encoding.layers[num_layers - 1], encoding.encoder_out)
    assert not encoder_layers(tower)[0]._forward_hooks, "hooks are taken away again"


def test_no_layer_is_captured_unless_asked_for():
    assert encode_audio(tiny_tower("moonshine"), **features("moonshine", 0.5)).layers == {}


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_gradients_reach_every_trained_weight_below_the_captured_layer_and_the_output(audio):
    tower = tiny_tower(audio)
    encoding = encode_audio(tower, **features(audio, 0.61, 0.8), layers=(0,))
    (encoding.encoder_out.square().sum() + encoding.layers[0].square().sum()).backward()
    unused = ("masked_spec_embed",)
    without = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad and not name.endswith(unused) and parameter.grad is None
    ]
    assert without == []


@pytest.mark.parametrize("audio", [*AUDIO_CONFIGS, "parakeet_ctc"])
def test_the_encoder_is_taken_out_of_a_larger_model(audio):
    """The weights are the same objects, and a tower built from the found config has the same names and shapes."""
    config = tiny_config("parakeet" if audio == "parakeet_ctc" else audio).audio_config
    if audio == "parakeet_ctc":
        model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=9, pad_token_id=0, encoder_config=config.to_dict()))
    elif audio in ("whisper", "moonshine"):
        model = AutoModelForSpeechSeq2Seq.from_config(config)
    elif audio == "parakeet":
        model = AutoModel.from_config(config)
    else:
        config.vocab_size = 9
        model = AutoModelForCTC.from_config(config)
    tower = extract_audio_tower(model)
    assert not hasattr(tower, "decoder") and not hasattr(tower, "lm_head") and not hasattr(tower, "ctc_head")
    whole = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in tower.parameters()} <= whole
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in build_audio_tower(tower.config).state_dict().items()}
    assert encoder_width(tower.config) == encoder_width(model.config) == 16


def test_masked_group_norm_is_the_group_norm_of_each_row_without_its_padding():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, lens = torch.randn(3, 6, 11) + 2.0, torch.tensor([11, 4, 7])
    ours = masked_group_norm(norm, x, lens)
    for row, length in enumerate(lens.tolist()):
        torch.testing.assert_close(ours[row, :, :length], norm(x[row : row + 1, :, :length])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_does_not_exist_is_an_error(layer):
    with pytest.raises(ValueError, match=f"ctc_layers: layer {layer} does not exist in an encoder of 3 layers"):
        encode_audio(tiny_tower("moonshine"), **features("moonshine", 0.5), layers=(layer,))


def test_a_mask_of_another_shape_is_an_error():
    inputs = features("whisper", 0.5)["input_features"]
    with pytest.raises(
        ValueError, match=r"input_features_mask must have shape \[batch, time\] = \(1, \d+\), got \(1, 7\)"
    ):
        encode_audio(tiny_tower("whisper"), inputs, torch.ones(1, 7))


def test_whisper_refuses_audio_beyond_its_positions():
    tower = tiny_tower("whisper", max_source_positions=50)
    with pytest.raises(ValueError, match=r"positions for 100 mel frames \(1 s\), got 101; segment the audio first"):
        encode_audio(tower, torch.zeros(1, 80, 101))


def test_an_encoder_without_layers_is_an_error():
    with pytest.raises(ValueError, match="audio_config: no list of layers found in a Linear; supported are"):
        encoder_layers(nn.Linear(2, 2))


def test_an_encoder_that_changes_the_frame_rate_silently_is_an_error():
    class Halving(nn.Module):
        config = SimpleNamespace(model_type="halving")
        main_input_name = "input_features"
        layers = nn.ModuleList([nn.Identity()])

        def forward(self, input_features, attention_mask):
            return SimpleNamespace(last_hidden_state=input_features[:, ::2])

    with pytest.raises(ValueError, match="audio_config: a Halving changes the number of frames and does not tell how"):
        encode_audio(Halving(), torch.zeros(1, 8, 4))


@pytest.mark.parametrize("audio", ["wav2vec2", "hubert", "wavlm", "wav2vec2-bert", "parakeet"])
def test_reading_a_lower_layer_while_layers_are_dropped_at_random_is_an_error(audio):
    tower = tiny_tower(audio, layerdrop=0.1)
    encode_audio(tower, **features(audio, 0.61), layers=(0, -1))
    encode_audio(tower.train(), **features(audio, 0.61), layers=(-1,))
    with pytest.raises(ValueError, match="ctc_layers: layers below the last need .* got layerdrop=0.1; .* layerdrop=0"):
        encode_audio(tower, **features(audio, 0.61), layers=(0, -1))


@pytest.mark.parametrize("audio", ["wav2vec2", "wavlm", "wav2vec2-bert"])
def test_a_length_adapter_is_an_error(audio):
    with pytest.raises(ValueError, match="audio_config: add_adapter must be False, got True; the projector takes"):
        tiny_tower(audio, add_adapter=True)

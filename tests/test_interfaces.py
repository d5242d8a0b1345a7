"""How the language model hears: causal prefix, bidirectional prefix, gated cross-attention."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from tiny_models import (
    TEXT_CONFIGS,
    loud_model,
    noise,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from torch import nn
from transformers import AutoModelForCausalLM

from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.configuration_speechllm import INTERFACES
from hf_speechllm.cross_attention import GatedCrossAttentionLayer, decoder_layers
from hf_speechllm.lm_score import CausalLMScorer
from training.arguments import TuningArguments
from training.train import set_trainable

EOS, PAD = 2, 0
DURATIONS_S = (0.9, 0.31, 0.62)
TEXTS = ["the ant", "in", "a thing"]
PROMPTS = {
    "none": ([], []),
    "short": ([1], [2, 1]),
    "long": ([1, *range(3, 25)], [*range(5, 20), 2, 1]),
    "before": ([1, 4, 5], []),
    "after": ([], [6, 1]),
}
# Each family of language models, and one of them with the other attention.
FAMILIES = [*((text, "sdpa") for text in TEXT_CONFIGS), ("qwen3", "eager")]
SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "joint": {"ctc_weight": 0.3},
    "joint beam": {"num_beams": 3, "num_return_sequences": 2, "ctc_weight": 0.4},
}


def model_of(interface: str, text: str = "llama", seed: int = 0, **values) -> SpeechLLMForConditionalGeneration:
    """A model with weights so large that outputs differ, whose gates, if any, are open."""
    model = loud_model(text=text, seed=seed, interface=interface, **values)
    for layer in model.cross_attention.layers if model.cross_attention is not None else ():
        nn.init.constant_(layer.attention_gate, 1.5)
        nn.init.constant_(layer.feed_forward_gate, -0.6)
    return model


def inputs_of(text: list[str] | None = None) -> dict[str, torch.Tensor]:
    return dict(tiny_processor()(noise(*DURATIONS_S), text=text))


def tokens_of(sequence: torch.Tensor) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in (EOS, PAD), sequence.tolist()))


@torch.no_grad()
def uncached_logits(model, inputs: dict[str, torch.Tensor], row: int, tokens: list[int]) -> torch.Tensor:
    """Logits `[len(tokens) + 1, V]` of an utterance alone, from one pass over the whole sequence, without cache."""
    length = int(inputs["input_features_mask"][row].sum())
    alone = {name: inputs[name][row : row + 1, :length] for name in ("input_features", "input_features_mask")}
    return model(**alone, labels=torch.tensor([[*tokens, 5]]), ctc_targets=torch.tensor([[1]])).logits[0]


# What each interface computes.


def attention_by_hand(layer: GatedCrossAttentionLayer, text: torch.Tensor, speech: torch.Tensor) -> torch.Tensor:
    """Oracle: one text row `[Q, H]`, one utterance's valid, normalised positions `[L, H]`, head by head."""
    normed = nn.functional.layer_norm(text, text.shape[-1:], layer.attention_norm.weight, layer.attention_norm.bias)
    heard = []
    for head in range(layer.num_heads):
        part = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        query, key, value = (
            x @ projection.weight[part].T
            for x, projection in ((normed, layer.query), (speech, layer.key), (speech, layer.value))
        )
        scores = query @ key.T / math.sqrt(layer.head_dim)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heard.append(weights @ value)
    text = text + math.tanh(float(layer.attention_gate)) * (torch.cat(heard, -1) @ layer.output.weight.T)
    norm = layer.feed_forward_norm
    x = nn.functional.layer_norm(text, text.shape[-1:], norm.weight, norm.bias)
    x = nn.functional.gelu(x @ layer.feed_forward_in.weight.T) @ layer.feed_forward_out.weight.T
    return text + math.tanh(float(layer.feed_forward_gate)) * x


@torch.no_grad()
@pytest.mark.parametrize("rows_per_utterance", [1, 3])
def test_gated_cross_attention_against_attention_by_hand(rows_per_utterance):
    torch.manual_seed(1)
    layer = GatedCrossAttentionLayer(tiny_config(text="qwen3", cross_attention_intermediate_size=10))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    lens, speech = (5, 2), torch.randn(2, 5, 24)
    text = torch.randn(2 * rows_per_utterance, 4, 24)
    mask = torch.arange(5) < torch.tensor(lens)[:, None]
    memory = layer.keys_values(speech, mask[:, None, None])
    got = layer(text, memory.keys, memory.values, memory.mask)
    for row in range(len(text)):
        utterance = row // rows_per_utterance
        expected = attention_by_hand(layer, text[row], speech[utterance, : lens[utterance]])
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("text", "attention"), FAMILIES)
def test_before_training_cross_attention_is_the_plain_language_model(text, attention):
    model = loud_model(text=text, interface="cross_attention", attn_implementation=attention)
    inputs = inputs_of(TEXTS)
    output = model(**inputs)
    for row, labels in enumerate(inputs["labels"]):
        labels = labels[labels != -100]
        ids = torch.cat([torch.tensor([1, 2, 1]), labels])[None]  # the prompt before and after the audio
        expected = model.language_model(input_ids=ids).logits[0, 2:-1]
        torch.testing.assert_close(output.logits[row, -len(labels) :], expected, atol=1e-6, rtol=1e-6)
    request = {"input_features": inputs["input_features"][:1], "labels": inputs["labels"][:1]}
    alone = model(**request)
    ids = torch.cat([torch.tensor([1, 2, 1]), inputs["labels"][0][inputs["labels"][0] != -100]])[None]
    position_ids = torch.arange(ids.shape[1])[None]
    plain = model.language_model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=position_ids)
    assert torch.equal(alone.logits[0], plain.logits[0, 2:-1]), "without padding, to the last bit"


@torch.no_grad()
@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_with_open_gates_cross_attention_hears(text):
    model, inputs = model_of("cross_attention", text), inputs_of(TEXTS)
    logits = model(**inputs).logits
    other = model(**{**inputs, "input_features": inputs["input_features"].flip(1)}).logits
    assert (logits - other).abs().amax() > 1e-3


def allowed_by_hand(inputs, row: int) -> torch.Tensor:
    """Oracle: which positions `[P, P]` of one row of `DecoderInputs` attend to which."""
    size = inputs.mask.shape[1]
    allowed = torch.zeros(size, size, dtype=torch.bool)
    for query, key in itertools.product(range(size), range(size)):
        both_audio = inputs.is_audio[row, query] and inputs.is_audio[row, key]
        allowed[query, key] = bool(inputs.mask[row, key]) and (key <= query or both_audio)
    return allowed


@torch.no_grad()
@pytest.mark.parametrize(("text", "attention"), FAMILIES)
def test_bidirectional_prefix_against_a_mask_by_hand(text, attention):
    model = model_of("bidirectional_prefix", text, attn_implementation=attention)
    inputs = inputs_of()
    prefix = model.merge_inputs(model.get_audio_features(**inputs), None)
    assert prefix.is_audio.sum(1).tolist() == model.get_audio_features(**inputs).audio_embeds_lens.tolist()
    assert not prefix.is_audio[:, -2:].any() and prefix.is_audio[:, -3].all(), "two tokens of prompt behind the audio"
    allowed = torch.stack([allowed_by_hand(prefix, row) for row in range(3)])[:, None]
    position_ids = (prefix.mask.cumsum(1) - 1).clamp(min=0)
    expected = model.language_model(
        inputs_embeds=prefix.inputs_embeds,
        attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
        position_ids=position_ids,
        use_cache=False,
    ).logits
    logits = model(**inputs).logits
    valid = prefix.mask.bool()
    torch.testing.assert_close(logits[valid], expected[valid], atol=1e-5, rtol=1e-5)
    causal = model.language_model(
        inputs_embeds=prefix.inputs_embeds, attention_mask=prefix.mask, position_ids=position_ids
    ).logits
    assert (causal - logits)[valid].abs().amax() > 1e-4


@pytest.mark.parametrize(("interface", "hears_ahead"), [("prefix", False), ("bidirectional_prefix", True)])
def test_only_a_bidirectional_prefix_attends_to_later_audio_and_text_never_does(interface, hears_ahead):
    model, inputs = model_of(interface), inputs_of()
    audio = model.get_audio_features(**inputs)
    audio.audio_embeds = audio.audio_embeds.detach().requires_grad_()
    prefix = model.merge_inputs(audio, None)
    with model.listening(audio, prefix):
        output = model.language_model(inputs_embeds=prefix.inputs_embeds, attention_mask=prefix.mask)
    first, before = 1, 0  # positions of the longest row, which has no padding: one token of prompt, then audio
    (gradient,) = torch.autograd.grad(output.logits[0, first].sum(), audio.audio_embeds, retain_graph=True)
    assert bool(gradient[0, -1].abs().sum() > 0) == hears_ahead
    assert gradient[1:].abs().sum() == 0, "of another utterance"
    (gradient,) = torch.autograd.grad(output.logits[0, before].sum(), audio.audio_embeds)
    assert gradient.abs().sum() == 0


def test_layers_are_inserted_at_the_interval_and_only_inside_the_context():
    model = model_of("cross_attention", cross_attention_interval=2)
    assert list(model.cross_attention.positions) == [1] and len(model.cross_attention.layers) == 1
    audio = model.get_audio_features(**inputs_of())
    layers = decoder_layers(model.language_model)
    before = list(layers)
    names = set(model.language_model.state_dict())
    with pytest.raises(ZeroDivisionError), model.listening(audio, model.merge_inputs(audio, None)):
        assert layers[0] is before[0] and layers[1] is not before[1]
        assert layers[1].mlp is before[1].mlp, "asked for an attribute, it is the layer that it stands for"
        raise ZeroDivisionError
    assert list(layers) == before and set(model.language_model.state_dict()) == names
    assert names == set(loud_model().language_model.state_dict())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layers[1].no_such_thing


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 24, "num_attention_heads": 2},
        {"model_type": "gpt_neox", "num_attention_heads": 2, "intermediate_size": 32},
        {"model_type": "bloom", "n_head": 2},
        {
            "model_type": "gemma2",
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "sliding_window": 4,
        },
    ],
    ids=lambda values: values["model_type"],
)
def test_cross_attention_finds_the_layers_of_other_families(values, monkeypatch):
    monkeypatch.setitem(TEXT_CONFIGS, "other", {"hidden_size": 24, "num_hidden_layers": 3, **values})
    model, inputs = model_of("cross_attention", "other"), inputs_of()
    for row, sequence in enumerate(model.generate(**inputs, max_new_tokens=4)):
        tokens = tokens_of(sequence)
        logits = uncached_logits(model, inputs, row, tokens)
        assert logits.argmax(-1)[: len(tokens)].tolist() == tokens


# Decoding.


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize(("prompt", "attention"), [*((prompt, "sdpa") for prompt in PROMPTS), ("none", "eager")])
def test_cached_decoding_equals_uncached_recomputation(interface, prompt, attention):
    before, after = PROMPTS[prompt]
    model = model_of(interface, prompt_before_ids=before, prompt_after_ids=after, attn_implementation=attention)
    inputs = inputs_of()
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 5, "min_new_tokens": 5}
    output = model.generate(**inputs, **options)
    logits = torch.stack(output.logits, 1)  # B, N, V
    for row, sequence in enumerate(output.sequences):
        expected = uncached_logits(model, inputs, row, sequence.tolist()[:-1])
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interface", INTERFACES[1:])
@pytest.mark.parametrize(
    ("text", "prompt", "options"),
    [
        *((text, "short", {}) for text in TEXT_CONFIGS),
        ("llama", "before", {}),
        ("llama", "short", {"do_sample": True, "num_beams": 1}),
    ],
)
def test_scores_of_beams_and_samples_equal_uncached_recomputation(interface, text, prompt, options):
    """With beams, the audio position at the end of a prompt (`before`) needs another prefill than text there."""
    before, after = PROMPTS[prompt]
    model = model_of(interface, text, prompt_before_ids=before, prompt_after_ids=after)
    inputs = inputs_of()
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        **{"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4, "min_new_tokens": 4, **options},
        top_k=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    beam_indices = output.get("beam_indices")
    got = model.language_model.compute_transition_scores(
        output.sequences, output.logits, beam_indices, normalize_logits=True
    )
    for row, sequence in enumerate(output.sequences):
        log_probs = uncached_logits(model, inputs, row // 3, sequence.tolist()[:-1]).log_softmax(-1)
        expected = log_probs.gather(1, sequence[:, None])[:, 0]
        torch.testing.assert_close(got[row], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("interface", INTERFACES[1:])
def test_joint_scores_are_those_of_language_model_and_ctc_apart(interface):
    """Oracle: the forward pass and torch's CTC loss, for hypotheses that end."""
    model, inputs = model_of(interface, seed=2), inputs_of()
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0, "max_new_tokens": 12}
    output = model.generate(**inputs, **options, ctc_weight=0.4, return_dict_in_generate=True, output_scores=True)
    audio = model.encode(**inputs)
    checked = 0
    for row, (sequence, score) in enumerate(zip(output.sequences, output.sequences_scores, strict=True)):
        if EOS not in sequence.tolist():
            continue
        tokens, utterance = tokens_of(sequence), row // 4
        log_probs = uncached_logits(model, inputs, utterance, tokens).log_softmax(-1)
        lm_score = log_probs.gather(1, torch.tensor([[*tokens, EOS]]).T).sum()
        ctc_score = -nn.functional.ctc_loss(
            audio.ctc_log_probs[utterance, : audio.encoder_out_lens[utterance]],
            model.label_units.tokens_to_labels(torch.tensor(tokens)),
            audio.encoder_out_lens[utterance : utterance + 1],
            torch.tensor([len(tokens)]),
            blank=model.config.blank_id,
            reduction="sum",
        )
        torch.testing.assert_close(score, 0.6 * lm_score + 0.4 * ctc_score, atol=1e-3, rtol=1e-4)
        checked += 1
    assert checked > 2


@pytest.mark.parametrize("interface", INTERFACES[1:])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_batch_is_decoded_as_one_by_one(interface, search):
    model, processor = model_of(interface, seed=1), tiny_processor()
    clips = noise(0.9, 0.31, 1.4, 0.62)
    options = {"return_dict_in_generate": True, "output_scores": True, **SEARCHES[search]}
    together = model.generate(**processor(clips), **options)
    rows = options.get("num_return_sequences", 1)
    for index, clip in enumerate(clips):
        alone = model.generate(**processor(clip), **options)
        ours = [tokens_of(row) for row in together.sequences[index * rows : (index + 1) * rows]]
        assert ours == [tokens_of(row) for row in alone.sequences]
        if "num_beams" in options:
            scores = together.sequences_scores[index * rows : (index + 1) * rows]
            torch.testing.assert_close(scores, alone.sequences_scores, atol=1e-4, rtol=1e-4)
    assert len({tuple(tokens_of(row)) for row in together.sequences}) > 2, "clips that sound different"


@pytest.mark.parametrize("interface", INTERFACES[1:])
def test_other_caches_give_the_same(interface):
    model, inputs = model_of(interface, "qwen3"), inputs_of()
    for num_beams in (1, 3):
        expected = model.generate(**inputs, num_beams=num_beams)
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**inputs, num_beams=num_beams, **options), expected)


@torch.no_grad()
def test_keys_and_values_of_the_speech_are_computed_once_for_all_beams(monkeypatch):
    model, inputs = model_of("cross_attention"), inputs_of()
    computed, attended = [], []
    for layer in model.cross_attention.layers:
        layer.key.register_forward_hook(lambda _module, _args, output: computed.append(len(output)))
        layer.query.register_forward_hook(lambda _module, _args, output: attended.append(len(output)))
    model.generate(**inputs, num_beams=4, max_new_tokens=5, min_new_tokens=5)
    assert computed == [3, 3], "once in each of the two layers, one row for each of the three utterances"
    assert attended[:2] == [3, 3] and set(attended[2:]) == {12}


@torch.no_grad()
def test_rows_of_an_utterance_may_change_places_in_cross_attention():
    """As beams do; each row is what it is alone."""
    model, inputs = model_of("cross_attention"), inputs_of()
    audio = model.get_audio_features(**inputs)
    ids = torch.randint(3, 30, (6, 5), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    with model.listening(audio, model.merge_inputs(audio, None)):
        logits = model.language_model(input_ids=ids).logits
        permuted = model.language_model(input_ids=ids[order]).logits
    torch.testing.assert_close(permuted, logits[order], atol=1e-5, rtol=1e-5)
    for row in range(6):
        alone = model.get_audio_features(
            inputs["input_features"][row // 2 : row // 2 + 1], inputs["input_features_mask"][row // 2 : row // 2 + 1]
        )
        with model.listening(alone, model.merge_inputs(alone, None)):
            expected = model.language_model(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("interface", INTERFACES[1:])
def test_modes_that_combine_use_the_plain_language_model(interface):
    model, inputs = model_of(interface), dict(tiny_processor()(noise(0.3)))
    options = {
        "mode": "label_fusion",
        "lm_weight": 0.5,
        "ctc_beam_size": 4,
        "tokenizer": tiny_tokenizer(),
        "return_dict_in_generate": True,
    }
    output = model.generate(**inputs, **options)
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    plain.load_state_dict(model.language_model.state_dict())
    expected = model.generate(**inputs, **options, lm=CausalLMScorer(plain, tiny_tokenizer()))
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_prompt_of_the_call_takes_the_place_of_that_of_the_config(interface):
    model = model_of(interface, prompt_before_ids=[], prompt_after_ids=[])
    other = model_of(interface, prompt_before_ids=[1], prompt_after_ids=[2, 1])
    request = tiny_processor().apply_transcription_request(noise(*DURATIONS_S))
    expected = other.generate(**inputs_of())
    assert torch.equal(model.generate(**request)[:, request["input_ids"].shape[1] :], expected)


def test_without_prompt_cross_attention_starts_with_the_token_that_texts_start_with():
    inputs = inputs_of()
    empty = model_of("cross_attention", prompt_before_ids=[], prompt_after_ids=[])
    started = model_of("cross_attention", prompt_before_ids=[1], prompt_after_ids=[])
    assert torch.equal(empty.generate(**inputs), started.generate(**inputs))
    empty.config.text_config.bos_token_id = None
    empty.config.text_config.eos_token_id = [EOS]
    started = model_of("cross_attention", prompt_before_ids=[EOS], prompt_after_ids=[])
    assert torch.equal(empty.generate(**inputs), started.generate(**inputs))


# Training.


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("interface", INTERFACES[1:])
@pytest.mark.parametrize("text", ["gpt2", "qwen3"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(interface, text, use_reentrant):
    model = model_of(interface, text).train()
    batch = inputs_of(TEXTS)
    expected = gradients(model, model(**batch).loss)
    calls = []
    if model.cross_attention is not None:
        model.cross_attention.layers[0].query.register_forward_hook(lambda *_: calls.append(1))
        assert all(expected[f"cross_attention.{name}"].any() for name, _ in model.cross_attention.named_parameters())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = model(**batch).loss, model(**batch).loss  # two forward passes before the backward ones
    got = gradients(model, sum(losses) / 2)
    assert len(calls) == (4 if model.cross_attention is not None else 0), "computed again in the backward pass"
    assert set(got) == set(expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_loss_of_a_batch_is_that_of_one_by_one(interface):
    model, processor, clips = model_of(interface), tiny_processor(), noise(*DURATIONS_S)
    together = model(**processor(clips, text=TEXTS))
    ce_sum = sum(
        model(**batch).ce_loss.item() * int((batch["labels"] != -100).sum())
        for batch in (processor(clip, text=[text]) for clip, text in zip(clips, TEXTS, strict=True))
    )
    tokens = int((processor(clips, text=TEXTS)["labels"] != -100).sum())
    assert together.ce_loss.item() == pytest.approx(ce_sum / tokens, rel=1e-4)


def test_bfloat16_decodes_and_learns():
    model = model_of("cross_attention").to(torch.bfloat16)
    assert torch.isfinite(gradients(model, model(**inputs_of(TEXTS)).loss)["cross_attention.layers.0.attention_gate"])
    assert model.generate(**inputs_of(), num_beams=2, ctc_weight=0.3).shape[0] == 3


def trainable(model) -> set[str]:
    return {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_tuning_says_whether_the_cross_attention_learns():
    model = tiny_model(interface="cross_attention")
    set_trainable(model, TuningArguments())
    assert trainable(model) == {"cross_attention", "multi_modal_projector", "ctc_head"}
    set_trainable(model, TuningArguments(cross_attention="freeze"))
    assert trainable(model) == {"multi_modal_projector", "ctc_head"}
    set_trainable(model, TuningArguments(ce_loss_weight=0.0))
    assert trainable(model) == {"ctc_head"}
    with pytest.raises(ValueError, match=r"tuning\.cross_attention must be one of \('freeze', 'full'\), got 'lora'"):
        set_trainable(model, TuningArguments(cross_attention="lora"))


# Saving.


@torch.no_grad()
@pytest.mark.parametrize("interface", INTERFACES[1:])
@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_computes_the_same(interface, lora, tmp_path):
    model, inputs = model_of(interface, cross_attention_interval=2), inputs_of(TEXTS)
    plain = model(**inputs).logits
    if lora:
        targets = r"language_model\..*\.(q_proj|v_proj)"
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        assert not torch.allclose(model(**inputs).logits, plain)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "adapter_config.json").exists() == lora
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.interface == interface and again.config.cross_attention_interval == 2
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)
    with again.plain_language_model():
        torch.testing.assert_close(again(**inputs).logits, plain, atol=0, rtol=0)


def test_fresh_gates_are_closed_also_where_a_checkpoint_lacks_them(tmp_path):
    prefix = loud_model()
    prefix.save_pretrained(tmp_path)
    model = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, interface="cross_attention")
    for layer in model.cross_attention.layers:
        assert float(layer.attention_gate) == float(layer.feed_forward_gate) == 0.0
        assert layer.query.weight.std() > 0


REMOTE_SCRIPT = """
import json, sys
import numpy as np
sys.modules["hf_speechllm"] = None  # importing it raises
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
clip = (0.3 * np.sin(np.arange(24_000) * 0.2)).astype(np.float32)
tokens = []
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(clip, sampling_rate=16_000)
    tokens.append(model.generate(**inputs, num_beams=2, ctc_weight=0.3).tolist())
print("RESULT " + json.dumps(tokens))
"""


@pytest.mark.slow  # another process imports everything again
def test_remote_code_has_the_interfaces(tmp_path):
    expected, folders = [], []
    clip = (0.3 * torch.sin(torch.arange(24_000, dtype=torch.float64) * 0.2)).float().numpy()
    for interface in INTERFACES[1:]:
        model = model_of(interface)
        expected.append(model.generate(**tiny_processor()(clip), num_beams=2, ctc_weight=0.3).tolist())
        folders.append(str(tmp_path / interface))
        model.save_pretrained(folders[-1])
        tiny_processor().save_pretrained(folders[-1])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.rpartition("RESULT ")[2]) == expected


# What is refused.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interface": "suffix"}, "interface must be one of .*'prefix', 'bidirectional_prefix', 'cross_attention'"),
        ({"interface": "cross_attention", "cross_attention_interval": 3}, "cross_attention_interval must be 1 to 2"),
        ({"interface": "cross_attention", "cross_attention_interval": 0}, "cross_attention_interval must be 1 to 2"),
        ({"cross_attention_intermediate_size": 0}, "cross_attention_intermediate_size must be a positive width"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)


def test_cross_attention_without_prompt_needs_a_token_to_start_with():
    model = model_of("cross_attention", prompt_before_ids=[], prompt_after_ids=[])
    model.config.text_config.bos_token_id = model.config.text_config.eos_token_id = None
    with pytest.raises(ValueError, match="needs a token to start with"):
        model.generate(**inputs_of())


def test_cross_attention_needs_a_list_of_layers():
    model = tiny_model()
    model.language_model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="a list of num_hidden_layers = 7 layers, and a LlamaForCausalLM has none"):
        decoder_layers(model.language_model)


def test_cross_attention_needs_layers_of_one_stream(monkeypatch):
    streams = {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 4, "activation_sparsity_pattern": [0.0] * 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "layer_types": ["full_attention"] * 2}
    layers = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_kv_shared_layers": 0}
    monkeypatch.setitem(TEXT_CONFIGS, "gemma3n", {**streams, **heads, **layers})
    with pytest.raises(ValueError, match=r"a Gemma3nTextDecoderLayer takes \[4, 3, .*; choose interface='prefix'"):
        model_of("cross_attention", "gemma3n").generate(**inputs_of())
    assert len(model_of("prefix", "gemma3n").generate(**inputs_of(), max_new_tokens=2)) == 3


@pytest.mark.parametrize("text", ["bloom", "falcon"])
def test_a_bidirectional_prefix_is_not_for_alibi(text, monkeypatch):
    config = {"model_type": text, "hidden_size": 24, "num_attention_heads": 2, "alibi": True}
    monkeypatch.setitem(TEXT_CONFIGS, text, {**config, "n_layer": 1, "num_hidden_layers": 1})
    with pytest.raises(ValueError, match="with ALiBi, .*; choose interface='prefix'"):
        model_of("bidirectional_prefix", text).generate(**inputs_of())


def test_a_bidirectional_prefix_is_not_read_in_pieces():
    with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        model = model_of("bidirectional_prefix")
        audio = model.get_audio_features(**inputs_of())
        prefix = model.merge_inputs(audio, None)
        with model.listening(audio, prefix):
            model.language_model(inputs_embeds=prefix.inputs_embeds[:, :3])


def test_a_bidirectional_prefix_needs_attention_that_takes_masks(monkeypatch):
    model = model_of("bidirectional_prefix")
    monkeypatch.setattr(model.language_model.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'; load it with attn_implementation="):
        model.generate(**inputs_of())


@pytest.mark.parametrize("interface", INTERFACES[1:])
def test_the_language_model_that_hears_is_not_combined_with_itself(interface):
    model = model_of(interface)
    with pytest.raises(ValueError, match=f"lm: with interface='{interface}'.*load it a second time"):
        model.generate(**inputs_of(), lm=CausalLMScorer(model.language_model, tiny_tokenizer()), lm_weight=0.5)

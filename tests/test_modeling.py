"""SpeechLLMForConditionalGeneration: embeddings, losses and gradients against oracles; every encoder x every LLM."""

import copy
import importlib

import pytest
import torch
from tiny_models import (
    AUDIO_CONFIGS,
    TEXT_CONFIGS,
    ctc_token_ids,
    loud_model,
    noise,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from torch import nn

from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.audio_encoders import encode_audio, encoder_layers
from hf_speechllm.label_chains import LabelChains

DURATIONS_S = (0.9, 0.35, 0.6)
TEXTS = ("the ant", "", "singing in the an")


@pytest.fixture
def model() -> SpeechLLMForConditionalGeneration:
    return loud_model()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return dict(tiny_processor()(noise(*DURATIONS_S), text=list(TEXTS)))


def rows_of(batch: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def oracle_logits(model, audio_embeds: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The language model alone, on one utterance: prompt, audio and tokens put together by hand; `[1 + tokens, V]`."""
    embed, config = model.language_model.get_input_embeddings(), model.config
    parts = [embed(torch.tensor(config.prompt_before_ids)), audio_embeds, embed(torch.tensor(config.prompt_after_ids))]
    parts.append(embed(torch.tensor(tokens, dtype=torch.long)))
    logits = model.language_model(inputs_embeds=torch.cat(parts)[None]).logits[0]
    return logits[-len(tokens) - 1 :]


@pytest.mark.parametrize("text", ["llama", "gpt2", "gemma"])
@torch.no_grad()
def test_cross_entropy_is_that_of_the_language_model_on_the_embeddings_in_a_row(batch, text):
    model = loud_model(text=text)
    output = model(**batch)
    total, count = 0.0, 0
    for row in range(3):
        audio = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
        labels = [i for i in batch["labels"][row].tolist() if i != -100]
        logits = oracle_logits(model, audio.audio_embeds[row, : audio.audio_embeds_lens[row]], labels)[:-1]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum"))
        count += len(labels)
        torch.testing.assert_close(output.logits[row, -len(labels) :], logits, atol=1e-4, rtol=1e-4)
    assert abs(float(output.ce_loss) - total / count) < 1e-5
    assert count == (batch["labels"] != -100).sum()


def test_logits_are_left_padded_as_the_labels_of_the_batch_are_long(model, batch):
    assert model(**batch).logits.shape == (3, batch["labels"].shape[1], model.config.text_config.vocab_size)


@torch.no_grad()
def test_ctc_loss_is_that_of_torch_per_token(model, batch):
    output = model(**batch)
    label_of = {token: label for label, token in enumerate(model.config.ctc_token_ids)}
    total = 0.0
    for row in range(3):
        targets = [label_of[i] for i in batch["labels"][row].tolist() if i not in (-100, 2)]
        log_probs = output.audio.ctc_log_probs[row, : output.audio.encoder_out_lens[row], None]
        length = torch.tensor([log_probs.shape[0]])
        loss = nn.functional.ctc_loss(
            log_probs,
            torch.tensor([targets], dtype=torch.long),
            length,
            torch.tensor([len(targets)]),
            blank=model.config.ctc_vocab_size,
            reduction="sum",
        )
        assert loss.isfinite()
        total += float(loss)
    assert abs(float(output.ctc_loss) - total / int((batch["labels"] != -100).sum())) < 1e-5


def test_loss_is_the_weighted_sum_of_the_two(batch):
    output = loud_model(ctc_loss_weight=0.3, ce_loss_weight=0.6)(**batch)
    torch.testing.assert_close(output.loss, 0.6 * output.ce_loss + 0.3 * output.ctc_loss)


def test_a_weight_of_zero_skips_the_ctc_loss(batch):
    output = loud_model(ctc_loss_weight=0.0)(**batch)
    assert output.ctc_loss is None and torch.equal(output.loss, output.ce_loss)


def test_a_weight_of_zero_skips_the_language_model(batch, monkeypatch):
    model = loud_model(ce_loss_weight=0.0)
    monkeypatch.setattr(model.language_model, "forward", lambda *_, **__: pytest.fail("it was run"))
    output = model(**batch)
    assert output.ce_loss is None and output.logits is None
    torch.testing.assert_close(output.loss, 0.5 * output.ctc_loss)


def test_a_model_without_ctc_head_has_the_cross_entropy_alone(batch):
    model = tiny_model(ctc_token_ids=None)
    output = model(**batch)
    assert model.ctc_head is None and output.ctc_loss is None and output.audio.ctc_log_probs is None
    assert torch.equal(output.loss, output.ce_loss)


def test_ctc_targets_replace_those_of_the_labels(model, batch):
    expected = model(**batch).ctc_loss
    targets = model.ctc_targets(batch["labels"])
    torch.testing.assert_close(model(**batch, ctc_targets=targets).ctc_loss, expected)
    assert model(**batch, ctc_targets=targets.flip(0)).ctc_loss != expected


def test_ctc_labels_of_their_own_take_their_targets(batch):
    model = loud_model(ctc_token_ids=None, ctc_labels=["a", "b"])
    with pytest.raises(
        ValueError, match="ctc_targets is required: this model's CTC labels are not related to its tokens"
    ):
        model(**batch)
    output = model(**batch, ctc_targets=torch.tensor([[0, 1], [1, -100], [-100, -100]]))
    assert output.audio.ctc_log_probs.shape[-1] == 3 and output.ctc_loss.isfinite()


def test_a_transcript_longer_than_its_audio_does_not_spoil_the_ctc_loss(model, batch):
    labels = torch.full((3, 60), 5)
    output = model(**{**batch, "labels": labels})
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())


@pytest.mark.parametrize("eos", [2, [2, 4]])
def test_every_end_of_sequence_token_is_left_out_of_the_ctc_targets(eos):
    model = tiny_model(ctc_token_ids=[3, 7, 5])
    model.generation_config.eos_token_id = eos
    targets = model.ctc_targets(torch.tensor([[7, 3, 2], [5, 2, -100]]))
    assert targets.tolist() == [[1, 0, -100], [2, -100, -100]]


def test_a_token_that_is_no_ctc_label_is_an_error(model, batch):
    with pytest.raises(
        ValueError, match="labels: token 1 is no CTC label and not spelled by them; encode the transcripts with"
    ):
        model(**{**batch, "labels": torch.tensor([[5, 1, 2]] * 3)})


def chains_table():
    """Three labels; token 3 is spelled by two of them, token 4 by one, token 5 is silent, all others unspellable."""
    table = torch.full((64, 2), -2, dtype=torch.int32)
    table[3:6] = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    return table


def chains_model(chains=None, **overrides):
    chains = LabelChains(3, 4, chains_table(), **overrides) if chains is None else chains
    source = loud_model(ctc_token_ids=None, ctc_labels=["a", "b", "c"])
    return SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        source.audio_tower, source.language_model, label_chains=chains, ctc_labels=["a", "b", "c"], audio_token_id=63
    )


def test_ctc_targets_of_chains_are_the_labels_of_all_tokens_in_order(batch):
    model = chains_model()
    model.generation_config.eos_token_id = 2
    targets = model.ctc_targets(torch.tensor([[3, 5, 4, 2], [4, 2, -100, -100]]))
    assert [row[row >= 0].tolist() for row in targets] == [[0, 1, 2], [2]]
    loss = model(**{**batch, "labels": torch.tensor([[3, 5, 4, 2], [4, 3, 2, -100], [4, 2, -100, -100]])}).ctc_loss
    audio = model.encode(batch["input_features"], batch["input_features_mask"])
    expected = torch.nn.functional.ctc_loss(
        audio.ctc_log_probs.transpose(0, 1),
        torch.tensor([[0, 1, 2], [2, 0, 1], [2, 0, 0]]),
        audio.encoder_out_lens,
        torch.tensor([3, 3, 1]),
        blank=3,
        reduction="sum",
    )
    torch.testing.assert_close(loss * 9, expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="labels: token 6 is no CTC label and not spelled by them"):
        model.ctc_targets(torch.tensor([[3, 6, 2]]))


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        (LabelChains(3, 5, chains_table()), "expected 4 labels with the blank at 3 like the CTC head, got 5 with"),
        (LabelChains(4, 5, chains_table()), "got 5 with the blank at 4"),
        (
            LabelChains(3, 4, chains_table(), word_chains=chains_table(), ends_word=torch.zeros(64, dtype=torch.bool)),
            "a speech LLM keeps no word_chains",
        ),
    ],
)
def test_chains_that_the_model_cannot_keep_are_refused(chains, message):
    with pytest.raises(ValueError, match=f"label_chains: .*{message}"):
        chains_model(chains)


def test_the_first_word_has_no_delimiter_in_its_ctc_targets():
    model = chains_model(delimiter=0)
    targets = model.ctc_targets(torch.tensor([[-100, 3, 3, 4]]))
    assert targets[targets >= 0].tolist() == [1, 0, 1, 2]


def test_chains_are_part_of_the_checkpoint(tmp_path):
    model = chains_model(delimiter=0)
    model.save_pretrained(tmp_path)
    reloaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(reloaded.label_units.chains, model.label_units.chains)
    assert reloaded.label_units.delimiter == 0


@pytest.mark.parametrize("make", [chains_model, loud_model])
def test_label_units_are_made_once_and_again_when_what_they_are_made_of_changes(make):
    model = make()
    units = model.label_units
    assert model.label_units is units
    assert units.to(torch.device("cpu")) is units
    if make is chains_model:
        model.ctc_chains[3, 0] = 2
        changed = model.label_units
        assert changed is not units  # of which `first_labels` may be out of date
        assert int(changed.spell(torch.tensor([3]))[0, 0]) == 2
        assert model.label_units is changed
        same_version = model.ctc_chains.clone()
        while same_version._version < model.ctc_chains._version:
            same_version.add_(0)
        model.ctc_chains = same_version
        assert model.label_units is not changed
        model.config.ctc_delimiter = 1
        assert model.label_units.delimiter == 1
    else:
        first, second = model.config.ctc_token_ids[:2]
        model.config.ctc_token_ids[:2] = [second, first]
        assert model.label_units.tokens_to_labels(torch.tensor([second, first])).tolist() == [0, 1]
    other = copy.deepcopy(model)
    assert other.label_units is not model.label_units


def test_a_model_without_relation_between_labels_and_tokens_has_no_label_units():
    with pytest.raises(ValueError, match="no CTC head whose labels are related to the tokens"):
        _ = loud_model(ctc_token_ids=None, ctc_labels=["a", "b"]).label_units


def test_audio_is_required(model):
    with pytest.raises(ValueError, match="input_features is required: pass the output of the processor"):
        model(input_ids=torch.tensor([[1]]))


def test_two_half_batches_add_up_to_the_batch(model, batch):
    """Gradient accumulation, as the Trainer does it."""
    whole = model(**batch)
    items = (batch["labels"] != -100).sum()
    halves = [model(**rows_of(batch, rows), num_items_in_batch=items) for rows in ([0], [1, 2])]
    for name in ("loss", "ce_loss", "ctc_loss"):
        torch.testing.assert_close(sum(half[name] for half in halves), whole[name], atol=1e-6, rtol=1e-5)
    expected = gradients(model, model(**batch).loss)
    got = gradients(model, sum(model(**rows_of(batch, rows), num_items_in_batch=items).loss for rows in ([0], [1, 2])))
    assert set(got) == set(expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
@pytest.mark.parametrize("projector", ["stack", "conv", "ctc_posterior"])
def test_an_utterance_has_the_same_logits_alone_and_in_a_batch(audio, projector):
    model = loud_model(audio, projector=projector, ctc_blank_threshold=0.5 if projector == "conv" else None)
    batch = dict(tiny_processor(audio)(noise(*DURATIONS_S), text=list(TEXTS)))
    with torch.no_grad():
        together = model(**batch)
        for row in range(3):
            alone = model(**rows_of(batch, [row]))
            tokens = int((batch["labels"][row] != -100).sum())
            assert together.audio.audio_embeds_lens[row] == alone.audio.audio_embeds_lens[0]
            torch.testing.assert_close(
                together.logits[row, -tokens:].log_softmax(-1), alone.logits[0].log_softmax(-1), atol=1e-4, rtol=1e-4
            )


def test_more_padding_of_the_labels_changes_nothing(model, batch):
    wider = {**batch, "labels": nn.functional.pad(batch["labels"], (0, 5), value=-100)}
    expected, got = model(**batch), model(**wider)
    torch.testing.assert_close(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)


def test_padding_within_the_labels_is_passed_over(model, batch):
    labels = batch["labels"][:1, :3]
    spread = torch.tensor([[labels[0, 0], -100, labels[0, 1], labels[0, 2]]])
    one = rows_of(batch, [0])
    torch.testing.assert_close(model(**{**one, "labels": spread}).loss, model(**{**one, "labels": labels}).loss)


@pytest.mark.parametrize("with_labels", [False, True])
def test_a_given_prompt_equal_to_that_of_the_config_changes_nothing(model, with_labels):
    processor, clips = tiny_processor(), noise(*DURATIONS_S)
    request = processor.apply_transcription_request(clips)
    labels = {"labels": processor(text=list(TEXTS))["labels"]} if with_labels else {}
    expected, got = model(**processor(clips), **labels), model(**request, **labels)
    assert torch.equal(got.logits, expected.logits)


def test_another_prompt_changes_the_logits_and_its_padding_does_not(model):
    processor, clips = tiny_processor(), noise(*DURATIONS_S)
    prompts = ["an ant", "", "the"]
    labels = processor(text=list(TEXTS))["labels"]
    request = processor.apply_transcription_request(clips, prompt=prompts)
    together = model(**request, labels=labels)
    for row, prompt in enumerate(prompts):
        one = processor.apply_transcription_request([clips[row]], prompt=prompt)
        tokens = int((labels[row] != -100).sum())
        alone = model(**one, labels=labels[row : row + 1, :tokens])
        torch.testing.assert_close(together.logits[row, -tokens:], alone.logits[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.logits[0], model(**processor(clips), labels=labels).logits[0], atol=1e-3)


@pytest.mark.parametrize("ids", [[[1, 2]], [[1, 48, 48]], [[1, 48], [1, 48]]])
def test_a_prompt_without_exactly_one_placeholder_for_each_audio_is_an_error(model, ids):
    audio_token_id = model.config.audio_token_id
    input_ids = torch.tensor(ids).masked_fill(torch.tensor(ids) == 48, audio_token_id)
    message = rf"one row per utterance \(1\) and one audio placeholder \(token {audio_token_id}\) in each; got"
    with pytest.raises(ValueError, match=message):
        model(**tiny_processor()(noise(0.3)), input_ids=input_ids)


def test_without_labels_the_logits_are_those_of_all_positions(model):
    output = model(**tiny_processor()(noise(0.6)))
    positions = 1 + int(output.audio.audio_embeds_lens) + 2
    assert output.logits.shape[:2] == (1, positions) and output.loss is None
    assert output.past_key_values.get_seq_length() == positions
    audio_embeds = output.audio.audio_embeds[0]
    torch.testing.assert_close(output.logits[0, -1:], oracle_logits(model, audio_embeds, []), atol=1e-5, rtol=1e-5)


def test_a_tuple_is_returned_on_demand(model, batch):
    output = model(**batch)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)


def test_positions_of_audio_are_the_frames_over_the_downsampling():
    for downsampling, expected in ((1, 13), (4, 4), (8, 2)):
        model = tiny_model(downsampling=downsampling)
        audio = model.get_audio_features(**tiny_processor()(noise(0.35)))
        assert audio.encoder_out_lens.tolist() == [13] and audio.audio_embeds_lens.tolist() == [expected]
        assert audio.audio_embeds.shape == (1, expected, 24)


def test_blank_positions_are_dropped_above_the_threshold(batch):
    model = tiny_model(ctc_blank_threshold=0.9)
    features = {name: batch[name] for name in ("input_features", "input_features_mask")}
    kept = model.get_audio_features(**features).audio_embeds_lens
    with torch.no_grad():
        model.ctc_head.linear.bias[-1] = 100.0
    assert model.get_audio_features(**features).audio_embeds_lens.tolist() == [1, 1, 1]
    assert kept.tolist() == [9, 4, 6], "an untrained CTC head is never that sure"


def test_the_ctc_posterior_projector_starts_as_expected_embedding(batch):
    model = tiny_model(projector="ctc_posterior", downsampling=1)
    audio = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    table = model.get_input_embeddings().weight[ctc_token_ids()]
    expected = audio.ctc_log_probs[0, :, :-1].exp() @ table
    torch.testing.assert_close(audio.audio_embeds[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layers", [[-1], [0], [-2], [0, 2], [0, 1, -1]])
def test_the_ctc_head_reads_the_chosen_layers(layers, batch):
    model = loud_model(ctc_layers=layers)
    if len(layers) > 1:
        nn.init.normal_(model.ctc_head.layer_weights)
    encoding = encode_audio(model.audio_tower, batch["input_features"], batch["input_features_mask"], (0, 1, 2))
    x = torch.stack([encoding.layers[layer % 3] for layer in layers])
    weights = model.ctc_head.layer_weights.softmax(0) if len(layers) > 1 else torch.ones(1)
    x = (x * weights[:, None, None, None]).sum(0)
    x = x if layers == [-1] else nn.functional.layer_norm(x, (16,))
    expected = model.ctc_head.linear(x).log_softmax(-1)
    got = model.encode(batch["input_features"], batch["input_features_mask"])
    torch.testing.assert_close(got.ctc_log_probs, expected, atol=1e-5, rtol=1e-5)
    if layers != [-1]:
        model(**batch).ctc_loss.backward()
        assert all(parameter.grad is not None for parameter in model.ctc_head.parameters())


@pytest.mark.parametrize("layer", [3, -4])
def test_a_ctc_layer_that_does_not_exist_is_an_error(layer):
    with pytest.raises(ValueError, match=f"ctc_layers: layer {layer} does not exist in an encoder of 3 layers"):
        tiny_model(ctc_layers=[-1, layer])
    tiny_model(ctc_layers=[layer], ctc_token_ids=None)  # nothing reads it


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_every_pair_of_encoder_and_language_model_trains_and_generates(audio, text):
    model = tiny_model(audio, text)
    inputs = tiny_processor(audio)(noise(0.3, 0.5))
    output = model(**inputs, labels=torch.tensor([[5, 6, 2], [7, 2, -100]]))
    output.loss.backward()
    assert output.loss.isfinite()
    for part in (model.multi_modal_projector, model.ctc_head, model.get_decoder(), encoder_layers(model.audio_tower)):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
    sequences = model.generate(**inputs, ctc_weight=0.3, num_beams=2, max_new_tokens=2)
    assert sequences.shape[0] == 2 and 1 <= sequences.shape[1] <= 2


@pytest.mark.parametrize(
    ("audio", "text"), [("moonshine", "llama"), ("whisper", "gpt2"), ("wav2vec2", "qwen3"), ("parakeet", "gemma")]
)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(audio, text, use_reentrant):
    layers_of = {"gpt2": "h", "llama": "layers", "qwen3": "layers", "gemma": "layers"}
    model = loud_model(audio, text, ctc_layers=[0, -1])
    model.audio_tower.config.layerdrop = model.audio_tower.layerdrop = 0.0
    model.train()
    batch = dict(tiny_processor(audio)(noise(0.4, 0.6), text=["the ant", "in"]))
    expected = gradients(model, model(**batch).loss)
    calls = []
    for layers in (encoder_layers(model.audio_tower), model.get_decoder().get_submodule(layers_of[text])):
        linear = next(module for module in layers.modules() if not list(module.children()))
        linear.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = gradients(model, model(**batch).loss)
    assert len(calls) == 4, "a layer of either model is computed again in the backward pass"
    assert set(got) == set(expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


def test_the_config_of_the_tiny_models_is_not_touched_by_building_a_model():
    config = tiny_config()
    before = copy.deepcopy(config.to_dict())
    SpeechLLMForConditionalGeneration(config)
    assert config.to_dict() == before


def data_parallel_replica(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> nn.Module:
    """What `torch.nn.DataParallel` makes of `model` for each device: its weights are attributes, not parameters."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)  # not that of a GPU
    copies = lambda tensors, *_, **__: [[tensor.clone() for tensor in tensors]]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return module.replicate(model, ["cpu"])[0]


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
@pytest.mark.parametrize("interface", ["prefix", "cross_attention"])
def test_a_replica_of_data_parallel_computes_the_same(monkeypatch, audio, interface):
    model = loud_model(audio, interface=interface, ctc_layers=[0, -1])
    batch = dict(tiny_processor(audio)(noise(*DURATIONS_S), text=list(TEXTS)))
    replica = data_parallel_replica(monkeypatch, model)
    assert next(replica.parameters(), None) is None
    expected, got = model(**batch), replica(**batch)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)
    expected_gradients = gradients(model, expected.loss)
    for name, gradient in gradients(model, got.loss).items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize("with_labels", [False, True])
def test_hidden_states_and_attentions_are_those_of_the_language_model(batch, with_labels):
    model = loud_model()
    model.set_attn_implementation("eager")
    if not with_labels:
        del batch["labels"]
    plain = model(**batch)
    assert plain.hidden_states is None
    assert plain.attentions is None
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    audio = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    inputs = model.merge_inputs(audio, None)
    num_layers = model.config.text_config.num_hidden_layers
    num_labels = (batch["labels"] != -100).sum(1) if with_labels else 0
    length = int((inputs.mask.sum(1) + num_labels).max())
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, length, 24)] * (num_layers + 1)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, length, length)] * num_layers
    last = model.get_output_embeddings()(output.hidden_states[-1])
    expected = last[:, -batch["labels"].shape[1] - 1 : -1] if with_labels else last
    torch.testing.assert_close(output.logits, expected)
    as_tuple = model(**batch, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output[0])
    assert len(as_tuple) == len(output) - 1  # without attentions

"""Speech LLM: any acoustic encoder of transformers, a projector, any causal language model, and a CTC head.

Shapes: B utterances, S input steps, T encoder frames, D encoder width, L audio positions of the language model,
P positions of the whole input of the language model, H its width, V its vocabulary, U CTC labels.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.utils import ADAPTER_CONFIG_NAME, can_return_tuple

from .adapters import (
    ADAPTER_FILE_NAMES,
    adapter_unnoticed,
    adapters_disabled,
    has_adapters,
    plain_state_dict,
    remove_adapter,
    save_adapter,
    set_base_model,
)
from .audio_encoders import (
    build_audio_tower,
    encode_audio,
    encoder_layers,
    extract_audio_tower,
    first_weight,
    layer_index,
    lens_to_mask,
)
from .configuration_speechllm import SpeechLLMConfig
from .cross_attention import GatedCrossAttentionLayer, SpeechCrossAttention
from .ctc_loss import linear_ctc_loss
from .decoder_inputs import DecoderInputs, append_labels, bidirectional_audio, place_audio
from .generation_speechllm import SpeechLLMGenerationMixin
from .label_chains import UNSPELLABLE, LabelChains, spell_transcripts
from .label_units import LabelUnits
from .model_outputs import SpeechLLMAudioOutput, SpeechLLMOutput
from .processing_speechllm import AUDIO_TOKEN
from .projectors import PROJECTOR_CLASSES, CTCHead, CTCPosteriorProjector, drop_blank_positions

if TYPE_CHECKING:
    # transformers saves the modules that this one imports with the model; `config.custom_pipelines` needs this one too.
    from .pipeline_speechllm import SpeechLLMPipeline  # noqa: F401

IGNORE_INDEX = -100


class SpeechLLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of speech LLMs: their features and how their weights are initialised."""

    config_class = SpeechLLMConfig
    base_model_prefix = ""
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CTCPosteriorProjector):
            init.zeros_(module.blank_embedding)
            init.zeros_(module.linear_2.weight)  # the correction starts at zero
        elif isinstance(module, GatedCrossAttentionLayer):
            init.zeros_(module.attention_gate)
            init.zeros_(module.feed_forward_gate)
        elif isinstance(module, CTCHead):
            init.zeros_(module.log_prior)
            if module.layer_weights is not None:
                init.zeros_(module.layer_weights)
        elif isinstance(module, SpeechLLMForConditionalGeneration) and self.config.ctc_chain_length is not None:
            init.constant_(module.ctc_chains, UNSPELLABLE)


class SpeechLLMForConditionalGeneration(SpeechLLMPreTrainedModel, SpeechLLMGenerationMixin):
    r"""
    A causal language model that hears: `prompt before | audio embeddings | prompt after | transcript`, or
    `prompt before | prompt after | transcript` with cross-attention to the audio embeddings.

    Args:
        config (`SpeechLLMConfig`): Configuration.
        audio_tower (`PreTrainedModel`, *optional*): An acoustic encoder to use in place of a fresh one.
        language_model (`PreTrainedModel`, *optional*): A causal language model to use in place of a fresh one.
    """

    # Tells the Trainer that the loss is averaged over `num_items_in_batch` here.
    accepts_loss_kwargs = True

    def __init__(
        self,
        config: SpeechLLMConfig,
        audio_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.audio_tower = build_audio_tower(config.audio_config) if audio_tower is None else audio_tower
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        # Decoding is configured by *our* generation_config; sampling defaults of a chat model do not belong in ASR.
        self.language_model.generation_config = GenerationConfig()
        self.multi_modal_projector = PROJECTOR_CLASSES[config.projector](config)
        self.ctc_head = CTCHead(config) if config.ctc_vocab_size is not None else None
        self.cross_attention = SpeechCrossAttention(config) if config.interface == "cross_attention" else None
        if config.ctc_chain_length is not None:
            # The table [V, M] of `LabelChains`: part of the checkpoint, not trained.
            shape = (config.text_config.vocab_size, config.ctc_chain_length)
            self.register_buffer("ctc_chains", torch.full(shape, UNSPELLABLE, dtype=torch.int32))
        self._num_audio_layers = len(encoder_layers(self.audio_tower))
        for layer in config.ctc_layers if self.ctc_head is not None else ():
            layer_index(layer, self._num_audio_layers)  # raises if there is no such layer
        self._label_units: tuple[tuple, LabelUnits | LabelChains] | None = None  # and what they were made of
        # What transformers takes for derived from the config loses our own entries, such as `ctc_weight`, in a reload.
        self.generation_config._from_model_config = False
        self.post_init()

    @classmethod
    def from_encoder_llm_pretrained(
        cls,
        audio_model: str | PreTrainedModel,
        language_model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label_chains: LabelChains | None = None,
        dtype: torch.dtype | str | None = None,
        **config_overrides: Any,
    ) -> "SpeechLLMForConditionalGeneration":
        """A speech LLM of two pre-trained models; projector and CTC head are fresh and need training.

        Args:
            audio_model: Acoustic encoder, or a model that has one: Hub id, folder, or model.
            language_model: Causal language model: Hub id, folder, or model.
            tokenizer: Tokeniser of the prompt texts and the audio placeholder; by default that of `language_model`, if
                it is an id or a folder.
            label_chains: The CTC labels that spell each token of the language model, if that writes in other units than
                the CTC head.
            dtype: Type of the weights; by default float32.
            config_overrides: Values of [`SpeechLLMConfig`], such as `projector=`, `downsampling=`, `ctc_token_ids=`.

        Raises:
            ValueError: If a prompt is given as text and there is no tokeniser to encode it, or `label_chains` are those
                of another CTC head.
        """
        dtype = torch.float32 if dtype is None else dtype
        source = language_model
        if isinstance(audio_model, str):
            audio_model = AutoModel.from_pretrained(audio_model, dtype=dtype)
        if isinstance(language_model, str):
            language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
        prompts = ("prompt_before", "prompt_after")
        texts = [name for name in prompts if config_overrides.get(name) and f"{name}_ids" not in config_overrides]
        if tokenizer is None and isinstance(source, str) and (texts or "audio_token_id" not in config_overrides):
            tokenizer = AutoTokenizer.from_pretrained(source)
        if texts and tokenizer is None:
            raise ValueError(
                f"tokenizer: {texts[0]} is a text and language_model a model without tokeniser; pass tokenizer=, "
                f"or the tokens as {texts[0]}_ids=."
            )
        for name in texts:
            config_overrides[f"{name}_ids"] = tokenizer(config_overrides[name], add_special_tokens=False).input_ids
        if tokenizer is not None:
            # The embeddings may be more than the tokens (Qwen): the processor's placeholder follows the tokens.
            config_overrides.setdefault("audio_token_id", tokenizer.get_vocab().get(AUDIO_TOKEN, len(tokenizer)))
        if label_chains is not None:
            config_overrides["ctc_chain_length"] = label_chains.chains.shape[1]
            config_overrides["ctc_delimiter"] = label_chains.delimiter
        audio_tower = extract_audio_tower(audio_model)
        text_config = language_model.config.get_text_config()
        # A composite config resets the attention implementation of its parts unless it is told.
        attention = {
            "audio_config": audio_tower.config._attn_implementation,
            "text_config": text_config._attn_implementation,
        }
        config = SpeechLLMConfig(
            audio_config=audio_tower.config, text_config=text_config, attn_implementation=attention, **config_overrides
        )
        if label_chains is not None:
            label_chains.check_head(config.ctc_vocab_size + 1, config.blank_id)
        generation_config = language_model.generation_config
        model = cls(config, audio_tower, language_model).to(next(language_model.parameters()).dtype)
        if label_chains is not None:
            # The tokeniser may have tokens without embedding (the audio placeholder), or the embeddings be more.
            rows = min(len(model.ctc_chains), len(label_chains.chains))
            model.ctc_chains[:rows] = label_chains.chains[:rows]
        model.generation_config = GenerationConfig(
            eos_token_id=generation_config.eos_token_id,
            bos_token_id=generation_config.bos_token_id,
            pad_token_id=generation_config.pad_token_id,
            max_new_tokens=256,
        )
        return model

    @contextmanager
    def plain_language_model(self) -> Iterator[None]:
        """Inside, `language_model` computes without its adapters (LoRA): `with model.plain_language_model(): ...`.

        That is the language model as it was before it learned to hear, if only the adapters were trained. Without
        adapters nothing changes.
        """
        with adapters_disabled(self.language_model):
            yield

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As of transformers, but a model with an adapter is saved whole: its weights, and the adapter beside them.

        Args:
            save_directory: Folder to write. An adapter in it that is not this model's is removed.
            is_main_process: Whether this process is the one that writes, in distributed training.
            state_dict: The weights to save; by default those of the model.
            args, kwargs: As for `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: If the adapter is merged into the weights, there are several active ones, it is more than LoRA
                on linear layers, or weights are offloaded.
        """
        if not has_adapters(self):
            if is_main_process:
                remove_adapter(save_directory)
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
            return
        state_dict = self.state_dict() if state_dict is None else state_dict
        plain = plain_state_dict(self, state_dict)
        if is_main_process:
            save_adapter(self, state_dict, save_directory)
        with adapter_unnoticed(self):
            super().save_pretrained(save_directory, is_main_process, plain, *args, **kwargs)

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: dict[str, float],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if Path(working_dir, ADAPTER_CONFIG_NAME).exists():
            # Of a model on the Hub, transformers reads the weights from where the adapter says.
            set_base_model(working_dir, repo_id)
            files_timestamps = {name: t for name, t in files_timestamps.items() if name not in ADAPTER_FILE_NAMES}
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As of transformers; of tokens that are new, CTC does not know how they are spelled.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: As for `PreTrainedModel.resize_token_embeddings`.

        Raises:
            ValueError: If a CTC label is one of the tokens that would be cut off.
        """
        last_label = max(self.config.ctc_token_ids or [-1])
        if new_num_tokens is not None and new_num_tokens <= last_label:
            raise ValueError(
                f"new_num_tokens: expected more than {last_label}, which is a CTC label (config.ctc_token_ids), got "
                f"{new_num_tokens}; keep the tokens up to it."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.ctc_chain_length is not None:
            num_missing = self.config.text_config.vocab_size - len(self.ctc_chains)  # negative ones cut rows off
            self.ctc_chains = nn.functional.pad(self.ctc_chains, (0, 0, 0, num_missing), value=UNSPELLABLE)
        return embeddings

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model.get_decoder()

    def get_encoder(self, modality: str | None = None) -> PreTrainedModel:
        return self.audio_tower

    @property
    def label_units(self) -> LabelUnits | LabelChains:
        """How CTC labels correspond to tokens of the language model; made anew when config or chains have changed.

        Raises:
            ValueError: If the model has no CTC head, or the config does not tell.
        """
        config = self.config
        if config.ctc_chain_length is not None:
            chains = self.ctc_chains
            # While the units hold the chains, no other tensor has their id; the version counts changes in place.
            version = None if chains.is_inference() else chains._version
            made_of = (config.blank_id, config.ctc_vocab_size, config.ctc_delimiter, id(chains), version)
        elif config.ctc_token_ids is not None:
            made_of = (config.blank_id, config.text_config.vocab_size, tuple(config.ctc_token_ids))
        else:
            raise ValueError(
                "This model has no CTC head whose labels are related to the tokens of its language model (set "
                "ctc_token_ids, or build it with label_chains)."
            )
        if self._label_units is None or self._label_units[0] != made_of:
            if config.ctc_chain_length is not None:
                units = LabelChains(config.blank_id, config.ctc_vocab_size + 1, chains, config.ctc_delimiter)
            else:
                token_ids = torch.tensor(config.ctc_token_ids)
                units = LabelUnits.from_token_ids(token_ids, config.text_config.vocab_size, config.blank_id)
            self._label_units = made_of, units
        return self._label_units[1]

    def encode(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        *,
        ctc_log_probs: bool = True,
    ) -> SpeechLLMAudioOutput:
        """Encoder and CTC head: all that combination with a language model by shallow fusion needs.

        Args:
            input_features: Output of the processor, waveforms `[B, S]` or frames `[B, S, F]`, `[B, F, S]`.
            input_features_mask: `[B, S]`, 1 on valid steps. `None`: no padding.
            ctc_log_probs: Whether CTC log-probabilities are wanted, or just what they are computed from.
        """
        weight = first_weight(self.audio_tower)
        layers = tuple(self.ctc_head.layers) if self.ctc_head is not None else ()
        encoding = encode_audio(
            self.audio_tower, input_features.to(weight.device, weight.dtype), input_features_mask, layers
        )
        audio = SpeechLLMAudioOutput(encoder_out=encoding.encoder_out, encoder_out_lens=encoding.encoder_out_lens)
        if self.ctc_head is not None:
            audio.ctc_features = self.ctc_head.features(encoding, self._num_audio_layers)
            audio.ctc_log_probs = self.ctc_head.log_probs(audio.ctc_features) if ctc_log_probs else None
        return audio

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        *,
        ctc_log_probs: bool = True,
    ) -> SpeechLLMAudioOutput:
        """As [`~SpeechLLMForConditionalGeneration.encode`], with the embeddings that the language model reads."""
        is_read = self.config.projector == "ctc_posterior" or self.config.ctc_blank_threshold is not None
        audio = self.encode(input_features, input_features_mask, ctc_log_probs=ctc_log_probs or is_read)
        frame_mask = lens_to_mask(audio.encoder_out_lens, audio.encoder_out.shape[1])
        frames = audio.encoder_out * frame_mask[..., None].to(audio.encoder_out.dtype)
        if self.config.projector == "ctc_posterior":
            label_ids = torch.tensor(self.config.ctc_token_ids, device=self.get_input_embeddings().weight.device)
            embeds = self.multi_modal_projector(
                frames, audio.ctc_log_probs, frame_mask, self.get_input_embeddings()(label_ids)
            )
        elif self.config.projector in ("conv", "pool"):
            embeds = self.multi_modal_projector(frames, frame_mask)
        else:
            embeds = self.multi_modal_projector(frames)
        downsampling = self.config.downsampling
        lens = torch.div(audio.encoder_out_lens + downsampling - 1, downsampling, rounding_mode="floor")
        if self.config.ctc_blank_threshold is not None:
            embeds, lens = drop_blank_positions(
                embeds, audio.ctc_log_probs, frame_mask, downsampling, self.config.ctc_blank_threshold
            )
        audio.audio_embeds, audio.audio_embeds_lens = embeds, lens
        return audio

    def merge_inputs(
        self, audio: SpeechLLMAudioOutput, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None
    ) -> DecoderInputs:
        """Input of the language model: text tokens, with the audio in place of its one placeholder.

        With cross-attention there is nothing in that place, except for the token that a text without prompt starts
        with.

        Args:
            audio: Output of [`~SpeechLLMForConditionalGeneration.get_audio_features`].
            input_ids: `[B, P']` with exactly one `config.audio_token_id` in each row. `None`: the prompt of the config.
            attention_mask: `[B, P']`, 0 on the padding of `input_ids`.

        Returns:
            Embeddings `[B, P, H]` and masks `[B, P]`, padded on the left.

        Raises:
            ValueError: If a row has no placeholder, or several; or no text, and there is no token to start with.
        """
        batch_size = audio.audio_embeds.shape[0]
        if input_ids is None:
            input_ids = self.prompt_ids.expand(batch_size, -1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        placeholder = (input_ids == self.config.audio_token_id) & attention_mask.bool()
        if input_ids.shape[0] != batch_size or not (placeholder.sum(1) == 1).all():
            counts = placeholder.sum(1).tolist()
            raise ValueError(
                f"input_ids must have one row per utterance ({batch_size}) and one audio placeholder (token "
                f"{self.config.audio_token_id}) in each; got {input_ids.shape[0]} rows with {counts} "
                "placeholders. Build them with processor.apply_transcription_request."
            )
        embed = self.get_input_embeddings()
        # The placeholder's id may lie beyond the vocabulary.
        embeds = embed(input_ids.masked_fill(placeholder, 0))
        if self.cross_attention is None:
            return place_audio(embeds, placeholder, attention_mask, audio.audio_embeds, audio.audio_embeds_lens)
        is_empty = attention_mask.sum(1) == 1
        start_id = self._start_token_id if is_empty.any() else 0
        start = embed(torch.full_like(input_ids[:, :1], start_id))
        return place_audio(embeds, placeholder, attention_mask, start, is_empty.long())

    @property
    def _start_token_id(self) -> int:
        """The token that a text without prompt starts with, as in transformers' `generate`."""
        text_config = self.config.get_text_config()
        for token_id in (text_config.bos_token_id, text_config.eos_token_id):
            if token_id is not None:
                return token_id[0] if isinstance(token_id, list) else token_id
        raise ValueError(
            "prompt_before, prompt_after: interface='cross_attention' without prompt needs a token to start with, and "
            "text_config has neither bos_token_id nor eos_token_id; set one, or give a prompt."
        )

    def listening(self, audio: SpeechLLMAudioOutput, inputs: DecoderInputs) -> AbstractContextManager[None]:
        """Inside, `language_model` hears by the interface of the config: `with model.listening(audio, inputs): ...`.

        Args:
            audio: Output of [`~SpeechLLMForConditionalGeneration.get_audio_features`].
            inputs: What the language model reads first; there may be several rows for each utterance, side by side.
        """
        if self.cross_attention is not None:
            return self.cross_attention.inserted(self.language_model, audio.audio_embeds, audio.audio_embeds_lens)
        if self.config.interface == "bidirectional_prefix":
            return bidirectional_audio(self.language_model, inputs)
        return nullcontext()  # the audio is read as text is

    @property
    def prompt_ids(self) -> torch.Tensor:
        """The prompt of the config around the audio placeholder, `[P']`."""
        config = self.config
        ids = [*config.prompt_before_ids, config.audio_token_id, *config.prompt_after_ids]
        return torch.tensor(ids, device=self.get_input_embeddings().weight.device)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        ctc_targets: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SpeechLLMOutput:
        r"""
        Args:
            input_features: Waveforms `[B, S]` or frames `[B, S, F]`, `[B, F, S]`, from the processor.
            input_features_mask: `[B, S]`, 1 on valid steps. `None`: no padding.
            input_ids: `[B, P']` prompt with one audio placeholder in each row. `None`: the prompt of the config.
            attention_mask: `[B, P']`, 0 on the padding of `input_ids`.
            labels: `[B, N]` tokens of the transcripts with the end-of-sequence token, padded with -100. They follow
                the prompt (teacher forcing); there is no need to put them into `input_ids`.
            ctc_targets: `[B, M]` CTC labels, padded with -100. By default the labels of the tokens in `labels`, where
                the config has `ctc_token_ids`.
            num_items_in_batch: Number of tokens that the losses are averaged over, given by the Trainer when the
                batch is one of several (gradient accumulation). By default that of `labels`.
            kwargs: Passed to the language model.

        Raises:
            ValueError: If there is no audio, or CTC targets cannot be derived from the labels.
        """
        if input_features is None:
            raise ValueError("input_features is required: pass the output of the processor for the audio.")
        only_ctc = labels is not None and self.config.ce_loss_weight == 0.0
        compute_audio = self.encode if only_ctc else self.get_audio_features
        is_step = self.training and labels is not None
        audio = compute_audio(input_features, input_features_mask, ctc_log_probs=not is_step)
        if labels is not None and num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORE_INDEX).sum()
        lm_output = SpeechLLMOutput()
        if not only_ctc:
            lm_output = self._run_language_model(audio, input_ids, attention_mask, labels, num_items_in_batch, kwargs)
        loss = ctc_loss = None
        if labels is not None and self.ctc_head is not None and self.config.ctc_loss_weight > 0.0:
            targets = ctc_targets if ctc_targets is not None else self.ctc_targets(labels)
            ctc_loss = self._ctc_loss(audio, targets) / num_items_in_batch
        if labels is not None:
            ce = 0.0 if only_ctc else self.config.ce_loss_weight * lm_output.ce_loss
            loss = ce + (0.0 if ctc_loss is None else self.config.ctc_loss_weight * ctc_loss)
        return SpeechLLMOutput(
            loss=loss,
            ce_loss=lm_output.ce_loss,
            ctc_loss=ctc_loss,
            logits=lm_output.logits,
            past_key_values=lm_output.past_key_values,
            hidden_states=lm_output.hidden_states,
            attentions=lm_output.attentions,
            audio=audio,
        )

    def _run_language_model(
        self,
        audio: SpeechLLMAudioOutput,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        kwargs: dict[str, Any],
    ) -> SpeechLLMOutput:
        """The language model on prompt, audio and labels: cross-entropy (with labels), logits, cache and so on."""
        inputs = self.merge_inputs(audio, input_ids, attention_mask)
        if labels is not None:
            labels = labels.to(inputs.mask.device)
            # Padding of the labels moves to the left too, so that the last N logits of a row predict its labels.
            inputs, labels = append_labels(inputs, labels, IGNORE_INDEX, self.get_input_embeddings())
            kwargs = {"logits_to_keep": labels.shape[1] + 1, "use_cache": False, **kwargs}
        position_ids = (inputs.mask.cumsum(1) - 1).clamp(min=0)
        with self.listening(audio, inputs):
            lm_output = self.language_model(
                inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.mask, position_ids=position_ids, **kwargs
            )
        output = SpeechLLMOutput(
            logits=lm_output.logits,
            past_key_values=lm_output.past_key_values,
            hidden_states=lm_output.get("hidden_states"),
            attentions=lm_output.get("attentions"),
        )
        if labels is None:
            return output
        output.logits = logits = lm_output.logits[:, -labels.shape[1] - 1 : -1]
        ce_sum = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        output.ce_loss = ce_sum / num_items_in_batch
        return output

    def ctc_targets(self, labels: torch.Tensor) -> torch.Tensor:
        """CTC labels `[B, N']` of the tokens `[B, N]` of the transcripts; end-of-sequence and padding become -100."""
        if self.config.ctc_token_ids is None and self.config.ctc_chain_length is None:
            raise ValueError("ctc_targets is required: this model's CTC labels are not related to its tokens.")
        eos = self.generation_config.eos_token_id
        special = labels.new_tensor(eos if isinstance(eos, list) else [-1 if eos is None else eos])
        tokens = labels.masked_fill(torch.isin(labels, special), IGNORE_INDEX)
        targets = spell_transcripts(self.label_units.to(labels.device), tokens)  # B, N -> B, N, M
        unknown = targets[..., 0] == UNSPELLABLE
        if unknown.any():
            raise ValueError(
                f"labels: token {int(labels[unknown][0])} is no CTC label and not spelled by them; encode the "
                "transcripts with the model's own tokenizer, numbers written as words."
            )
        return targets.flatten(1).masked_fill(targets.flatten(1) < 0, IGNORE_INDEX)

    def _ctc_loss(self, audio: SpeechLLMAudioOutput, targets: torch.Tensor) -> torch.Tensor:
        """Sum over the utterances, in nats. Transcripts that do not fit into their frames count zero."""
        output_layer = self.ctc_head.linear
        return linear_ctc_loss(
            audio.ctc_features,
            output_layer.weight,
            output_layer.bias,
            targets,
            audio.encoder_out_lens,
            blank_id=self.config.blank_id,
        )


SpeechLLMForConditionalGeneration.register_for_auto_class("AutoModelForSpeechSeq2Seq")

__all__ = [
    "SpeechLLMAudioOutput",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMOutput",
    "SpeechLLMPreTrainedModel",
]

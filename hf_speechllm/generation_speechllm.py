"""`generate` of a speech LLM: encode once, build the prompt, decode with the language model and the CTC head jointly.

Decoding options beyond those of transformers are the fields of [`DecodingOptions`]. They are saved in
`generation_config` and overridable per call; `None` leaves an option to the config.
"""

import copy
from dataclasses import fields
from numbers import Integral
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput

from .adapters import has_adapters, merge_adapters
from .audio_encoders import lens_to_mask
from .combination import COMBINATIONS, DecodingOptions, LabelsToTokens, check_given_options, pad_hypotheses
from .configuration_speechllm import SpeechLLMConfig
from .ctc_beam import score_dtype
from .ctc_prefix_score import CTCPrefixScorer
from .ctc_text import LabelsToText
from .decoder_inputs import DecoderInputs
from .hypothesis import Hypothesis
from .label_units import LabelUnits
from .lm_score import CausalLMScorer
from .logits_process import CTCPrefixLogitsProcessor
from .model_outputs import SpeechLLMSearchOutput
from .shallow_fusion import ShallowFusionLogitsProcessor
from .word_tokens import encode_words

OPTION_DEFAULTS = {field.name: field.default for field in fields(DecodingOptions)}
_FRAMES_PER_CHUNK = 32  # of CTC log-probs over a large vocabulary


class SpeechLLMGenerationMixin(GenerationMixin):
    """Generation methods of [`SpeechLLMForConditionalGeneration`]."""

    _has_plain_language_model = True

    @torch.no_grad()
    def generate(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        lm: CausalLMScorer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: torch.Tensor | None = None,
        ctc_targets: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        r"""
        Transcribe a batch of audio.

        Args:
            input_features: Waveforms `[B, S]` or frames `[B, S, F]`, `[B, F, S]`, from the processor.
            attention_mask: With `input_ids`, their mask `[B, P]`. Without, the mask of the audio `[B, S]`, which is
                how transformers' own pipeline passes it.
            input_ids: `[B, P]` prompt with one audio placeholder in each row. `None`: the prompt of the config.
            input_features_mask: `[B, S]`, 1 on valid steps.
            generation_config: Goes before the model's own, which fills in what this one leaves at `None`.
            logits_processor: Further processors, applied after the joint CTC score.
            lm: A language model to combine with. In the combined modes it takes the place of the model's own; in mode
                `"llm"` it is added by shallow fusion with `lm_weight`, and must have the same vocabulary.
            tokenizer: That of the language model (the processor's); needed to combine with a language model, in all
                modes but `"llm"` if CTC has labels of its own (`config.ctc_labels`), and for `stop_strings`.
            labels, ctc_targets: Ignored; `Seq2SeqTrainer` passes its whole batch.
            kwargs: Any option of transformers' `generate` but assisted decoding and chunked prefill, and the fields of
                [`DecodingOptions`]. One that has no part in the mode is refused here, and passed over where a config
                has it.

        Returns:
            Token ids `[B * num_return_sequences, N]` of the transcripts, padded on the right; behind `input_ids`, if
            these are given. With `return_dict_in_generate=True` the output of the language model's `generate` in mode
            `"llm"`, a [`SpeechLLMSearchOutput`] in all others.

        Raises:
            ValueError: If an option is out of range or has no part in the mode, the CTC head that it needs is not there
                or has other labels, or there are two masks of the audio.
        """
        if input_features is None:
            raise ValueError("input_features is required: pass the output of the processor for the audio.")
        if input_ids is None:
            input_features_mask, attention_mask = _audio_mask(input_features_mask, attention_mask), None
        generation_config = self._completed(generation_config)
        given = {name: value for name, value in kwargs.items() if hasattr(generation_config, name)}
        given |= {name: kwargs.get(name) for name in OPTION_DEFAULTS} | {"logits_processor": logits_processor or None}
        options = DecodingOptions(**{name: _pop_option(name, kwargs, generation_config) for name in OPTION_DEFAULTS})
        check_given_options(options.mode, given, has_lm=lm is not None)
        n_best = 1
        if options.searches_labels:
            # transformers allows several results for its own beam search only.
            asked = (kwargs.pop("num_return_sequences", None), generation_config.num_return_sequences, 1)
            n_best = next(number for number in asked if number is not None)
        kwargs = generation_config.update(**kwargs)  # what is left are no options but arguments of `generate`
        self._check_options(options, lm, n_best)
        self._check_arguments(options.mode, kwargs, generation_config)
        audio = self._hear(input_features, input_features_mask, options)
        if options.mode == "llm":
            processors = _taken_repetition_penalty(generation_config)
            processors += self._processors(audio, options, lm, logits_processor, generation_config.eos_token_id)
            inputs = self.merge_inputs(audio, input_ids, attention_mask)
            arguments = {"tokenizer": tokenizer, **kwargs}
            return _after_prompt(
                input_ids, self._generate_text(audio, inputs, processors, generation_config, arguments)
            )
        if options.searches_labels:
            nbests = self._search_labels(audio, options, n_best, lm, tokenizer)
        else:
            nbests = self._best_paths(audio)
        labels_to_tokens = _labels_to_tokens(self.config, tokenizer)
        tokens, scores = pad_hypotheses(nbests, labels_to_tokens, n_best, _pad_token_id(generation_config))
        device = audio.encoder_out_lens.device
        output = SpeechLLMSearchOutput(tokens.to(device), scores.to(device), nbests)
        return _after_prompt(input_ids, output if generation_config.return_dict_in_generate else output.sequences)

    def merge_adapter(self) -> None:
        """Add the adapters (LoRA) to the weights, for good: mode `"llm"` gets faster, results differ by rounding only.

        The language model is then no longer there without them: the modes that combine it with CTC need another, `lm`.
        """
        self._has_plain_language_model = self._has_plain_language_model and not has_adapters(self.language_model)
        merge_adapters(self)

    def _completed(self, generation_config: GenerationConfig | None) -> GenerationConfig:
        """A copy. What the given config leaves open (end of sequence, ctc_weight, ...) is the model's, as usual."""
        generation_config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        own = self.generation_config.to_dict()
        generation_config.update(**own, defaults_only=True, allow_custom_entries=True)
        return generation_config

    def _hear(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None, options: DecodingOptions
    ) -> ModelOutput:
        """What the mode needs of the audio; CTC log-probabilities only where all of them are read."""
        if options.mode == "llm":
            wants_ctc = options.ctc_weight > 0.0 and options.ctc_top_k is None
            return self.get_audio_features(input_features, input_features_mask, ctc_log_probs=wants_ctc)
        wants_ctc = options.searches_labels or options.ctc_top_k is None
        return self.encode(input_features, input_features_mask, ctc_log_probs=wants_ctc)

    def _processors(
        self,
        audio: ModelOutput,
        options: DecodingOptions,
        lm: CausalLMScorer | None,
        others: LogitsProcessorList | None,
        eos_token_id: int | list[int] | None,
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if options.ctc_weight > 0.0:
            processors.append(self._ctc_processor(audio, options, eos_token_id))
        if lm is not None:
            processors.append(ShallowFusionLogitsProcessor(lm, options.lm_weight, eos_token_id=eos_token_id))
        processors.extend(others or [])
        return processors

    def _generate_text(
        self,
        audio: ModelOutput,
        inputs: DecoderInputs,
        processors: LogitsProcessorList,
        generation_config: GenerationConfig,
        arguments: dict[str, Any],
    ) -> torch.Tensor | ModelOutput:
        """`generate` of the language model, which hears the audio; `arguments` are further ones of that."""
        with self.listening(audio, inputs):
            if "past_key_values" not in arguments:
                arguments["past_key_values"] = self._prefill_once(inputs, generation_config)
            return self.language_model.generate(
                inputs_embeds=inputs.inputs_embeds,
                attention_mask=inputs.mask,
                generation_config=generation_config,
                logits_processor=processors,
                **arguments,
            )

    def _prefill_once(self, inputs: DecoderInputs, generation_config: GenerationConfig) -> Cache | None:
        """The cache of all input positions `[B, P]` but the last, computed once and repeated for every beam.

        transformers would run audio and prompt through the language model once per beam. `None` where there is one
        beam, another kind of cache is asked for or needed, or earlier positions attend to the last one.
        """
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        uses_dynamic_cache = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if copies == 1 or inputs.mask.shape[1] < 2 or not uses_dynamic_cache:
            return None
        if self.config.interface == "bidirectional_prefix" and inputs.is_audio[:, -1].any():
            return None
        cache = DynamicCache(config=self.language_model.config)
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            return None  # recurrent states (linear attention) cannot be repeated
        position_ids = (inputs.mask.cumsum(1) - 1).clamp(min=0)
        self.language_model(
            inputs_embeds=inputs.inputs_embeds[:, :-1],
            attention_mask=inputs.mask[:, :-1],
            position_ids=position_ids[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(copies)
        return cache

    def _check_options(self, options: DecodingOptions, lm: CausalLMScorer | None, n_best: int) -> None:
        mode, ctc_weight = options.mode, options.ctc_weight
        if options.searches_labels and not (isinstance(n_best, Integral) and 1 <= n_best <= options.ctc_beam_size):
            raise ValueError(
                f"num_return_sequences must be 1 to {options.ctc_beam_size} (ctc_beam_size) in mode {mode!r}, got "
                f"{n_best}; give a larger ctc_beam_size for more."
            )
        if lm is None and mode in COMBINATIONS and not self._has_plain_language_model:
            raise ValueError(
                f"mode={mode!r} needs the language model without its adapter, which merge_adapter has added to the "
                "weights; load the model again, or give lm=."
            )
        if lm is not None and mode in ("ctc_greedy", "ctc_beam"):
            raise ValueError(f"lm: mode {mode!r} uses no language model; choose 'rescoring' or 'delayed_fusion'.")
        if lm is not None and mode == "llm" and options.lm_weight == 0.0:
            raise ValueError("lm: in mode 'llm' it has no part with lm_weight=0; give a weight, or leave lm out.")
        if lm is not None and mode == "llm" and lm.model is self.language_model and self.config.interface != "prefix":
            raise ValueError(
                f"lm: with interface={self.config.interface!r} the model's own language model hears while it decodes, "
                "so it cannot be the one to combine with too; load it a second time."
            )
        is_joint = mode == "llm" and ctc_weight > 0.0
        has_tokens, has_own_labels = self.config.ctc_token_ids is not None, self.config.ctc_labels is not None
        if is_joint and self.config.ctc_chain_length is not None:
            return  # the chains say how labels and tokens are related, whatever the labels are
        if (is_joint or mode == "label_fusion") and not has_tokens:
            raise ValueError(
                f"ctc_weight={ctc_weight}, mode={mode!r} need a CTC head whose labels are tokens of the language model "
                "(config.ctc_token_ids); this model has none. Use ctc_weight=0 and mode='llm'."
            )
        if mode != "llm" and not (has_tokens or has_own_labels):
            raise ValueError(f"mode={mode!r} needs a CTC head; this model has none. Use ctc_weight=0 and mode='llm'.")

    @staticmethod
    def _check_arguments(mode: str, arguments: dict[str, Any], generation_config: GenerationConfig) -> None:
        """Refuses arguments of transformers' `generate`, beyond options, that the mode cannot do anything with."""
        if mode == "llm":
            names = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size")
            asked = {name: getattr(generation_config, name, None) for name in names} | arguments
            for_tokens = [name for name in ("assistant_model", *names) if asked.get(name)]
            if for_tokens:
                raise ValueError(
                    f"{for_tokens[0]}: assisted decoding and chunked prefill are for models that read tokens, and a "
                    "speech LLM reads embeddings of the audio; leave it out."
                )
            return
        # Seq2SeqTrainer passes `synced_gpus` always.
        unknown = sorted(name for name, value in arguments.items() if value is not None and name != "synced_gpus")
        if unknown:
            raise ValueError(f"{unknown[0]}: mode {mode!r} knows no such argument; leave it out.")

    def _search_labels(
        self,
        audio: ModelOutput,
        options: DecodingOptions,
        n_best: int,
        lm: CausalLMScorer | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> list[list[Hypothesis]]:
        """Beam search over CTC labels, combined with `lm` or the model's own language model without its adapters."""
        config = self.config
        needs_lm = lm is None and options.mode != "ctc_beam"
        if tokenizer is None and (options.needs_text or needs_lm):
            raise ValueError(f"tokenizer is required for mode {options.mode!r}: pass tokenizer=processor.tokenizer.")
        label_units = None
        if options.mode == "label_fusion":
            token_ids = torch.tensor(config.ctc_token_ids, device=audio.ctc_log_probs.device)
            label_units = LabelUnits.from_token_ids(token_ids, config.text_config.vocab_size, config.blank_id)
        with self.plain_language_model():
            return options.search(
                audio.ctc_log_probs,
                audio.encoder_out_lens,
                config.blank_id,
                lm=CausalLMScorer(self.language_model, tokenizer) if needs_lm else lm,
                log_prior=self.ctc_head.log_prior,
                label_units=label_units,
                labels_to_text=_labels_to_text(config, tokenizer) if options.needs_text else None,
                n_best=n_best,
            )

    def _ctc_processor(
        self, audio: ModelOutput, options: DecodingOptions, eos_token_id: int | list[int] | None
    ) -> CTCPrefixLogitsProcessor:
        if eos_token_id is None:
            raise ValueError("eos_token_id is required for joint decoding; set it in generation_config.")
        device, blank_id = self.get_input_embeddings().weight.device, self.config.blank_id
        lens = audio.encoder_out_lens.to(device)
        if options.ctc_top_k is None:
            scorer = CTCPrefixScorer.from_log_probs(audio.ctc_log_probs.to(device), lens, blank_id)
        else:
            scorer = CTCPrefixScorer.from_head(
                lambda start, end: self.ctc_head.log_probs(audio.ctc_features[:, start:end]).to(device),
                lens,
                blank_id,
                top_k=options.ctc_top_k,
                chunk_frames=_FRAMES_PER_CHUNK,
            )
        return CTCPrefixLogitsProcessor(scorer, options.ctc_weight, eos_token_id, self.label_units)

    def _best_paths(self, audio: ModelOutput) -> list[list[Hypothesis]]:
        """The most probable CTC path of each utterance, repeats and blanks removed."""
        blank_id = self.config.blank_id
        if audio.ctc_log_probs is None:
            chunks = audio.ctc_features.split(_FRAMES_PER_CHUNK, dim=1)
            best = [self.ctc_head.log_probs(chunk).max(-1) for chunk in chunks]
        else:
            best = [audio.ctc_log_probs.max(-1)]
        log_probs = torch.cat([chunk.values for chunk in best], dim=1)  # B, T
        path = torch.cat([chunk.indices for chunk in best], dim=1)
        is_padding = ~lens_to_mask(audio.encoder_out_lens, path.shape[1])
        path = path.masked_fill(is_padding, blank_id)
        scores = log_probs.to(score_dtype(path.device)).masked_fill(is_padding, 0.0).sum(1).tolist()
        repeated = torch.zeros_like(path, dtype=torch.bool)
        repeated[:, 1:] = path[:, 1:] == path[:, :-1]
        keep = (path != blank_id) & ~repeated
        rows = [tuple(labels[kept].tolist()) for labels, kept in zip(path.cpu(), keep.cpu(), strict=True)]
        return [
            [Hypothesis(labels, None, am_log_prob=score, log_score=score)]
            for labels, score in zip(rows, scores, strict=True)
        ]


def _labels_to_text(config: SpeechLLMConfig, tokenizer: PreTrainedTokenizerBase) -> LabelsToText:
    """Text of CTC labels that are tokens of the language model or have texts of their own."""
    if config.ctc_token_ids is None:
        return lambda labels: "".join([config.ctc_labels[label] for label in labels])
    token_ids = config.ctc_token_ids
    return lambda labels: tokenizer.decode([token_ids[label] for label in labels], clean_up_tokenization_spaces=False)


def _labels_to_tokens(config: SpeechLLMConfig, tokenizer: PreTrainedTokenizerBase | None) -> LabelsToTokens:
    """Tokens of the language model for CTC labels."""
    if config.ctc_token_ids is not None:
        return lambda labels: [config.ctc_token_ids[label] for label in labels]
    if tokenizer is None:
        raise ValueError(
            "tokenizer is required to write what CTC heard, whose labels are no tokens: pass "
            "tokenizer=processor.tokenizer."
        )
    to_text = _labels_to_text(config, tokenizer)
    return lambda labels: encode_words(tokenizer, " ".join(to_text(labels).split()))


def _pad_token_id(generation_config: GenerationConfig) -> int:
    eos = generation_config.eos_token_id
    pad = generation_config.pad_token_id
    pad = pad if pad is not None else (eos[0] if isinstance(eos, list) else eos)
    if pad is None:
        raise ValueError("pad_token_id or eos_token_id is required to pad the results; set it in generation_config.")
    return pad


def _taken_repetition_penalty(generation_config: GenerationConfig) -> LogitsProcessorList:
    """The processor of the penalty, which is taken out of the config.

    Of its own, transformers takes the padding before a prompt of embeddings for the first generated tokens, and spares
    as many of these: a row would depend on the others of its batch.
    """
    penalty, generation_config.repetition_penalty = generation_config.repetition_penalty, None
    return LogitsProcessorList([] if penalty in (None, 1.0) else [RepetitionPenaltyLogitsProcessor(penalty)])


def _audio_mask(input_features_mask: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of the audio, `[B, S]`, under whichever name it was given."""
    if input_features_mask is None or attention_mask is None:
        return attention_mask if input_features_mask is None else input_features_mask
    is_same = attention_mask.shape == input_features_mask.shape
    if not is_same or bool((attention_mask.bool() != input_features_mask.bool().to(attention_mask.device)).any()):
        raise ValueError(
            "attention_mask: without input_ids it is the mask of the audio, and another one came as "
            "input_features_mask; leave it out, or give the input_ids that it belongs to."
        )
    return input_features_mask


def _pop_option(name: str, kwargs: dict[str, Any], generation_config: GenerationConfig) -> Any:
    """An option of ours: of the call, else of the generation config, else the default."""
    for value in (kwargs.pop(name, None), getattr(generation_config, name, None)):
        if value is not None:
            return value
    return OPTION_DEFAULTS[name]


def _after_prompt(input_ids: torch.Tensor | None, output: torch.Tensor | ModelOutput) -> torch.Tensor | ModelOutput:
    """Puts the prompts `[B, P]`, if any, before what was generated: `[B*K, N]` to `[B*K, P+N]`."""
    if input_ids is None:
        return output
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompt = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], 0).to(sequences.device)
    sequences = torch.cat([prompt, sequences], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output

"""`generate` of a speech LLM: encode once, build the prompt, decode with the language model and the CTC head jointly.

Decoding options beyond those of transformers, saved in `generation_config` and overridable per call:

- `mode`: `"llm"` (default), the language model hears, jointly with CTC where `ctc_weight > 0`; `"ctc_greedy"`, the best
  CTC path; `"ctc_beam"`, a beam search over CTC labels; `"rescoring"`, `"label_fusion"`, `"delayed_fusion"`, such a
  search combined with the plain language model (its LoRA off), see `combination.py`.
- `ctc_weight` (0 to 1, default 0): weight w of the CTC prefix score in mode `"llm"`, `(1-w) log p_LLM + w log p_CTC`.
- `lm_weight`, `prior_weight`, `length_reward` (default 0), `ctc_beam_size` (16), `fusion_interval` (1 frame): of the
  combined modes, see [`SearchOptions`]. In mode `"llm"` they apply to a language model given as `lm`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from .audio_encoders import lens_to_mask
from .combination import FUSION_OF_MODE, SearchOptions, pad_hypotheses, search_ctc
from .ctc_prefix_score import CTCPrefixScorer
from .ctc_text import LabelsToText
from .hypothesis import Hypothesis
from .label_units import LabelUnits
from .lm_score import CausalLMScorer
from .logits_process import CTCPrefixLogitsProcessor
from .shallow_fusion import ShallowFusionLogitsProcessor

MODES = ("llm", "ctc_greedy", *FUSION_OF_MODE)
OPTION_DEFAULTS = {
    "mode": "llm",
    "ctc_weight": 0.0,
    "lm_weight": 0.0,
    "prior_weight": 0.0,
    "length_reward": 0.0,
    "ctc_beam_size": 16,
    "fusion_interval": 1,
}


@dataclass
class SpeechLLMSearchOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)` in the modes that search over CTC labels.

    Args:
        sequences (`torch.Tensor` of shape `[B * num_return_sequences, N]`): Token ids, padded on the right.
        sequences_scores (`torch.Tensor` of shape `[B * num_return_sequences]`): Combined scores, in nats.
        hypotheses (`list[list[Hypothesis]]`): Per utterance, best first, with the separate scores of CTC, language
            model and prior.
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    hypotheses: list[list[Hypothesis]] | None = None


class SpeechLLMGenerationMixin(GenerationMixin):
    """Generation methods of [`SpeechLLMForConditionalGeneration`]."""

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
                `"llm"` it is added by shallow fusion and must have the same vocabulary.
            tokenizer: That of the language model (the processor's); modes `"rescoring"` and `"delayed_fusion"` need it.
            labels, ctc_targets: Ignored; `Seq2SeqTrainer` passes its whole batch.
            kwargs: Any option of transformers' `generate`, and those listed at the head of this module.

        Returns:
            Token ids `[B * num_return_sequences, N]` of the transcripts, padded on the right; behind `input_ids`, if
            these are given. With `return_dict_in_generate=True` the output of the language model's `generate` in mode
            `"llm"`, a [`SpeechLLMSearchOutput`] in the modes that search over CTC labels.

        Raises:
            ValueError: If an option is out of range, or needs a CTC head with labels that are LLM tokens.
        """
        if input_features is None:
            raise ValueError("input_features is required: pass the output of the processor for the audio.")
        if input_ids is None:
            input_features_mask = attention_mask if input_features_mask is None else input_features_mask
            attention_mask = None
        generation_config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        # As in transformers: what the given config leaves open (end of sequence, ctc_weight, ...) is the model's.
        own = self.generation_config.to_dict()
        generation_config.update(**own, defaults_only=True, allow_custom_entries=True)
        options = {name: _pop_option(name, kwargs, generation_config) for name in OPTION_DEFAULTS}
        self._check_options(options, lm)
        if options["mode"] in FUSION_OF_MODE:
            # transformers allows several results for its own beam search only.
            n_best = kwargs.pop("num_return_sequences", None) or generation_config.num_return_sequences or 1
        kwargs = generation_config.update(**kwargs)  # what is left are no options but arguments of `generate`
        unknown = set(kwargs) - {"synced_gpus"}  # which Seq2SeqTrainer passes always
        if options["mode"] != "llm" and unknown:
            raise ValueError(f"{sorted(unknown)[0]}: mode {options['mode']!r} knows no such argument; leave it out.")
        if options["mode"] == "ctc_greedy":
            audio = self.encode(input_features, input_features_mask)
            sequences = self._ctc_greedy_tokens(audio.ctc_log_probs, audio.encoder_out_lens, generation_config)
            return _after_prompt(input_ids, sequences)
        if options["mode"] in FUSION_OF_MODE:
            audio = self.encode(input_features, input_features_mask)
            output = self._search_ctc(audio, options, n_best, generation_config, lm, tokenizer)
            output.sequences = _after_prompt(input_ids, output.sequences)
            return output if generation_config.return_dict_in_generate else output.sequences

        audio = self.get_audio_features(input_features, input_features_mask)
        inputs_embeds, mask = self.merge_inputs(audio, input_ids, attention_mask)
        processors = LogitsProcessorList()
        if options["ctc_weight"] > 0.0:
            processors.append(self._ctc_processor(audio, options["ctc_weight"], generation_config.eos_token_id))
        if lm is not None and options["lm_weight"] != 0.0:
            processors.append(
                ShallowFusionLogitsProcessor(lm, options["lm_weight"], eos_token_id=generation_config.eos_token_id)
            )
        processors.extend(logits_processor or [])
        if "past_key_values" not in kwargs:
            kwargs["past_key_values"] = self._prefill_once(inputs_embeds, mask, generation_config)
        output = self.language_model.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            generation_config=generation_config,
            logits_processor=processors,
            **kwargs,
        )
        if isinstance(output, torch.Tensor):
            return _after_prompt(input_ids, output)
        output.sequences = _after_prompt(input_ids, output.sequences)
        return output

    def _prefill_once(
        self, inputs_embeds: torch.Tensor, mask: torch.Tensor, generation_config: GenerationConfig
    ) -> Cache | None:
        """The cache of all input positions `[B, P]` but the last, computed once and repeated for every beam.

        transformers would run audio and prompt through the language model once per beam. `None` where there is one
        beam, or another kind of cache than the dynamic one is asked for.
        """
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        uses_dynamic_cache = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if copies == 1 or inputs_embeds.shape[1] < 2 or not uses_dynamic_cache:
            return None
        cache = DynamicCache(config=self.language_model.config)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        self.language_model(
            inputs_embeds=inputs_embeds[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=position_ids[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(copies)
        return cache

    def _check_options(self, options: dict[str, Any], lm: CausalLMScorer | None) -> None:
        mode, ctc_weight = options["mode"], options["ctc_weight"]
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
        if not 0.0 <= ctc_weight <= 1.0:
            raise ValueError(f"ctc_weight must lie between 0 (language model only) and 1 (CTC only), got {ctc_weight}.")
        for name in ("ctc_beam_size", "fusion_interval"):
            if options[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {options[name]}.")
        if lm is not None and mode in ("ctc_greedy", "ctc_beam"):
            raise ValueError(f"lm: mode {mode!r} uses no language model; choose 'rescoring' or 'delayed_fusion'.")
        is_joint = mode == "llm" and ctc_weight > 0.0
        if is_joint and self.config.ctc_chain_length is not None:
            return  # the chains say how labels and tokens are related, whatever the labels are
        if (is_joint or mode != "llm") and self.config.ctc_token_ids is None:
            raise ValueError(
                f"ctc_weight={ctc_weight}, mode={mode!r} need a CTC head whose labels are tokens of the language model "
                "(config.ctc_token_ids); this model has none. Use ctc_weight=0 and mode='llm'."
            )

    def _search_ctc(
        self,
        audio: ModelOutput,
        options: dict[str, Any],
        n_best: int,
        generation_config: GenerationConfig,
        lm: CausalLMScorer | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> SpeechLLMSearchOutput:
        """Beam search over CTC labels, combined with `lm` or the model's own language model without its adapters."""
        config, mode = self.config, options["mode"]
        search = SearchOptions(
            n_best=n_best, **{name: value for name, value in options.items() if name != "ctc_weight"}
        )
        units = LabelUnits.from_token_ids(
            torch.tensor(config.ctc_token_ids), config.text_config.vocab_size, config.blank_id
        )
        needs_text = search.fusion == "delayed"
        if tokenizer is None and (needs_text or (lm is None and mode != "ctc_beam")):
            raise ValueError(f"tokenizer is required for mode {mode!r}: pass tokenizer=processor.tokenizer.")
        with self.plain_language_model():
            if lm is None and mode != "ctc_beam":
                lm = CausalLMScorer(self.language_model, tokenizer)
            nbests = search_ctc(
                audio.ctc_log_probs,
                audio.encoder_out_lens,
                config.blank_id,
                self.ctc_head.log_prior,
                lm,
                search,
                units,
                _speller(tokenizer, config.ctc_token_ids) if needs_text else None,
            )
        tokens, scores = pad_hypotheses(
            nbests, units.label_to_token.to(audio.ctc_log_probs.device), n_best, _pad_token_id(generation_config)
        )
        return SpeechLLMSearchOutput(sequences=tokens, sequences_scores=scores, hypotheses=nbests)

    def _ctc_processor(
        self, audio: ModelOutput, ctc_weight: float, eos_token_id: int | list[int] | None
    ) -> CTCPrefixLogitsProcessor:
        device = self.get_input_embeddings().weight.device
        scorer = CTCPrefixScorer.from_log_probs(
            audio.ctc_log_probs.to(device), audio.encoder_out_lens.to(device), self.config.blank_id
        )
        if eos_token_id is None:
            raise ValueError("eos_token_id is required for joint decoding; set it in generation_config.")
        return CTCPrefixLogitsProcessor(scorer, ctc_weight, eos_token_id, self.label_units)

    def _ctc_greedy_tokens(
        self, ctc_log_probs: torch.Tensor, lens: torch.Tensor, generation_config: GenerationConfig
    ) -> torch.Tensor:
        """The most probable CTC path `[B, T, U+1]`, repeats and blanks removed, as token ids `[B, N]`."""
        blank_id = self.config.blank_id
        path = ctc_log_probs.argmax(-1)
        path = path.masked_fill(~lens_to_mask(lens, path.shape[1]), blank_id)
        repeated = torch.zeros_like(path, dtype=torch.bool)
        repeated[:, 1:] = path[:, 1:] == path[:, :-1]
        keep = (path != blank_id) & ~repeated
        token_ids = torch.tensor(self.config.ctc_token_ids, device=path.device)
        rows = [token_ids[labels[kept]] for labels, kept in zip(path, keep, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_pad_token_id(generation_config))


def _speller(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> LabelsToText:
    """Text of CTC labels that are tokens."""
    return lambda labels: tokenizer.decode([token_ids[label] for label in labels], clean_up_tokenization_spaces=False)


def _pad_token_id(generation_config: GenerationConfig) -> int:
    eos = generation_config.eos_token_id
    pad = generation_config.pad_token_id
    pad = pad if pad is not None else (eos[0] if isinstance(eos, list) else eos)
    if pad is None:
        raise ValueError("pad_token_id or eos_token_id is required to pad the results; set it in generation_config.")
    return pad


def _pop_option(name: str, kwargs: dict[str, Any], generation_config: GenerationConfig) -> Any:
    """An option of ours: of the call, else of the generation config, else the default."""
    for value in (kwargs.pop(name, None), getattr(generation_config, name, None)):
        if value is not None:
            return value
    return OPTION_DEFAULTS[name]


def _after_prompt(input_ids: torch.Tensor | None, sequences: torch.Tensor) -> torch.Tensor:
    """Prompts `[B, P]`, if any, and what was generated `[B*K, N]` to `[B*K, P+N]`."""
    if input_ids is None:
        return sequences
    prompt = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], 0).to(sequences.device)
    return torch.cat([prompt, sequences], dim=1)

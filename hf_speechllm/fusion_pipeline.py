"""`pipeline("automatic-speech-recognition", model=..., lm=...)`: speech recognisers of others with a language model.

CTC models (Wav2Vec2, HuBERT, Parakeet, ...) are searched with delayed fusion, or their N-best lists rescored;
encoder-decoders (Whisper, Moonshine, ...) have the N-best list of their own beam search rescored. With `ctc_model=...`
that search is a joint one: each token is scored by the encoder-decoder and by the CTC model.

Shape legend: B pieces of audio, S input steps (samples or feature frames), T frames, A label axis of the CTC output,
U labels, W words.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES
from transformers.pipelines.base import pad_collate_fn
from transformers.utils import logging

from .combination import DecodingOptions
from .ctc_alignment import align, word_times
from .ctc_listener import CTCListener, ctc_log_probs, load_ctc_listener
from .ctc_prefix_score import CTCPrefixScorer
from .ctc_text import LabelsToText, labels_to_text_of
from .hypothesis import Hypothesis
from .logits_process import CTCPrefixLogitsProcessor
from .rescoring import nbest_from_seq2seq, rescore_nbest
from .segmented_pipeline import LanguageModel, SegmentedPipeline, load_language_model

FUSION_OPTIONS = ("lm_weight", "length_reward", "lm_lowercase", "fusion", "ctc_beam_size", "fusion_interval")
_GENERATE_OPTIONS = ("num_beams", "max_new_tokens", "language", "task")  # of encoder-decoders
_SEARCH_OPTIONS = (*_GENERATE_OPTIONS, "ctc_weight")
_MODE_OF_FUSION = {"delayed": "delayed_fusion", "rescoring": "rescoring"}
DEFAULT_LM_WEIGHT = 0.5
DEFAULT_CTC_WEIGHT = 0.3
DEFAULT_MAX_PIECE_S = 30.0
# Shorter audio is padded with silence: the convolutions of Moonshine need 0.06 s for a frame, those of Lasr 0.15 s.
MIN_PIECE_S = 0.2
NO_LABEL = -1  # fills up rows of labels

logger = logging.get_logger(__name__)


class FusionPipeline(SegmentedPipeline):
    """
    What the pipelines with a language model have in common.

    Args:
        model, feature_extractor, tokenizer, kwargs: As for `AutomaticSpeechRecognitionPipeline`; the options of the
            subclass may be given here or in a call.
        lm: Hub id, folder or [`CausalLMScorer`].
        decoder: Not used; `pipeline` attaches one to models that come with an n-gram model.

    Raises:
        TypeError: If `lm` is something else, or an option is unknown.
        ValueError: If an option is out of range, or model and tokenizer do not fit.
    """

    lm_is_optional = False

    def __init__(
        self,
        model: PreTrainedModel,
        feature_extractor: SequenceFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        lm: LanguageModel | None,
        decoder: Any = None,
        **kwargs: Any,
    ):
        super().__init__(model, feature_extractor, tokenizer, **kwargs)
        if decoder is not None:
            logger.warning("The pyctcdecode decoder of this model is not used: lm takes its place.")
        self.lm = None if lm is None and self.lm_is_optional else load_language_model(lm, self.device)
        self._is_upper_case = has_upper_case_only(self.tokenizer)

    @property
    def max_piece_s(self) -> float:
        """What most models were trained on at most."""
        return DEFAULT_MAX_PIECE_S

    def nbest(self, waveform: np.ndarray, size: int) -> list[Hypothesis]:
        """The N-best list of the acoustic model alone, best first: what scales are tuned on.

        Args:
            waveform: `[samples]` at the rate of the feature extractor, at most `max_piece_s` long.
            size: Hypotheses wanted; there may be fewer.
        """
        raise NotImplementedError

    def extract_features(self, waveform: np.ndarray) -> dict[str, Tensor]:
        """Features, their mask if the feature extractor makes one, and the number of steps S."""
        rate = self.feature_extractor.sampling_rate
        features = self.feature_extractor(self.long_enough(waveform), sampling_rate=rate, return_tensors="pt")
        return {**features, "num_steps": torch.tensor([features[self.model.main_input_name].shape[1]])}

    def long_enough(self, waveform: np.ndarray) -> np.ndarray:
        """The waveform, with silence behind it if it is shorter than what models can do."""
        missing = round(MIN_PIECE_S * self.feature_extractor.sampling_rate) - len(waveform)
        return np.pad(waveform, (0, max(0, missing)))

    def lm_case(self, lm_lowercase: bool | None) -> Callable[[str], str]:
        """What turns a transcript into text for the language model."""
        return str.lower if (self._is_upper_case if lm_lowercase is None else lm_lowercase) else str

    def _take_audio(self, model_inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Takes features `[B, S, ...]`, mask `[B, S]` and lengths `[B]` out of the inputs; the rest flows through."""
        features = model_inputs.pop(self.model.main_input_name)
        return features, model_inputs.pop("attention_mask", None), model_inputs.pop("num_steps")


class CTCFusionPipeline(FusionPipeline):
    """
    Any `AutoModelForCTC` with a language model of any vocabulary, by shallow fusion.

    The score of a transcript is `log P_CTC + lm_weight * log P_LM + length_reward * tokens`. Pieces of a batch are
    searched together. Models whose frames would depend on the padding (those with a group norm over time, such as
    Wav2Vec2-base, among others) are run piece by piece before: the result of a batch is that of each piece alone.

    Args:
        model, feature_extractor, tokenizer, lm, decoder, kwargs: As for [`FusionPipeline`].
        lm_weight (`float`, defaults to 0.5): Scale of the language model; to be tuned on development data.
        length_reward (`float`, defaults to 0): Nats per token of the language model, against its preference for short
            texts; to be tuned likewise.
        lm_lowercase (`bool`, *optional*): Whether the language model gets the text in lower case. By default it does
            where the CTC labels are in upper case only, which few language models are used to. The result stays in the
            case of the labels.
        fusion (`str`, defaults to `"delayed"`): `"delayed"`, in one pass, or `"rescoring"` of the CTC N-best list.
        ctc_beam_size (`int`, defaults to 16): Hypotheses kept, and rescored.
        fusion_interval (`int`, defaults to 1): Of delayed fusion: frames between two scorings of complete words.

    Call with `return_timestamps=True` for the pieces of long audio and their times, with `return_timestamps="word"` for
    each word and its times by CTC alignment, in seconds, and with `chunk_length_s` for pieces of less than 30 s.
    """

    timestamps = (True, "word", False)

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        blank_id, num_outputs = model.config.pad_token_id, model.config.vocab_size
        if blank_id is None or not 0 <= blank_id < num_outputs:
            raise ValueError(
                f"model.config.pad_token_id: expected the CTC blank, 0 to {num_outputs - 1}, got {blank_id}."
            )
        if len(self.tokenizer) < num_outputs:
            raise ValueError(
                f"tokenizer: expected one that spells all {num_outputs} outputs of the model, got one of "
                f"{len(self.tokenizer)} tokens."
            )
        self.blank_id: int = blank_id
        self.labels_to_text: LabelsToText = labels_to_text_of(self.tokenizer)

    def _sanitize_parameters(
        self,
        lm_weight: float | None = None,
        length_reward: float | None = None,
        lm_lowercase: bool | None = None,
        fusion: Literal["delayed", "rescoring"] | None = None,
        ctc_beam_size: int | None = None,
        fusion_interval: int | None = None,
        chunk_length_s: float | None = None,
        return_timestamps: bool | str | None = None,
        stride_length_s: float | None = None,
    ) -> tuple[dict, dict, dict]:
        if fusion not in (None, *_MODE_OF_FUSION):
            raise ValueError(f'fusion must be "delayed" or "rescoring", got {fusion!r}.')
        search = _given(
            mode=_MODE_OF_FUSION.get(fusion),
            lm_weight=lm_weight,
            length_reward=length_reward,
            ctc_beam_size=ctc_beam_size,
            fusion_interval=fusion_interval,
        )
        DecodingOptions(**search)  # which checks them
        preprocess, postprocess = self.piece_parameters(chunk_length_s, return_timestamps, stride_length_s)
        forward = _given(lm_lowercase=lm_lowercase, return_timestamps=return_timestamps)
        return preprocess, {**forward, **search}, postprocess

    def nbest(self, waveform: np.ndarray, size: int) -> list[Hypothesis]:
        """See [`FusionPipeline.nbest`]."""
        inputs = self.ensure_tensor_on_device(**self.extract_features(waveform))
        log_probs, lengths = ctc_log_probs(self.model, *self._take_audio(inputs))
        search = DecodingOptions(mode="ctc_beam", ctc_beam_size=size)
        return search.search(log_probs, lengths, self.blank_id, labels_to_text=self.labels_to_text, n_best=size)[0]

    def _forward(
        self,
        model_inputs: dict[str, Any],
        lm_lowercase: bool | None = None,
        return_timestamps: bool | str | None = None,
        **search: Any,
    ) -> dict[str, Any]:
        log_probs, lengths = ctc_log_probs(self.model, *self._take_audio(model_inputs))
        in_lm_case = self.lm_case(lm_lowercase)
        options = DecodingOptions(**{"mode": "delayed_fusion", "lm_weight": DEFAULT_LM_WEIGHT, **search})
        nbests = options.search(
            log_probs,
            lengths,
            self.blank_id,
            lm=self.lm,
            labels_to_text=lambda labels: in_lm_case(self.labels_to_text(labels)),
        )
        labels = _best_labels(nbests)
        outputs = {"is_last": model_inputs.pop("is_last"), "tokens": _pad_labels(labels)}
        if return_timestamps == "word":
            outputs["word_s"] = self._word_times(log_probs, lengths, labels)
        return {**outputs, **model_inputs}

    def _word_times(self, log_probs: Tensor, lengths: Tensor, labels: Sequence[tuple[int, ...]]) -> Tensor:
        """`[B, W, 2]` start and end of each word in seconds from the start of its piece, NaN where there are fewer."""
        seconds_per_frame = samples_per_frame(self.model, self.feature_extractor) / self.feature_extractor.sampling_rate
        times = []
        for aligned in align(log_probs, lengths, labels, self.blank_id):
            words = word_times(aligned, self.labels_to_text, seconds_per_frame=seconds_per_frame)
            bounds = [(word.start_s, word.end_s) for word in words]
            times.append(torch.tensor(bounds, dtype=torch.float64).reshape(-1, 2))
        return torch.nn.utils.rnn.pad_sequence(times, batch_first=True, padding_value=math.nan)

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of the labels."""
        return " ".join(self.labels_to_text(_unpad_labels(model_output["tokens"])).split())


class Seq2SeqRescoringPipeline(FusionPipeline):
    """
    An encoder-decoder such as Whisper or Moonshine with a CTC model, a language model, or both.

    With a CTC model, each token of the beam search scores `(1 - ctc_weight) * log p + ctc_weight * log p_CTC`, where
    p_CTC is the probability that what the CTC model heard begins with the text so far; see
    [`CTCPrefixLogitsProcessor`]. With a language model, the N-best list of the search is rescored: the score of a
    transcript is `score of the search + lm_weight * log P_LM + length_reward * tokens`. Whisper is run in batches;
    others piece by piece, since padding would change what they hear.

    Args:
        model, feature_extractor, tokenizer, kwargs: As for [`FusionPipeline`].
        lm: As for [`FusionPipeline`], or `None`, if there is a CTC model.
        ctc_model: Hub id or folder of a speech LLM with a CTC head, or of an `AutoModelForCTC` over characters; or a
            [`CTCListener`]. Of English and the sampling rate of the feature extractor.
        ctc_weight (`float`, defaults to 0.3): Share of the CTC model, 0 to 1; to be tuned on development data.
        lm_weight (`float`, defaults to 0.5), length_reward (`float`, defaults to 0): As for [`CTCFusionPipeline`].
        lm_lowercase (`bool`, *optional*): Whether the language model gets the text in lower case; by default as it is.
        num_beams (`int`, defaults to 5): Width of the beam search, and size of the list; at least 2.
        max_new_tokens (`int`, *optional*): By default what the model's generation config says.
        generate_kwargs (`dict`, *optional*): The two before may be given here too, and for multilingual Whisper
            `language`, which is required there, and `task`.

    Call with `return_timestamps=True` for the pieces of long audio and their times in seconds, and with
    `chunk_length_s` for pieces of less than 30 s.
    """

    lm_is_optional = True

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        lm: LanguageModel | None = None,
        ctc_model: str | os.PathLike[str] | CTCListener | None = None,
        **kwargs: Any,
    ):
        # Options are checked in the constructor of transformers' pipeline already.
        self._has_lm, self._has_ctc_model = lm is not None, ctc_model is not None
        super().__init__(model, *args, lm=lm, **kwargs)
        self.ctc_listener = self._ctc_chains = None
        if ctc_model is not None:
            self.ctc_listener = load_ctc_listener(ctc_model, self.device)
            rate = self.feature_extractor.sampling_rate
            if self.ctc_listener.sampling_rate != rate:
                raise ValueError(
                    f"ctc_model: expected one for audio of {rate} Hz like the model, got "
                    f"{self.ctc_listener.sampling_rate} Hz."
                )
            self._ctc_chains = self.ctc_listener.chains(self.tokenizer).to(self.device)

    @property
    def max_piece_s(self) -> float:
        """Whisper's window."""
        return float(getattr(self.feature_extractor, "chunk_length", DEFAULT_MAX_PIECE_S))

    def _sanitize_parameters(
        self,
        ctc_weight: float | None = None,
        lm_weight: float | None = None,
        length_reward: float | None = None,
        lm_lowercase: bool | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        chunk_length_s: float | None = None,
        return_timestamps: bool | None = None,
        stride_length_s: float | None = None,
    ) -> tuple[dict, dict, dict]:
        scales = _given(lm_weight=lm_weight, length_reward=length_reward, lm_lowercase=lm_lowercase)
        shares = _given(ctc_weight=ctc_weight)
        refuse_fusion_options({} if self._has_lm else scales)
        refuse_fusion_options({} if self._has_ctc_model else shares)
        options = {**(generate_kwargs or {}), **_given(num_beams=num_beams, max_new_tokens=max_new_tokens)}
        # transformers sets aside what was given at construction and is an option of every `generate`.
        _check_generate_options({**self._generate_kwargs, **options})
        DecodingOptions(**_given(ctc_weight=ctc_weight, lm_weight=lm_weight, length_reward=length_reward))  # checks
        preprocess, postprocess = self.piece_parameters(chunk_length_s, return_timestamps, stride_length_s)
        return preprocess, {**scales, **shares, **options}, postprocess

    def extract_features(self, waveform: np.ndarray) -> dict[str, Tensor]:
        """As of [`FusionPipeline`], and what the CTC model listens to."""
        features = super().extract_features(waveform)
        if self.ctc_listener is None:
            return features
        waveform = torch.from_numpy(self.long_enough(waveform).astype(np.float32))
        return {**features, "ctc_waveform": waveform[None], "ctc_num_samples": torch.tensor([len(waveform)])}

    def nbest(self, waveform: np.ndarray, size: int) -> list[Hypothesis]:
        """See [`FusionPipeline.nbest`]. Options of `generate` are those of the construction."""
        return self.nbests([waveform], size)[0]

    def nbests(
        self, waveforms: Sequence[np.ndarray], size: int, *, ctc_weight: float | None = None
    ) -> list[list[Hypothesis]]:
        """The N-best list of each waveform, decoded in one batch; see [`FusionPipeline.nbest`].

        Args:
            waveforms, size: As there.
            ctc_weight: Share of the CTC model, if there is one, in scores and search; by default that of the
                construction.
        """
        inputs, *others = [self.extract_features(waveform) for waveform in waveforms]
        if others:  # which takes a tokenizer with a padding token
            inputs = pad_collate_fn(self.tokenizer, self.feature_extractor)([inputs, *others])
        inputs = self.ensure_tensor_on_device(**inputs)
        options = {name: value for name, value in self._forward_params.items() if name in _SEARCH_OPTIONS}
        options |= {"num_beams": max(2, size), **_given(ctc_weight=ctc_weight)}
        heard = self._listen(inputs)
        return [rows[:size] for rows in self._search(*self._take_audio(inputs), heard, **options)]

    def _forward(
        self,
        model_inputs: dict[str, Any],
        lm_weight: float = DEFAULT_LM_WEIGHT,
        length_reward: float = 0.0,
        lm_lowercase: bool | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        in_lm_case = self.lm_case(lm_lowercase)
        heard = self._listen(model_inputs)
        nbests = self._search(*self._take_audio(model_inputs), heard, **options)
        if self.lm is not None:
            nbests = [[replace(row, text=in_lm_case(row.text)) for row in rows] for rows in nbests]
            nbests = rescore_nbest(nbests, self.lm, lm_weight=lm_weight, length_reward=length_reward)
        return {
            "is_last": model_inputs.pop("is_last"),
            "tokens": _pad_labels(_best_labels(nbests)),
            **model_inputs,
        }

    def _listen(self, model_inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """CTC log-probs `[B, T, A]` and frames `[B]` of the waveforms, which are taken out of the inputs."""
        if self.ctc_listener is None:
            return None
        waveforms = model_inputs.pop("ctc_waveform").float().cpu().numpy()
        num_samples = model_inputs.pop("ctc_num_samples").tolist()
        return self.ctc_listener.log_probs([row[:samples] for row, samples in zip(waveforms, num_samples, strict=True)])

    def _search(
        self,
        features: Tensor,
        mask: Tensor | None,
        num_steps: Tensor,
        heard: tuple[Tensor, Tensor] | None,
        ctc_weight: float = DEFAULT_CTC_WEIGHT,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        options = {"num_beams": 5, **self._generate_kwargs, **options}
        options["num_return_sequences"] = options["num_beams"]

        def processors(rows: slice) -> list[CTCPrefixLogitsProcessor]:
            if heard is None:
                return []
            log_probs, lengths = (values[rows].to(self.device) for values in heard)
            scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, self.ctc_listener.blank_id)
            eos_token_id = self.model.generation_config.eos_token_id
            return [CTCPrefixLogitsProcessor(scorer, ctc_weight, eos_token_id, self._ctc_chains)]

        # Of its processor the search asks for the tokenizer only, which a pipeline has too.
        if self.type == "seq2seq_whisper":  # a window of fixed length, whose padding it hears as silence
            whole_window = torch.ones_like(features[:, 0], dtype=torch.long)
            options |= {"attention_mask": whole_window, "logits_processor": processors(slice(None))}
            return nbest_from_seq2seq(self.model, self, features, **options)
        nbests = []
        for row, steps in enumerate(num_steps.tolist()):
            piece = slice(row, row + 1)
            row_mask = {} if mask is None else {"attention_mask": mask[piece, :steps]}
            nbests += nbest_from_seq2seq(
                self.model, self, features[piece, :steps], logits_processor=processors(piece), **row_mask, **options
            )
        return nbests

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of the tokens."""
        return self.tokenizer.decode(_unpad_labels(model_output["tokens"]), skip_special_tokens=True).strip()


def pipeline_for_lm(model: PreTrainedModel, has_ctc_model: bool = False) -> type[FusionPipeline]:
    """The class of pipeline that combines `model` with a language model, or with a CTC model.

    Raises:
        ValueError: If there is none for it.
    """
    if model.config.is_encoder_decoder:
        return Seq2SeqRescoringPipeline
    if has_ctc_model:
        raise ValueError(
            f"ctc_model: expected an encoder-decoder to decode jointly with, got {type(model).__name__}; leave "
            "ctc_model out."
        )
    if type(model).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values():
        return CTCFusionPipeline
    raise ValueError(
        f"lm: expected a CTC model (AutoModelForCTC) or an encoder-decoder to combine it with, got "
        f"{type(model).__name__}; leave lm out."
    )


def refuse_fusion_options(options: dict[str, Any]) -> None:
    """Refuses options of fusion that were given without a model to fuse with; transformers' own would ignore them."""
    given = [name for name in FUSION_OPTIONS if name in options]
    if given:
        raise ValueError(f"{', '.join(given)}: expected with a language model only; give lm too, or leave it out.")
    if "ctc_weight" in options:
        raise ValueError("ctc_weight: expected with a CTC model only; give ctc_model too, or leave it out.")


def samples_per_frame(model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor) -> int:
    """Samples of audio from one frame of a CTC model to the next.

    Raises:
        ValueError: If the model's config does not tell.
    """
    config = getattr(model.config, "encoder_config", model.config)
    steps = getattr(model.config, "inputs_to_logits_ratio", None) or getattr(config, "subsampling_factor", None)
    if steps is None:
        raise ValueError(
            f'return_timestamps="word": expected a model whose config tells its frame rate (inputs_to_logits_ratio), '
            f"got {type(model).__name__}; use return_timestamps=True."
        )
    if getattr(config, "add_adapter", False) and hasattr(config, "conv_stride"):  # their ratio leaves the adapter out
        steps *= config.adapter_stride**config.num_adapter_layers
    return steps * getattr(feature_extractor, "hop_length", 1)


def has_upper_case_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary, special tokens aside, has upper-case letters and no lower-case ones."""
    special = set(tokenizer.all_special_tokens)
    return "".join(token for token in tokenizer.get_vocab() if token not in special).isupper()


def _best_labels(nbests: Sequence[Sequence[Hypothesis]]) -> list[tuple[int, ...]]:
    """Of each list the labels of the first hypothesis; none where the language model excludes all of them."""
    return [rows[0].labels if rows else () for rows in nbests]


def _pad_labels(labels: Sequence[tuple[int, ...]]) -> Tensor:
    """`[B, U]` on the host."""
    rows = [torch.tensor(row, dtype=torch.long) for row in labels]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)


def _unpad_labels(tokens: Tensor) -> tuple[int, ...]:
    """The labels of `[1, U]`."""
    return tuple(tokens[tokens != NO_LABEL].tolist())


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_generate_options(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - set(_GENERATE_OPTIONS))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: expected {', '.join(_GENERATE_OPTIONS)} only beside an lm; leave it out."
        )
    if options.get("num_beams", 2) < 2:
        raise ValueError(f"num_beams must be at least 2, for a list to rescore, got {options['num_beams']}.")


__all__ = ["CTCFusionPipeline", "FusionPipeline", "Seq2SeqRescoringPipeline"]

"""Processor: waveforms to encoder input, transcripts to labels, token ids to text."""

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from .word_tokens import encode_words

AUDIO_TOKEN = "<|audio|>"
IGNORE_INDEX = -100
# Whisper's spectrogram reflects the signal at its end; with this much silence behind it every valid frame is the same
# whether the clip is padded to 30 s, to the longest of a batch, or not at all.
WHISPER_TAIL_SAMPLES = 400
# Shorter audio is padded with silence: extractors that normalise over time need two frames.
MIN_DURATION_S = 0.05
MAX_CHANNELS = 8  # no clip is that few samples long


class SpeechLLMProcessor(ProcessorMixin):
    r"""
    A feature extractor for the acoustic encoder and the tokeniser of the language model in one.

    Args:
        feature_extractor (`SequenceFeatureExtractor`): Feature extractor of the acoustic encoder.
        tokenizer (`PreTrainedTokenizerBase`): Tokeniser of the language model. It is copied, unless it has the audio
            placeholder, a padding token and pads on the right, as that of a saved processor does.
        prompt_before (`str`, defaults to `""`), prompt_after (`str`, defaults to `""`): Text around the audio; must be
            those of the model's config.
    """

    def __init__(
        self,
        feature_extractor: SequenceFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        prompt_before: str = "",
        prompt_after: str = "",
        **kwargs: Any,
    ):
        tokenizer = _prepared(tokenizer)
        self.prompt_before, self.prompt_after = prompt_before, prompt_after
        super().__init__(feature_extractor, tokenizer, **kwargs)

    @classmethod
    def from_encoder_llm_pretrained(
        cls, audio_model: str, language_model: str, prompt_before: str = "", prompt_after: str = ""
    ) -> "SpeechLLMProcessor":
        """The processor for two pre-trained models: Hub ids or folders."""
        return cls(
            AutoFeatureExtractor.from_pretrained(audio_model),
            AutoTokenizer.from_pretrained(language_model),
            prompt_before=prompt_before,
            prompt_after=prompt_after,
        )

    @property
    def audio_token_id(self) -> int:
        """Id of the placeholder that stands for the audio in `input_ids`."""
        return self.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def sampling_rate(self) -> int:
        """Sampling rate that the encoder expects, in Hz."""
        return self.feature_extractor.sampling_rate

    @property
    def model_input_names(self) -> list[str]:
        return ["input_features", "input_features_mask", "input_ids", "attention_mask"]

    def __call__(
        self,
        audio: np.ndarray | list[np.ndarray] | None = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        padding: str = "longest",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Audio to `input_features` and `input_features_mask`, transcripts to `labels`.

        Args:
            audio: Mono waveform(s) `[samples]` at `sampling_rate`, padded on the right to the longest and to 0.05 s. An
                array of two axes is a batch `[B, samples]`, as everywhere in transformers, never channels: take their
                mean first.
            text: Transcript(s); `labels` `[B, N]` are their tokens and the end of sequence, padded with -100.
            sampling_rate: Of `audio`, in Hz; checked against the feature extractor's.
            padding: `"longest"`, or `"max_length"`: Whisper's features are padded to 30 s, others as with `"longest"`.
            return_tensors: `"pt"`.

        Raises:
            ValueError: If there is neither audio nor text, an audio is empty or not mono, or the rate is another one.
        """
        if audio is None and text is None:
            raise ValueError("audio, text: at least one of them is required, got neither.")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}.")
        data: dict[str, torch.Tensor] = {}
        if audio is not None:
            data.update(self._features(audio, sampling_rate, padding))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            rows = [torch.tensor(self.encode_transcript(transcript)) for transcript in texts]
            data["labels"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        return BatchFeature(data)

    def _features(
        self, audio: np.ndarray | list[np.ndarray], sampling_rate: int | None, padding: str
    ) -> dict[str, torch.Tensor]:
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate must be {self.sampling_rate} Hz for this model, got {sampling_rate}; "
                "resample the audio (hf_speechllm.audio.prepare_waveform does)."
            )
        is_array = isinstance(audio, (np.ndarray, torch.Tensor))
        if is_array and audio.ndim == 2 and audio.shape[1] <= MAX_CHANNELS < audio.shape[0]:
            raise ValueError(
                f"audio: an array of two axes is a batch [B, samples], got shape {tuple(audio.shape)}, which looks "
                "like [samples, channels]; take the mean over the channels."
            )
        waveforms = [audio] if is_array and audio.ndim == 1 else list(audio)
        waveforms = [np.asarray(waveform, dtype=np.float32) for waveform in waveforms]
        for index, waveform in enumerate(waveforms):
            if waveform.ndim != 1 or waveform.size == 0:
                raise ValueError(
                    f"audio: each must be a non-empty mono waveform [samples], got shape {waveform.shape} at index "
                    f"{index}."
                )
        min_samples = round(MIN_DURATION_S * self.sampling_rate)
        waveforms = [np.pad(waveform, (0, max(0, min_samples - waveform.size))) for waveform in waveforms]
        extractor = self.feature_extractor
        if type(extractor).__name__ != "WhisperFeatureExtractor":
            features = extractor(
                waveforms,
                sampling_rate=self.sampling_rate,
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            name = "input_values" if "input_values" in features else "input_features"
            return {"input_features": features[name], "input_features_mask": features["attention_mask"].long()}
        padded = [np.pad(waveform, (0, WHISPER_TAIL_SAMPLES)) for waveform in waveforms]
        features = extractor(
            padded, sampling_rate=self.sampling_rate, padding=padding, truncation=False, return_tensors="pt"
        )["input_features"]
        lens = torch.tensor([-(-len(waveform) // extractor.hop_length) for waveform in waveforms])
        # A clip of just 30 s would be longer than all others by its silence.
        features = features[..., : max(extractor.nb_max_frames, int(lens.max()))]
        mask = (torch.arange(features.shape[-1])[None] < lens[:, None]).long()
        return {"input_features": features, "input_features_mask": mask}

    def encode_transcript(self, text: str) -> list[int]:
        """Tokens of a transcript and the end-of-sequence token. Every word, the first too, carries its space."""
        return [*encode_words(self.tokenizer, text.strip()), self.tokenizer.eos_token_id]

    def apply_transcription_request(
        self,
        audio: np.ndarray | list[np.ndarray],
        prompt: str | list[str] | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Everything that `generate` takes: features and a prompt with the audio placeholder, padded on the left.

        Args:
            audio: Mono waveform(s), as for the call of the processor.
            prompt: Text after the audio in place of the model's own; one for all, or one each.
            sampling_rate: Of `audio`, in Hz.
        """
        inputs = self(audio=audio, sampling_rate=sampling_rate)
        batch_size = inputs["input_features"].shape[0]
        prompts = [prompt] * batch_size if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != batch_size:
            raise ValueError(
                f"prompt: one text or one for each of the {batch_size} audios is expected, got {len(prompts)}."
            )
        texts = [
            f"{self.prompt_before}{AUDIO_TOKEN}{self.prompt_after if after is None else after}" for after in prompts
        ]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        inputs.update({name: tokens[name] for name in ("input_ids", "attention_mask")})
        return inputs

    def batch_decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Token ids `[B, N]` to texts without surrounding space."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Token ids `[N]` to text without surrounding space."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs).strip()


def _prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the audio placeholder, a padding token, and padding on the right; a copy if it lacks any."""
    has_placeholder = AUDIO_TOKEN in tokenizer.get_vocab()
    if has_placeholder and tokenizer.pad_token is not None and tokenizer.padding_side == "right":
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    # transformers' pipelines insist on one padding side for audio and text; prompts are padded on the left by hand.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not has_placeholder:
        tokenizer.add_special_tokens({"extra_special_tokens": [AUDIO_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


SpeechLLMProcessor.register_for_auto_class()

__all__ = ["SpeechLLMProcessor"]

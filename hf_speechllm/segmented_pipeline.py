"""What the pipelines for automatic speech recognition have in common: audio of any kind, rate and length, in pieces."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, AutoModelForCausalLM, AutoTokenizer

from .audio import prepare_waveform, stream_audio
from .lm_score import CausalLMScorer
from .segmentation import split_blocks

MIN_CHUNK_LENGTH_S = 0.2  # what `split_blocks` can do
LanguageModel = str | os.PathLike[str] | CausalLMScorer


class SegmentedPipeline(AutomaticSpeechRecognitionPipeline):
    """
    What our pipelines have in common: audio of any kind, cut at pauses, recognised piece by piece.

    Files and bytes in wav, flac, ogg and mp3 are decoded without ffmpeg; other rates are resampled, channels are
    averaged. A subclass says how long a piece may be, what the model takes, and what its output reads.
    """

    timestamps: tuple[bool | str, ...] = (True, False)
    _own_outputs = ("tokens", "is_last", "segment_s", "word_s")

    @property
    def max_piece_s(self) -> float:
        """Longest piece in seconds."""
        raise NotImplementedError

    def extract_features(self, waveform: np.ndarray) -> dict[str, torch.Tensor]:
        """What the model takes for a waveform `[samples]`, as a batch of one."""
        raise NotImplementedError

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of one piece, a batch of one."""
        raise NotImplementedError

    def piece_parameters(
        self,
        chunk_length_s: float | None = None,
        return_timestamps: bool | str | None = None,
        stride_length_s: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters of `preprocess` and `postprocess`.

        Raises:
            ValueError: One of them cannot be meant.
        """
        if return_timestamps is not None and return_timestamps not in self.timestamps:
            others = "".join(f", {kind!r}" for kind in self.timestamps if isinstance(kind, str))
            raise ValueError(
                f"return_timestamps must be True (times of the pieces){others} or False, got {return_timestamps!r}."
            )
        if chunk_length_s is not None and not chunk_length_s >= MIN_CHUNK_LENGTH_S:
            raise ValueError(f"chunk_length_s must be at least {MIN_CHUNK_LENGTH_S} seconds, got {chunk_length_s}.")
        if stride_length_s is not None:
            raise ValueError("stride_length_s is not used: pieces are cut at pauses and do not overlap; leave it out.")
        preprocess = {} if chunk_length_s is None else {"chunk_length_s": chunk_length_s}
        return preprocess, {} if return_timestamps is None else {"return_timestamps": return_timestamps}

    def preprocess(
        self, inputs: str | bytes | np.ndarray | torch.Tensor | dict, chunk_length_s: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Audio to features, one item for each piece."""
        rate = self.feature_extractor.sampling_rate
        extra: dict[str, Any] = {}
        if isinstance(inputs, (str, bytes)):
            blocks = stream_audio(self._fetch(inputs), rate)
        else:
            if isinstance(inputs, dict):
                known = {"raw", "array", "sampling_rate", "path"}
                extra = {name: value for name, value in inputs.items() if name not in known}
            blocks = [prepare_waveform(inputs, None if isinstance(inputs, dict) else rate, rate)]
        limit_s = self.max_piece_s if chunk_length_s is None else min(self.max_piece_s, chunk_length_s)
        dtype = self.dtype if self.dtype is not None else torch.float32
        pieces = split_blocks(blocks, rate, limit_s)
        following = next(pieces, None)
        while following is not None:
            (segment, waveform), following = following, next(pieces, None)
            features = self.extract_features(waveform)
            yield {
                "is_last": following is None,
                **{name: value.to(dtype) if value.is_floating_point() else value for name, value in features.items()},
                "segment_s": torch.tensor([[segment.start_s, segment.end_s]], dtype=torch.float64),
                **extra,
            }

    @staticmethod
    def _fetch(source: str | bytes) -> str | bytes:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            with urlopen(source) as response:
                return response.read()
        return source

    def postprocess(
        self, model_outputs: list[dict[str, Any]], return_timestamps: bool | str | None = None
    ) -> dict[str, Any]:
        """Outputs of the pieces to one text."""
        texts = [self.transcript(output) for output in model_outputs]
        result: dict[str, Any] = {"text": " ".join(text for text in texts if text)}
        if return_timestamps:
            result["chunks"] = [
                chunk
                for text, output in zip(texts, model_outputs, strict=True)
                for chunk in self.timed_chunks(text, output, return_timestamps)
            ]
        extra = defaultdict(list)
        for output in model_outputs:
            for name, value in output.items():
                if name not in self._own_outputs:
                    extra[name].append(value)
        # An entry of the input called "text" (the reference, in data sets) must not replace what was recognised.
        return {**extra, **result}

    def timed_chunks(self, text: str, model_output: dict[str, Any], kind: bool | str) -> list[dict[str, Any]]:
        """What was said in one piece, with times in seconds from the start of the recording: the piece or its words.

        Words have theirs in `word_s` of the output, `[1, W, 2]` seconds from the start of the piece, NaN where they are
        not known and where there are fewer words.
        """
        start_s, end_s = model_output["segment_s"].flatten().tolist()
        if kind != "word":
            return [{"text": text, "timestamp": (start_s, end_s)}] if text else []
        return [
            {"text": word, "timestamp": tuple(None if math.isnan(each) else start_s + each for each in word_s)}
            for word, word_s in zip(text.split(), model_output["word_s"][0].tolist(), strict=False)
        ]


def load_language_model(lm: LanguageModel, device: torch.device) -> CausalLMScorer:
    """The scorer of a causal language model.

    Args:
        lm: Hub id, folder, or a scorer, which is returned as it is.
        device: For a model that is loaded here.

    Raises:
        TypeError: `lm` is something else.
    """
    if isinstance(lm, CausalLMScorer):
        return lm
    if not isinstance(lm, (str, os.PathLike)):
        raise TypeError(
            f"lm: expected a Hub id, a folder or a CausalLMScorer, got {type(lm).__name__}; wrap a loaded model: "
            "CausalLMScorer(model, tokenizer)."
        )
    model = AutoModelForCausalLM.from_pretrained(lm).to(device).eval()
    return CausalLMScorer(model, AutoTokenizer.from_pretrained(lm))

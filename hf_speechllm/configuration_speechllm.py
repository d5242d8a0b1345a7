"""Configuration of a speech LLM: an acoustic encoder, a projector, a causal language model and a CTC head."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

PROJECTORS = ("stack", "mlp", "conv", "pool", "ctc_posterior")
INTERFACES = ("prefix", "bidirectional_prefix", "cross_attention")
# Written into an exported config.json so that `pipeline(..., trust_remote_code=True)` finds our pipeline class.
CUSTOM_PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "pipeline_speechllm.SpeechLLMPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
        "type": "multimodal",
    }
}


@strict
class SpeechLLMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SpeechLLMForConditionalGeneration`].

    Args:
        audio_config (`dict` or `PreTrainedConfig`):
            Configuration of the acoustic encoder (any speech encoder of transformers; of an encoder-decoder model
            such as Whisper or Moonshine the encoder is used).
        text_config (`dict` or `PreTrainedConfig`):
            Configuration of the causal language model.
        audio_token_id (`int`, *optional*):
            Id of the one placeholder token that stands for the whole audio in `input_ids`. Defaults to the size of
            the language model's vocabulary, i.e. one past its last embedding: the placeholder is never embedded.
        interface (`str`, defaults to `"prefix"`):
            How the language model hears: `"prefix"` reads the audio embeddings before the text;
            `"bidirectional_prefix"` too, and they attend to each other in both directions; `"cross_attention"` has
            additional gated layers that attend to them, and only text in its input. Where that has no prompt, it starts
            with the language model's begin-of-sequence token, or else its end-of-sequence token.
        cross_attention_interval (`int`, defaults to 1):
            With `"cross_attention"`: a gated layer stands before every so many-th layer of the language model.
        cross_attention_intermediate_size (`int`, *optional*):
            Width of the feed-forward block of the gated layers; defaults to 4 times that of the language model.
        projector (`str`, defaults to `"stack"`):
            `"stack"` (stacked frames, one linear layer), `"mlp"` (stacked frames, two layers), `"conv"` (two
            convolutions and a linear layer), `"pool"` (mean of the frames, one linear layer) or `"ctc_posterior"`
            (expected embedding of the CTC labels under the CTC posterior plus a correction computed from the stacked
            frames).
        downsampling (`int`, defaults to 4):
            Number of encoder frames that become one position of the language model.
        projector_hidden_size (`int`, *optional*):
            Width of the hidden layer of the `"mlp"`, `"conv"` and `"ctc_posterior"` projectors; defaults to the
            width of the language model.
        projector_hidden_act (`str`, defaults to `"gelu"`): Activation of the projector.
        ctc_blank_threshold (`float`, *optional*):
            If given, positions of the language model all of whose frames have a CTC blank probability above this value
            are dropped: fewer positions to attend to. `None` keeps all.
        ctc_vocab_size (`int`, *optional*):
            Number of CTC labels U without the blank. `None`: no CTC head. The blank is the last output, index U.
        ctc_token_ids (`list[int]`, *optional*):
            For CTC labels that are tokens of the language model: the token id of each label (length U).
        ctc_labels (`list[str]`, *optional*):
            For CTC labels of their own (characters, sub-words): the text of each label (length U).
        ctc_chain_length (`int`, *optional*):
            `None`: each token of a transcript is one CTC label, as `ctc_token_ids` tells. A number M: the language
            model writes in tokens of its own, each spelled by a chain of at most M CTC labels; the chains are kept with
            the weights (see [`LabelChains`]).
        ctc_delimiter (`int`, *optional*): With chains, the CTC label between words, if the first word has none.
        ctc_layers (`list[int]`, defaults to `[-1]`):
            Encoder layers that the CTC head reads, as indices into the layer outputs (`0` is the first layer, `-1`
            the last one after the final normalisation). Several: a learned softmax-weighted mix. Whether the encoder
            has them is checked when the model is built.
        ctc_loss_weight (`float`, defaults to 0.5): Weight of the CTC loss in the training loss.
        ce_loss_weight (`float`, defaults to 1.0):
            Weight of the language model's cross-entropy; `0` skips the language model in training. Not both can be 0.
        prompt_before (`str`, defaults to `""`), prompt_after (`str`, defaults to `""`):
            Text around the audio. The model reads the ids below; these strings document them.
        prompt_before_ids (`list[int]`), prompt_after_ids (`list[int]`): The tokenised prompt.
        max_audio_duration_s (`float`, defaults to 30.0):
            Longest audio seen in training, in seconds. Longer audio is to be segmented.

    Raises:
        ValueError: If a value is outside of what is listed here; the message names the parameter.
    """

    model_type = "speechllm"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="moonshine"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    interface: str = "prefix"
    cross_attention_interval: int = 1
    cross_attention_intermediate_size: int | None = None
    projector: str = "stack"
    downsampling: int = 4
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    ctc_blank_threshold: float | None = None
    ctc_vocab_size: int | None = None
    ctc_token_ids: list[int] | None = None
    ctc_labels: list[str] | None = None
    ctc_chain_length: int | None = None
    ctc_delimiter: int | None = None
    ctc_layers: list[int] | None = None
    ctc_loss_weight: float = 0.5
    ce_loss_weight: float = 1.0
    prompt_before: str = ""
    prompt_after: str = ""
    prompt_before_ids: list[int] | None = None
    prompt_after_ids: list[int] | None = None
    max_audio_duration_s: float = 30.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        vocab_size = self.text_config.vocab_size
        if self.audio_token_id is None:
            self.audio_token_id = vocab_size
        self.ctc_layers = [-1] if self.ctc_layers is None else self.ctc_layers
        self.prompt_before_ids = self.prompt_before_ids or []
        self.prompt_after_ids = self.prompt_after_ids or []
        if self.ctc_vocab_size is None and (self.ctc_token_ids is not None or self.ctc_labels is not None):
            self.ctc_vocab_size = len(self.ctc_token_ids if self.ctc_token_ids is not None else self.ctc_labels)
        self._check_values()

    def _check_values(self) -> None:
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector must be one of {PROJECTORS}, got {self.projector!r}.")
        if self.interface not in INTERFACES:
            raise ValueError(f"interface must be one of {INTERFACES}, got {self.interface!r}.")
        num_layers = self.get_text_config().num_hidden_layers
        if self.interface == "cross_attention" and not 1 <= self.cross_attention_interval <= num_layers:
            raise ValueError(
                f"cross_attention_interval must be 1 to {num_layers}, the layers of the language model; got "
                f"{self.cross_attention_interval}."
            )
        if self.cross_attention_intermediate_size is not None and self.cross_attention_intermediate_size < 1:
            raise ValueError(
                "cross_attention_intermediate_size must be a positive width, or None for 4 times that of the language "
                f"model; got {self.cross_attention_intermediate_size}."
            )
        if self.downsampling < 1:
            raise ValueError(f"downsampling must be a positive number of encoder frames, got {self.downsampling}.")
        if self.projector_hidden_size is not None and self.projector_hidden_size < 1:
            raise ValueError(
                "projector_hidden_size must be a positive width, or None for that of the language model; got "
                f"{self.projector_hidden_size}."
            )
        if not self.max_audio_duration_s > 0.0:
            raise ValueError(f"max_audio_duration_s must be a positive time in s, got {self.max_audio_duration_s}.")
        check_loss_weights(self.ce_loss_weight, self.ctc_loss_weight, has_ctc_head=self.ctc_vocab_size is not None)
        self._check_ctc()

    def _check_ctc(self) -> None:
        if not self.ctc_layers:
            raise ValueError("ctc_layers must name at least one encoder layer, got an empty list; [-1] is the last.")
        if self.ctc_token_ids is not None and self.ctc_labels is not None:
            raise ValueError("ctc_token_ids and ctc_labels exclude each other: CTC labels are LLM tokens or their own.")
        for name in ("ctc_token_ids", "ctc_labels"):
            values = getattr(self, name)
            if values is not None and len(values) != self.ctc_vocab_size:
                raise ValueError(f"{name} must have ctc_vocab_size = {self.ctc_vocab_size} entries, got {len(values)}.")
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{name} must not repeat an entry; {len(values) - len(set(values))} are repeated.")
        vocab_size = self.text_config.vocab_size
        if self.ctc_token_ids is not None and not all(0 <= i < vocab_size for i in self.ctc_token_ids):
            raise ValueError(f"ctc_token_ids must lie in [0, {vocab_size}), the language model's vocabulary.")
        if self.ctc_chain_length is not None and (self.ctc_vocab_size is None or self.ctc_chain_length < 1):
            raise ValueError(
                "ctc_chain_length must be a positive number of CTC labels, and needs a CTC head (ctc_token_ids or "
                f"ctc_labels); got {self.ctc_chain_length} with ctc_vocab_size={self.ctc_vocab_size}."
            )
        if self.projector == "ctc_posterior" and self.ctc_token_ids is None:
            raise ValueError(
                "projector='ctc_posterior' needs ctc_token_ids (CTC labels that are tokens of the language model), got "
                "none; set ctc_token_ids or choose another projector."
            )
        if self.ctc_blank_threshold is not None:
            if self.ctc_vocab_size is None:
                raise ValueError("ctc_blank_threshold needs a CTC head: set ctc_token_ids or ctc_labels.")
            if not 0.0 < self.ctc_blank_threshold < 1.0:
                raise ValueError(f"ctc_blank_threshold must lie between 0 and 1, got {self.ctc_blank_threshold}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # With the package imported, the pipeline is registered and an exported `custom_pipelines` would only make
        # `pipeline` ask for trust_remote_code; the copy of this module in a Hub repository needs it.
        if not __name__.startswith("transformers_modules."):
            config_dict = {name: value for name, value in config_dict.items() if name != "custom_pipelines"}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "custom_pipelines": CUSTOM_PIPELINES}

    @property
    def blank_id(self) -> int:
        """Index of the CTC blank in the outputs of the CTC head: the last one, U."""
        if self.ctc_vocab_size is None:
            raise ValueError("This model has no CTC head (ctc_vocab_size is None), so there is no blank_id.")
        return self.ctc_vocab_size

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's configuration: what `generate` reads (vocabulary, layers, cache) is found there."""
        return self.text_config.get_text_config()


def check_loss_weights(ce_loss_weight: float, ctc_loss_weight: float, has_ctc_head: bool) -> None:
    """Raises ValueError if a loss would be rewarded for growing, or there would be none."""
    is_valid = all(0.0 <= weight < math.inf for weight in (ce_loss_weight, ctc_loss_weight))
    if not is_valid or ce_loss_weight + (ctc_loss_weight if has_ctc_head else 0.0) == 0.0:
        raise ValueError(
            f"ce_loss_weight, ctc_loss_weight must be at least 0, and one of them more, that of a loss that this model "
            f"has; got {ce_loss_weight} and {ctc_loss_weight} {'with' if has_ctc_head else 'without'} a CTC head."
        )


SpeechLLMConfig.register_for_auto_class()

__all__ = ["SpeechLLMConfig"]

"""LLMs for speech recognition with Hugging Face transformers: speech LLMs, shallow fusion, joint CTC decoding.

Importing the package makes its models known to `AutoConfig`, `AutoModelForSpeechSeq2Seq`, `AutoProcessor` and
`pipeline("automatic-speech-recognition")`.
"""

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .base_models import base_model
from .bpe_subset import restrict_merges, select_lowercase_tokens, subset_chains, writer_chains
from .configuration_speechllm import SpeechLLMConfig
from .ctc_alignment import align
from .ctc_beam_search import ctc_beam_search
from .ctc_frames import merge_blank_frames
from .ctc_listener import CharacterListener, CTCListener, SpeechLLMListener
from .ctc_prefix_score import CTCPrefixScorer, CTCPrefixState
from .ctc_text import labels_to_text_of
from .data_collator import SpeechLLMDataCollator
from .default_model import default_model
from .fusion_pipeline import CTCFusionPipeline, Seq2SeqRescoringPipeline
from .hypothesis import Hypothesis
from .label_chains import LabelChains, build_chains, character_chains
from .label_units import LabelUnits
from .lm_score import CausalLMScorer
from .logits_process import CTCPrefixLogitsProcessor
from .modeling_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMPreTrainedModel
from .pipeline_speechllm import SpeechLLMPipeline
from .processing_speechllm import SpeechLLMProcessor
from .rescoring import nbest_from_seq2seq, rescore_nbest
from .scale_tuning import ScaleChoice, tune_scales
from .shallow_fusion import ShallowFusionLogitsProcessor

__version__ = "0.1.0"


def _register() -> None:
    AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(SpeechLLMConfig, SpeechLLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor, exist_ok=True)
    # transformers' own pipeline recognises sequence-to-sequence models by this table only.
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES[SpeechLLMConfig.model_type] = SpeechLLMForConditionalGeneration.__name__
    # `register_pipeline` would warn that the task exists; ours hands all other models to transformers' own.
    PIPELINE_REGISTRY.supported_tasks["automatic-speech-recognition"]["impl"] = SpeechLLMPipeline


_register()

__all__ = [
    "CTCFusionPipeline",
    "CTCListener",
    "CharacterListener",
    "Seq2SeqRescoringPipeline",
    "SpeechLLMListener",
    "CTCPrefixLogitsProcessor",
    "CTCPrefixScorer",
    "CTCPrefixState",
    "CausalLMScorer",
    "Hypothesis",
    "LabelChains",
    "LabelUnits",
    "ScaleChoice",
    "ShallowFusionLogitsProcessor",
    "SpeechLLMConfig",
    "SpeechLLMDataCollator",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMPipeline",
    "SpeechLLMPreTrainedModel",
    "SpeechLLMProcessor",
    "align",
    "base_model",
    "build_chains",
    "character_chains",
    "ctc_beam_search",
    "default_model",
    "labels_to_text_of",
    "merge_blank_frames",
    "nbest_from_seq2seq",
    "rescore_nbest",
    "restrict_merges",
    "select_lowercase_tokens",
    "subset_chains",
    "tune_scales",
    "writer_chains",
]

"""SpeechLLMConfig: what is derived, what survives saving, what is refused and with which words."""

import importlib.util
import json
import sys

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import ctc_token_ids, tiny_config, tiny_tokenizer
from transformers import AutoConfig, LlamaConfig, MoonshineConfig

from hf_speechllm import SpeechLLMConfig
from hf_speechllm.configuration_speechllm import CUSTOM_PIPELINES

NON_DEFAULT = {
    "projector": "ctc_posterior",
    "downsampling": 3,
    "projector_hidden_size": 20,
    "projector_hidden_act": "relu",
    "ctc_blank_threshold": 0.9,
    "ctc_layers": [0, -1],
    "ctc_loss_weight": 0.25,
    "ce_loss_weight": 0.75,
    "prompt_before": "<s> transcribe:",
    "prompt_before_ids": [1, 5],
    "prompt_after_ids": [2],
    "max_audio_duration_s": 12.5,
}


def test_every_value_survives_to_dict_and_from_dict():
    config = tiny_config(**NON_DEFAULT)
    again = SpeechLLMConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert {name: getattr(again, name) for name in NON_DEFAULT} == NON_DEFAULT
    assert type(again.audio_config) is MoonshineConfig and type(again.text_config) is LlamaConfig


@pytest.mark.parametrize("audio", ["moonshine", "parakeet", "whisper"])
def test_every_value_survives_saving_and_auto_loading(tmp_path, audio):
    config = tiny_config(audio, "qwen3", **NON_DEFAULT)
    config.save_pretrained(tmp_path)
    for again in (SpeechLLMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is SpeechLLMConfig
        assert {name: getattr(again, name) for name in NON_DEFAULT} == NON_DEFAULT
        assert again.ctc_token_ids == ctc_token_ids() and again.audio_token_id == config.audio_token_id
        assert again.audio_config.to_dict() == config.audio_config.to_dict()
        assert again.text_config.to_dict() == config.text_config.to_dict()


def test_loading_takes_overrides(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert SpeechLLMConfig.from_pretrained(tmp_path, ctc_loss_weight=0.125).ctc_loss_weight == 0.125


def test_custom_pipelines_are_exported_but_dropped_by_the_installed_package(tmp_path):
    """With them, `pipeline` would ask for trust_remote_code although the package is there."""
    tiny_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == CUSTOM_PIPELINES
    loaded = SpeechLLMConfig.from_pretrained(tmp_path)
    assert not hasattr(loaded, "custom_pipelines")
    assert loaded.to_dict()["custom_pipelines"] == CUSTOM_PIPELINES


def test_a_copy_of_the_module_loaded_as_remote_code_keeps_custom_pipelines(monkeypatch):
    path = sys.modules[SpeechLLMConfig.__module__].__file__
    spec = importlib.util.spec_from_file_location("transformers_modules.x.configuration_speechllm", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    config = module.SpeechLLMConfig.from_dict(module.SpeechLLMConfig().to_dict())
    assert config.custom_pipelines == CUSTOM_PIPELINES


def test_default_config_is_a_moonshine_encoder_and_a_llama():
    config = SpeechLLMConfig()
    assert (config.audio_config.model_type, config.text_config.model_type) == ("moonshine", "llama")
    assert config.ctc_layers == [-1] and config.prompt_before_ids == [] and config.prompt_after_ids == []


def test_sub_configs_are_taken_as_dicts():
    config = SpeechLLMConfig(
        audio_config={"model_type": "whisper", "d_model": 32}, text_config={"model_type": "gpt2", "n_embd": 48}
    )
    assert config.audio_config.d_model == 32 and config.text_config.hidden_size == 48


def test_audio_token_id_defaults_to_one_past_the_vocabulary():
    assert tiny_config(audio_token_id=None).audio_token_id == len(tiny_tokenizer()) + 3
    assert tiny_config(audio_token_id=7).audio_token_id == 7


def test_ctc_vocab_size_is_the_number_of_labels_and_the_blank_comes_after_them():
    config = tiny_config()
    assert config.ctc_vocab_size == config.blank_id == len(ctc_token_ids())
    config = tiny_config(ctc_token_ids=None, ctc_labels=["a", "b", " "])
    assert config.ctc_vocab_size == config.blank_id == 3
    assert tiny_config(ctc_token_ids=None, ctc_vocab_size=5).blank_id == 5


def test_text_config_is_what_generate_reads():
    config = tiny_config()
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(decoder=True) is config.text_config


def test_blank_id_without_ctc_head_is_an_error():
    config = tiny_config(ctc_token_ids=None)
    assert config.ctc_vocab_size is None
    with pytest.raises(ValueError, match=r"no CTC head \(ctc_vocab_size is None\)"):
        _ = config.blank_id


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projector": "qformer"}, r"projector must be one of \('stack', .*\), got 'qformer'"),
        ({"interface": "telepathy"}, r"interface must be one of \('prefix',.*\), got 'telepathy'"),
        ({"downsampling": 0}, "downsampling must be a positive number of encoder frames, got 0"),
        ({"ctc_layers": []}, r"ctc_layers must name at least one encoder layer, got an empty list; \[-1\] is the last"),
        ({"projector_hidden_size": 0}, "projector_hidden_size must be a positive width, or None .* got 0"),
        ({"max_audio_duration_s": -1.0}, "max_audio_duration_s must be a positive time in s, got -1.0"),
        ({"max_audio_duration_s": float("nan")}, "max_audio_duration_s must be a positive time in s, got nan"),
        (
            {"ce_loss_weight": 0.0, "ctc_loss_weight": 0.0},
            "ce_loss_weight, ctc_loss_weight must .* got 0.0 and 0.0 with",
        ),
        ({"ce_loss_weight": -1.0}, "ce_loss_weight, ctc_loss_weight must be at least 0, .* got -1.0 and 0.5"),
        ({"ctc_loss_weight": float("inf")}, "ce_loss_weight, ctc_loss_weight must be .* got 1.0 and inf"),
        ({"ce_loss_weight": 0.0, "ctc_token_ids": None}, "one of them more, .* got 0.0 and 0.5 without a CTC head"),
        ({"ctc_labels": ["a"]}, "ctc_token_ids and ctc_labels exclude each other"),
        ({"ctc_token_ids": [3, 4], "ctc_vocab_size": 3}, "ctc_token_ids must have ctc_vocab_size = 3 entries, got 2"),
        (
            {"ctc_token_ids": None, "ctc_labels": ["a", "b"], "ctc_vocab_size": 3},
            "ctc_labels must have ctc_vocab_size = 3 entries, got 2",
        ),
        ({"ctc_token_ids": [3, 4, 3]}, "ctc_token_ids must not repeat an entry; 1 are repeated"),
        ({"ctc_token_ids": None, "ctc_labels": ["a", "a"]}, "ctc_labels must not repeat an entry; 1 are repeated"),
        ({"ctc_token_ids": [3, 10_000]}, r"ctc_token_ids must lie in \[0, \d+\), the language model's vocabulary"),
        ({"ctc_token_ids": [-1, 3]}, r"ctc_token_ids must lie in \[0, \d+\)"),
        (
            {"projector": "ctc_posterior", "ctc_token_ids": None, "ctc_labels": ["a"]},
            r"projector='ctc_posterior' needs ctc_token_ids .* got none; set ctc_token_ids or choose another",
        ),
        (
            {"ctc_blank_threshold": 0.5, "ctc_token_ids": None},
            "ctc_blank_threshold needs a CTC head: set ctc_token_ids",
        ),
        ({"ctc_blank_threshold": 1.0}, "ctc_blank_threshold must lie between 0 and 1, got 1.0"),
        ({"ctc_blank_threshold": 0.0}, "ctc_blank_threshold must lie between 0 and 1, got 0.0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)


@pytest.mark.parametrize("values", [{"downsampling": "four"}, {"ctc_layers": -1}, {"projector": None}])
def test_a_wrong_type_is_refused_with_its_name(values):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(values))):
        tiny_config(**values)

"""Joint decoding of a model that is not ours: Whisper, with CTC over characters."""

from __future__ import annotations

import csv
import string
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from ctc_reference import textbook_prefix_log_prob
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from hf_speechllm import base_model
from hf_speechllm.ctc_prefix_score import CTCPrefixScorer
from hf_speechllm.label_chains import character_chains
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor

CHARACTERS = ["<pad>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]  # as Wav2Vec2 has them, without the unused ones
BLANK = 0
BEAM = {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"}
SAMPLES = Path(__file__).parent.parent / "samples"
CLIP = "sense_and_sensibility_01_austen-0880.flac"

# Every letter is a token: near weight 1 the first letter alone scores best, and must not be a dead end.
WORDS = [" the", "The", " cat", "cat", " Cat", " hat", "at", " at", " ", "'s", "'", ",", " 9", *string.ascii_lowercase]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
TIMESTAMPS = [f"<|{0.02 * i:.2f}|>" for i in range(1501)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ordinary tokens, special tokens and time stamps, in the order of Whisper's."""
    vocab = {word.replace(" ", "Ġ"): index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token) for token in TIMESTAMPS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0])


TOKENIZER = tiny_tokenizer()
EOS, START, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS = TOKENIZER.convert_tokens_to_ids(SPECIAL)
TIMESTAMP_IDS = range(NO_TIMESTAMPS + 1, len(TOKENIZER))


def tiny_whisper(is_multilingual: bool) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(TOKENIZER), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, init_std=0.3, pad_token_id=EOS,
        bos_token_id=EOS, eos_token_id=EOS, decoder_start_token_id=START, max_target_positions=64, dropout=0.0,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    generation = model.generation_config
    generation.suppress_tokens = [START, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS]
    generation.begin_suppress_tokens = [WORDS.index(" "), EOS]
    generation.no_timestamps_token_id, generation.is_multilingual = NO_TIMESTAMPS, is_multilingual
    generation.max_initial_timestamp_index, generation.return_timestamps = 50, False
    if is_multilingual:
        generation.lang_to_id, generation.task_to_id = {"<|en|>": ENGLISH}, {"transcribe": TRANSCRIBE}
    generation.max_new_tokens = 24
    return model


FEATURES = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))


def labels_of(text: str) -> tuple[int, ...]:
    return tuple(CHARACTERS.index("|" if character == " " else character.upper()) for character in text)


def posterior(text: str, confidence: float = 0.98) -> torch.Tensor:
    """[T, A] log-probs of a CTC model that heard `text`: each character for one frame, then two frames of blank."""
    path = [BLANK, *(label for character in labels_of(text) for label in (character, BLANK, BLANK))]
    probs = torch.full((len(path), len(CHARACTERS)), (1.0 - confidence) / (len(CHARACTERS) - 1))
    probs[torch.arange(len(path)), path] = confidence
    return probs.log()


def processor(text: str, weight: float, silent_ids: range | tuple[()] = ()) -> CTCPrefixLogitsProcessor:
    log_probs = posterior(text)
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([len(log_probs)]), BLANK)
    chains = character_chains(TOKENIZER, CHARACTERS, blank_id=BLANK, silent_ids=silent_ids)
    return CTCPrefixLogitsProcessor(scorer, weight, EOS, chains)


def generate(model: WhisperForConditionalGeneration, joint: CTCPrefixLogitsProcessor | None, **options) -> torch.Tensor:
    processors = LogitsProcessorList([] if joint is None else [joint])
    if model.generation_config.is_multilingual:
        options |= {"language": "en", "task": "transcribe"}
    return model.generate(FEATURES, logits_processor=processors, **options)[0]


@pytest.mark.parametrize("is_multilingual", [False, True])
@pytest.mark.parametrize("options", [{}, BEAM])
def test_whisper_writes_what_ctc_heard(is_multilingual: bool, options: dict) -> None:
    model = tiny_whisper(is_multilingual)
    out = generate(model, processor("the cat's hat", 0.95), **options)
    assert words_of(TOKENIZER.decode(out, skip_special_tokens=True)) == "the cat's hat"
    assert generate(model, processor("cat", 0.95), **options).tolist() != generate(model, None, **options).tolist()


@pytest.mark.parametrize("options", [{}, BEAM])
def test_weight_zero_is_plain_whisper(options: dict) -> None:
    model = tiny_whisper(True)
    assert torch.equal(generate(model, processor("the cat", 0.0), **options), generate(model, None, **options))


def test_time_stamps_are_silent() -> None:
    """Tokens that other processors force or offer between words: scored by Whisper alone, without effect on CTC."""
    scores = torch.randn(1, len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    prompt, stamp, the = torch.tensor([[START, ENGLISH, TRANSCRIBE]]), TIMESTAMP_IDS[0], WORDS.index(" the")
    joint, plain = processor("the cat", 0.9, silent_ids=TIMESTAMP_IDS), processor("the cat", 0.9)
    only_stamps = scores.index_fill(1, torch.arange(NO_TIMESTAMPS + 1), -torch.inf)
    best = joint(prompt, only_stamps).topk(3)
    torch.testing.assert_close(best.values, only_stamps.log_softmax(1).topk(3).values)
    assert (plain(prompt, scores)[:, TIMESTAMP_IDS] == -torch.inf).all()
    words = scores.index_fill(1, torch.tensor(TIMESTAMP_IDS), -torch.inf)
    after_stamp = joint(torch.cat((prompt, torch.tensor([[stamp]])), 1), words)
    torch.testing.assert_close(after_stamp, plain(prompt, words))
    after_word = joint(torch.cat((prompt, torch.tensor([[stamp, the]])), 1), scores)
    want = textbook_prefix_log_prob(posterior("the cat"), BLANK, labels_of("the"))[0]
    assert float(joint._step.state.prefix_log_prob[0]) == pytest.approx(want, abs=1e-4)
    assert (after_word[:, TIMESTAMP_IDS] > -torch.inf).any()


def test_the_prompt_of_whisper_is_not_speech() -> None:
    """The state after some tokens is that of their characters alone, without a delimiter before the first."""
    model, joint = tiny_whisper(True), processor("the cat", 0.95)
    out = generate(model, joint)
    text = TOKENIZER.decode([token for token in joint._step.ids[0].tolist() if token < len(WORDS)])
    want = textbook_prefix_log_prob(posterior("the cat"), BLANK, labels_of(words_of(text)))[0]
    assert words_of(text) == "the cat"
    assert float(joint._step.state.prefix_log_prob[0]) == pytest.approx(want, abs=1e-4)
    assert joint._step.prompt_width == 4
    assert out.tolist()[-1] == EOS or len(out) > 1


def words_of(text: str) -> str:
    """Lower-case words with one space between them; punctuation and hyphens are left out."""
    return " ".join("".join(c for c in text.lower().replace("-", " ") if c.isalpha() or c in " '").split())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, BEAM])
def test_characters_mend_what_whisper_tiny_mishears(options: dict) -> None:
    """Greedy, it writes "old-sposed" for "ill disposed". Case and punctuation remain its own."""
    folder = base_model("whisper-tiny.en")
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    whisper = WhisperProcessor.from_pretrained(folder)
    waveform, rate = soundfile.read(SAMPLES / CLIP, dtype=np.float32)
    with (SAMPLES / "transcripts.tsv").open(encoding="utf-8") as file:
        reference = {row["file"]: row["text"] for row in csv.DictReader(file, delimiter="\t")}[CLIP]
    features = whisper(waveform, sampling_rate=rate, return_tensors="pt").input_features
    log_probs = posterior(reference, 0.9)
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([len(log_probs)]), BLANK)
    chains = character_chains(whisper.tokenizer, CHARACTERS, blank_id=BLANK)

    def transcribe(*processors: CTCPrefixLogitsProcessor) -> str:
        ids = model.generate(features, logits_processor=[*processors], max_new_tokens=40, **options)[0]
        return whisper.decode(ids, skip_special_tokens=True).strip()

    eos = model.generation_config.eos_token_id
    plain = transcribe()
    assert transcribe(CTCPrefixLogitsProcessor(scorer, 0.0, eos, chains)) == plain
    joint = transcribe(CTCPrefixLogitsProcessor(scorer, 0.4, eos, chains))
    assert words_of(joint) == reference
    assert joint.startswith("He was") and joint.endswith("man.")
    assert (words_of(plain) == reference) == (options == BEAM)

"""Joint decoding of a model that is not ours: Whisper, with CTC over characters or over sub-words of another LLM."""

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
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from hf_speechllm import base_model
from hf_speechllm.bpe_subset import NUM_CHARACTERS, restrict_merges, select_lowercase_tokens, writer_chains
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
    assert float(joint._step.state.ctc.prefix_log_prob[0]) == pytest.approx(want, abs=1e-4)
    assert (after_word[:, TIMESTAMP_IDS] > -torch.inf).any()


def test_the_prompt_of_whisper_is_not_speech() -> None:
    """The state after some tokens is that of their characters alone, without a delimiter before the first."""
    model, joint = tiny_whisper(True), processor("the cat", 0.95)
    out = generate(model, joint)
    text = TOKENIZER.decode([token for token in joint._step.ids[0].tolist() if token < len(WORDS)])
    want = textbook_prefix_log_prob(posterior("the cat"), BLANK, labels_of(words_of(text)))[0]
    assert words_of(text) == "the cat"
    assert float(joint._step.state.ctc.prefix_log_prob[0]) == pytest.approx(want, abs=1e-4)
    assert joint._step.prompt_width == 4
    assert out.tolist()[-1] == EOS or len(out) > 1


def words_of(text: str) -> str:
    """Lower-case words with one space between them; punctuation and hyphens are left out."""
    return " ".join("".join(c for c in text.lower().replace("-", " ") if c.isalpha() or c in " '").split())


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with letters and a few merges, none of which is a token of Whisper's."""
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġ", "h"), ("Ġh", "a"), ("a", "t"), ("'", "s"), ("c", "at")]
    tokens = [*string.ascii_lowercase, "'", "Ġ", *("".join(merge) for merge in merges), "</s>"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


LLM_TOKENIZER = llm_tokenizer()
SUBWORDS = select_lowercase_tokens(LLM_TOKENIZER, NUM_CHARACTERS + 7)
SUBWORD_CHAINS = writer_chains(TOKENIZER, LLM_TOKENIZER, SUBWORDS)


def subword_labels(text: str) -> list[int]:
    """As CTC is taught: every word with its space, the first too."""
    ids = restrict_merges(LLM_TOKENIZER, SUBWORDS)(f" {text}").input_ids
    return [SUBWORDS.index(index) for index in ids]


def subword_posterior(text: str, confidence: float = 0.98) -> torch.Tensor:
    """[T, A] log-probs of CTC over sub-words, blank last: each label for one frame, then a frame of blank."""
    blank = len(SUBWORDS)
    path = [blank, *(label for each in subword_labels(text) for label in (each, blank))]
    probs = torch.full((len(path), blank + 1), (1.0 - confidence) / blank)
    probs[torch.arange(len(path)), path] = confidence
    return probs.log()


def subword_processor(*texts: str, weight: float = 0.95, **options) -> CTCPrefixLogitsProcessor:
    log_probs = [subword_posterior(text) for text in texts]
    lengths = torch.tensor([len(row) for row in log_probs])
    padded = torch.nn.utils.rnn.pad_sequence(log_probs, batch_first=True)
    scorer = CTCPrefixScorer.from_log_probs(padded, lengths, len(SUBWORDS))
    return CTCPrefixLogitsProcessor(scorer, weight, EOS, SUBWORD_CHAINS, **options)


@pytest.mark.parametrize("options", [{}, BEAM])
def test_whisper_writes_what_ctc_over_other_sub_words_heard(options: dict) -> None:
    model = tiny_whisper(False)
    for text in ("the cat's hat", "hat at the cat"):
        out = generate(model, subword_processor(text), **options)
        assert words_of(TOKENIZER.decode(out, skip_special_tokens=True)) == text


def test_the_state_of_other_sub_words_is_that_of_their_text() -> None:
    """With and without a space before the first word, behind a mark, and in whatever case."""
    scores = torch.randn(1, len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    for tokens, text in (
        ([" the", " cat", "'s", " hat"], "the cat's hat"),
        (["The", ",", "cat", ",", " Cat"], "the cat cat"),
        ([",", "cat", "at"], "catat"),
    ):
        joint = subword_processor("the cat's hat")
        ids = torch.tensor([[START]])
        joint(ids, scores)
        for token in tokens:
            ids = torch.cat((ids, torch.tensor([[WORDS.index(token)]])), 1)
            joint(ids, scores)
        want = textbook_prefix_log_prob(subword_posterior("the cat's hat"), len(SUBWORDS), subword_labels(text))[0]
        assert float(joint._step.state.ctc.prefix_log_prob[0]) == pytest.approx(want, abs=1e-4)


def test_scores_behind_a_mark_are_those_of_a_new_word() -> None:
    """Against plain enumeration: a token between words scores as the labels of a word with its space."""
    joint = subword_processor("the cat", weight=0.7, num_candidates=len(TOKENIZER), margin=float("inf"))
    scores = torch.randn(1, len(TOKENIZER), generator=torch.Generator().manual_seed(3))
    scores[0, WORDS.index("cat")] = 3.0
    llm, log_probs, blank = scores.log_softmax(1)[0], subword_posterior("the cat"), len(SUBWORDS)
    ids = torch.tensor([[START]])
    joint(ids, scores)
    for token in (" the", ","):
        ids = torch.cat((ids, torch.tensor([[WORDS.index(token)]])), 1)
        out = joint(ids, scores)[0]
    psi = textbook_prefix_log_prob(log_probs, blank, subword_labels("the"))[0]
    for token, text in (("cat", "the cat"), (" cat", "the cat"), ("at", "the at"), ("x", "the x")):
        gain = textbook_prefix_log_prob(log_probs, blank, subword_labels(text))[0] - psi
        want = 0.3 * float(llm[WORDS.index(token)]) + 0.7 * gain
        assert float(out[WORDS.index(token)]) == pytest.approx(want, abs=1e-4)
    assert float(out[WORDS.index(" 9")]) == -torch.inf
    few = subword_processor("the cat", weight=0.7, num_candidates=3)
    for width in range(1, ids.shape[1] + 1):
        proposed = few(ids[:, :width], scores)[0]
    is_proposed = proposed > -torch.inf
    assert is_proposed.sum() == 4 and torch.equal(proposed[is_proposed], out[is_proposed])  # EOS is no candidate
    assert is_proposed[WORDS.index("cat")]
    for silent in (",", "'"):  # between words an apostrophe is a quotation mark
        assert float(out[WORDS.index(silent)]) == pytest.approx(float(llm[WORDS.index(silent)]), abs=1e-5)


def test_the_last_token_moves_with_its_beam() -> None:
    """Beams change places after one of them ended in a mark."""
    scores = torch.randn(2, len(TOKENIZER), generator=torch.Generator().manual_seed(3))
    steps = [
        [[], []],
        [[" the"], [" cat"]],
        [[" the", ","], [" cat", "at"]],
        [[" cat", "at", "cat"], [" the", ",", "cat"]],
    ]
    found = []
    for parents in ("auto", "recompute"):
        joint = subword_processor("the cat", weight=0.7, parents=parents)
        for rows in steps:
            out = joint(torch.tensor([[START, *map(WORDS.index, row)] for row in rows]), scores)
        found.append((out, joint._step.state.ctc.prefix_log_prob))
    assert torch.equal(found[0][0], found[1][0])
    want = [
        textbook_prefix_log_prob(subword_posterior("the cat"), len(SUBWORDS), subword_labels(text))[0]
        for text in ("catatcat", "the cat")
    ]
    assert found[0][1].tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beams_that_end_in_marks_are_followed(num_beams: int) -> None:
    """The last token is a part of the state: matched parents, recomputed states and single utterances agree."""
    texts = ("the cat's hat", "at the hat")
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 8}
    options |= BEAM | {"num_beams": num_beams} if num_beams > 1 else {}
    comma = torch.nn.functional.one_hot(torch.tensor(WORDS.index(",")), len(TOKENIZER))
    model = tiny_whisper(False)
    features = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(1))

    def nbest(rows: slice, **how) -> list[list[int]]:
        joint = subword_processor(*texts[rows], weight=0.5, **how)
        prompt = torch.full((len(texts[rows]), 1), START)
        out = GenerationMixin.generate(
            model,
            features[rows],
            decoder_input_ids=prompt,
            logits_processor=[lambda ids, scores: scores + 4.0 * comma, joint],
            **options,
        )
        return [[token for token in row if token != EOS] for row in out.tolist()]

    together = nbest(slice(0, 2))
    assert together == nbest(slice(0, 2), parents="recompute")
    assert together == nbest(slice(0, 1)) + nbest(slice(1, 2))
    assert any(WORDS.index(",") in row[:-1] for row in together)


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

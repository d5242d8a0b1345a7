"""Joint LLM and CTC searches in plain Python, and the tiny models that they are compared with transformers on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from ctc_reference import textbook_prefix_log_prob
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
)

from hf_speechllm.ctc_prefix_score import CTCPrefixScorer
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor
from hf_speechllm.row_tracking import RowTrackingProcessor

VOCAB_SIZE = 14
NUM_LABELS = 10  # tokens 0 to 8 and the blank 9; tokens 9 to 13 have no label
BLANK = 9
EOS = 12
PAD = 3  # a label on purpose: padding after EOS must not count as speech
SUBSET = torch.tensor([11, 2, 7, 0, 5, 13, 4, 8, 1])  # a LabelUnits subset with the blank first
BEAM = {"do_sample": False, "length_penalty": 0.0, "early_stopping": "never"}


class HookedGPT2(GPT2LMHeadModel):
    """A model that tells the processor which beams survived."""

    processor: RowTrackingProcessor | None = None
    num_reorders = 0

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.reorder_cache(beam_idx)
        self.processor.reorder(beam_idx)
        self.num_reorders += 1
        return past_key_values


def tiny_gpt2(cls: type[PreTrainedModel] = GPT2LMHeadModel) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return cls(config).eval()


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def random_log_probs(*shape: int, seed: int = 0, peak: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * peak).log_softmax(-1)


@dataclass
class Joint:
    """The joint score of one utterance, from its definition: a new LLM pass and a new CTC recursion per hypothesis."""

    llm_logits: Callable[[tuple[int, ...]], torch.Tensor]  # generated tokens -> [V]
    log_probs: torch.Tensor  # [T, A]
    weight: float
    blank_id: int = BLANK
    labels: tuple[int, ...] | None = None  # token of each position of the label axis; None: the same ids
    eos: tuple[int, ...] = (EOS,)

    def step_scores(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """[V] scores of the tokens that may follow `tokens`."""
        axis = self.labels or tuple(range(self.log_probs.shape[1]))
        label_of = {token: label for label, token in enumerate(axis) if label != self.blank_id}
        llm = self.llm_logits(tokens).double().log_softmax(-1)
        prefix = tuple(label_of[token] for token in tokens)
        psi, exact = textbook_prefix_log_prob(self.log_probs, self.blank_id, prefix)
        scores = torch.full_like(llm, -math.inf)
        for token, label in label_of.items():
            gain = textbook_prefix_log_prob(self.log_probs, self.blank_id, (*prefix, label))[0] - psi
            scores[token] = (1 - self.weight) * llm[token] + self.weight * gain
        for token in self.eos:
            scores[token] = (1 - self.weight) * llm[token] + self.weight * (exact - psi)
        return scores

    def greedy(self, max_new_tokens: int) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        while len(tokens) < max_new_tokens and not set(tokens) & set(self.eos):
            tokens += (int(self.step_scores(tokens).argmax()),)
        return tokens

    def beam_search(self, num_beams: int, max_new_tokens: int) -> list[tuple[float, tuple[int, ...]]]:
        """The num_beams best (score, tokens), by transformers' rules without length penalty and early stopping."""
        running, finished = [(0.0, ())], []
        for length in range(1, max_new_tokens + 1):
            candidates = []
            for score, tokens in running:
                step = self.step_scores(tokens)
                candidates += [(score + float(step[c]), (*tokens, c)) for c in range(len(step)) if step[c] > -math.inf]
            candidates = sorted(candidates, reverse=True)[: (1 + len(self.eos)) * num_beams]
            has_ended = [tokens[-1] in self.eos or length == max_new_tokens for _, tokens in candidates]
            finished += [c for c, ended in zip(candidates[:num_beams], has_ended, strict=False) if ended]
            running = [c for c, ended in zip(candidates, has_ended, strict=True) if not ended][:num_beams]
        return sorted(finished, reverse=True)[:num_beams]


def llm_of(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """LLM logits after a prompt of token ids [W] or embeddings [W, H]."""

    @torch.no_grad()
    def logits(tokens: tuple[int, ...]) -> torch.Tensor:
        embed = model.get_input_embeddings()
        before = prompt if prompt.is_floating_point() else embed(prompt)
        rows = torch.cat((before, embed(torch.tensor(tokens, dtype=torch.long))))
        return model(inputs_embeds=rows[None]).logits[0, -1]

    return logits


def prompt_inputs(model: PreTrainedModel, kind: str, num_utterances: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind == "input_ids":
        ids = torch.randint(0, VOCAB_SIZE - 2, (num_utterances, 4), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    embeds = torch.randn(num_utterances, 4, 16, generator=generator)
    return {"inputs_embeds": embeds, "attention_mask": torch.ones(num_utterances, 4, dtype=torch.long)}


def run(model: PreTrainedModel, processor: CTCPrefixLogitsProcessor | None, inputs: dict, **options):
    """generate with scores; `.new_tokens` are the rows without prompt, cut after EOS."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD} | options
    processors = LogitsProcessorList([] if processor is None else [processor])
    out = model.generate(
        **inputs, logits_processor=processors, return_dict_in_generate=True, output_scores=True, **options
    )
    prompt_width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    out.new_tokens = [cut(row) for row in out.sequences[:, prompt_width:].tolist()]
    return out


def cut(row: list[int], eos: tuple[int, ...] = (EOS,)) -> tuple[int, ...]:
    ends = [position for position, token in enumerate(row) if token in eos]
    return tuple(row[: ends[0] + 1] if ends else row)


LENGTHS = torch.tensor([6, 4])


def two_utterances(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return random_log_probs(2, 6, NUM_LABELS, seed=11).to(dtype), LENGTHS


def two_utterance_processor(weight: float = 0.4, **options) -> CTCPrefixLogitsProcessor:
    return CTCPrefixLogitsProcessor(CTCPrefixScorer.from_log_probs(*two_utterances(), BLANK), weight, EOS, **options)


def references(model: PreTrainedModel, inputs: dict, weight: float = 0.4) -> list[Joint]:
    log_probs, lengths = two_utterances()
    prompts = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    rows = zip(prompts, log_probs, lengths, strict=True)
    return [Joint(llm_of(model, prompt), frames[:length], weight) for prompt, frames, length in rows]

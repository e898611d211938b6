"""The demo's base model, made from nothing: a byte-level tokenizer, a small Llama, and what both are taught."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphmoe_model.demo.task import LABELS, Question, fact, find_word, training_question

IGNORED = -100  # the label of tokens that no loss is computed on
FACT_TOKENS = 25


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text is a sequence of its tokens), trained on texts of the demo's world."""
    rng = random.Random(f"tokenizer {seed}")
    texts = [fact(rng) for _ in range(3000)]
    texts += [f"{draw.prompt} {label}\n" for draw in _some_questions(rng) for label in LABELS]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?[^\s:?.]+|[:?\n.]"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


def _some_questions(rng: random.Random) -> list[Question]:
    return [training_question(rng, set()) if i % 2 else find_word(rng) for i in range(1500)]


def make_base(tokenizer: PreTrainedTokenizerFast, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """A Llama of a few hundred thousand parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode_question(tokenizer: PreTrainedTokenizerFast, question: Question) -> dict[str, list[int]]:
    """The prompt and its right label; the loss is on the label alone."""
    ids = [tokenizer.bos_token_id, *tokenizer.encode(f"{question.prompt} {question.label}")]
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]}


def encode_facts(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, list[int]]:
    """Some lines of facts; the loss is on every token."""
    ids = [tokenizer.bos_token_id]
    while len(ids) < FACT_TOKENS:
        ids += tokenizer.encode(fact(rng))
    return {"input_ids": ids[:FACT_TOKENS], "labels": ids[:FACT_TOKENS]}


class BaseTexts(Dataset):
    """What the base model reads: item i is always the same text, mostly to find a word, some of facts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> None:
        self.tokenizer, self.size, self.seed = tokenizer, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        rng = random.Random(f"base {self.seed} {i}")
        if rng.random() < 0.85:
            return encode_question(self.tokenizer, find_word(rng))
        return encode_facts(self.tokenizer, rng)


class TrainingQuestions(Dataset):
    """What the adapters are trained on: item i is always the same question, and never a held-out one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, seed: int, held_out: list[Question]) -> None:
        self.tokenizer, self.size, self.seed = tokenizer, size, seed
        self.held_out = {question.key for question in held_out}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        rng = random.Random(f"questions {self.seed} {i}")
        return encode_question(self.tokenizer, training_question(rng, self.held_out))

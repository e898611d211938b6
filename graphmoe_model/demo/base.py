"""The demo's base model, made from nothing: a byte-level tokenizer, a small Llama, and what both are taught."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphmoe_model.demo.task import fact, find_word, training_questions
from graphmoe_model.questions import QuestionEncoder

FACT_TOKENS = 25


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text is a sequence of its tokens), trained on texts of the demo's world."""
    rng = random.Random(f"tokenizer {seed}")
    texts = [fact(rng) for _ in range(3000)]
    asked = [find_word(rng) for _ in range(750)] + training_questions(seed, 750, held_out=())
    texts += [f"{question.prompt} {label}\n" for question in asked for label in question.answers]
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


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


class BaseTexts(Dataset):
    """What the base model reads: item i is always the same text, mostly to find a word, some of facts.

    Of a question the loss is on its answer, of facts on every token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> None:
        self.encoder, self.size, self.seed = QuestionEncoder(tokenizer), size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        rng = random.Random(f"base {self.seed} {i}")
        return self.encoder.training_row(find_word(rng)) if rng.random() < 0.85 else self._facts(rng)

    def _facts(self, rng: random.Random) -> dict[str, list[int]]:
        tokenizer = self.encoder.tokenizer
        ids = [tokenizer.bos_token_id]
        while len(ids) < FACT_TOKENS:
            ids += tokenizer.encode(fact(rng), add_special_tokens=False)
        return {"input_ids": ids[:FACT_TOKENS], "labels": ids[:FACT_TOKENS]}

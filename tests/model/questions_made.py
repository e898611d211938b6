"""Made-up questions, three kinds of tokenizers made from nothing, and a scorer that uses nothing but raw logits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from graphmoe_model.questions import Question

WORDS = [
    "red",
    "blue",
    "cat",
    "dog",
    "saw",
    "river",
    "seven",
    "12",
    "stone",
    "grows",
    "falls",
    "warmer",
    "colder",
    "near",
    "far",
    "metal",
    "glass",
    "été",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def made_questions(count: int, seed: int = 0) -> list[Question]:
    """Questions with and without context, of 2 to 5 choices, some with given labels."""
    rng = random.Random(seed)

    def phrase(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    questions = []
    for i in range(count):
        choices = tuple(f"{phrase(rng.randint(1, 4))} {j}" for j in range(rng.randint(2, 5)))
        context = phrase(rng.randint(3, 25)) if i % 3 else ""
        asked = f"{phrase(rng.randint(3, 9))} {i}?"
        if i % 10 == 9:
            questions.append(Question(asked, ("yes", "no"), rng.randrange(2), context, labels=("true", "false")))
        else:
            questions.append(Question(asked, choices, rng.randrange(len(choices)), context))
    return questions


def _texts() -> list[str]:
    labels = [*"ABCDE", "true", "false"]
    return [f"{question.prompt} {label}" for question in made_questions(60, seed=1) for label in labels]


def byte_level(special_first: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 3's: byte-level BPE that puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, special_first)


def smollm2_like() -> PreTrainedTokenizerFast:
    """As SmolLM2's: byte-level BPE, each digit by itself, nothing before a text."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, special_first=False)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As SentencePiece's unigram models: pieces with scores, a space is part of the piece after it, and one is put
    before a text."""
    texts = " ".join(_texts())
    characters = sorted(set(texts) - {" "})
    pieces = {f"▁{word}" for word in texts.split()} | {
        "Question",
        "Answer",
        "▁Answer:",
        "\nA",
        "\nQuestion:",
        "er",
        "▁s",
    }
    scored = [(piece, -9.0) for piece in ["▁", *characters]]
    scored += [(piece, -4.0 - len(piece) / 10) for piece in sorted(pieces) if len(piece) > 1]
    tokenizer = Tokenizer(models.Unigram([*((special, 0.0) for special in SPECIAL), *scored], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _finished(tokenizer, special_first=True)


TOKENIZERS = {"byte-level": byte_level, "smollm2": smollm2_like, "sentencepiece": sentencepiece_like}


def _trained(tokenizer: Tokenizer, special_first: bool) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), how)
    return _finished(tokenizer, special_first)


def _finished(tokenizer: Tokenizer, special_first: bool) -> PreTrainedTokenizerFast:
    if special_first:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pad, bos, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def small_llama(tokenizer: PreTrainedTokenizerFast, positions: int = 512, layers: int = 1) -> PreTrainedModel:
    """A Llama, of one layer unless asked otherwise, with random weights, large enough that logits are far apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def label_logits(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, labels: Sequence[str]):
    """The logits of each label's token after a prompt, from one forward of that prompt alone."""
    ids = tokenizer(prompt)["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    tokens = []
    for label in labels:
        with_label = tokenizer(f"{prompt} {label}")["input_ids"]
        assert with_label[: len(ids)] == ids
        assert len(with_label) == len(ids) + 1
        tokens.append(with_label[-1])
    return logits[tokens]


@torch.no_grad()
def text_logprob(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> float:
    """The log-likelihood of a text after a prompt, from one forward of both."""
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {text}")["input_ids"]
    assert ids[: len(before)] == before
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids)))

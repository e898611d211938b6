"""A tiny base model in a folder, questions, and a recipe that trains on them in a second: for tests of `train`."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphmoe_model.questions import Question
from graphmoe_model.training import TrainingResult, train
from graphmoe_model.training.models import base_source, load_model
from graphmoe_tables.recipe import TrainingRecipe

WORDS = ["Question:", "Answer:", "hot", "cold", "warm", "or", "is", "it", "a.", "stone"]
SMALL: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 4,
    "num_experts": "4",
    "rounds": 2,
    "gru_hidden_scale": 0.25,
    "batch": 4,
    "accumulation": 2,
    "max_steps": 4,
    "learning_rate": 0.01,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}


def make_base(folder: Path, hidden_size: int = 16) -> Path:
    """Save a Llama of one layer with random weights, and a tokenizer of words and letters."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [f"{letter}." for letter in string.ascii_uppercase] + list(string.ascii_uppercase)
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk = special
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size // 2,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_questions(count: int, seed: int = 0) -> list[Question]:
    """Questions of lengths that differ, drawn from few words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return [
        Question(" ".join(WORDS[draw(2, len(WORDS))] for _ in range(draw(2, 9))), ("hot", "cold", "warm"), draw(0, 3))
        for _ in range(count)
    ]


def write_questions(file: Path, count: int, seed: int = 0) -> Path:
    """Write `make_questions` as JSONL."""
    lines = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in make_questions(count, seed)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def recipe(base: Path, output: Path, **changes: Any) -> TrainingRecipe:
    """A recipe of four steps of 8 rows."""
    return TrainingRecipe(**{"model": str(base), "data": ("made up",), "output": str(output), **SMALL, **changes})


def model_of(run: TrainingRecipe) -> PeftModel:
    """What a recipe trains, as it starts."""
    return load_model(run, base_source(run))


def trained(base: Path, folder: Path, held_out: int = 0, **changes: Any) -> TrainingResult:
    """Train on 24 questions for two steps, silently, unless ``changes`` say otherwise."""
    evaluation = make_questions(held_out, seed=1)
    settings = {"max_steps": 2, "save_steps": 1, **({"eval_data": ("held out",)} if held_out else {}), **changes}
    return train(recipe(base, folder, **settings), make_questions(24), evaluation, say=lambda line: None)

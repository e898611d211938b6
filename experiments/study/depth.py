"""The part of graded depth: a tiny Llama that knows single facts, and methods of one to four rounds."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.study.depth_world import (
    PEOPLE,
    RELATIONS,
    World,
    held_out_questions,
    make_world,
    split_chains,
    training_questions,
)
from experiments.study.settings import Base, Method, Part, Rate
from graphmoe_model.demo.base import make_base
from graphmoe_model.demo.pretraining import pretrain
from graphmoe_model.questions import Question, QuestionEncoder
from graphmoe_model.questions.encoding import IGNORED

BATCH, STEPS = 64, 100
# The rank of MixLoRA that has as many parameters as GraphMoE's experts of rank 8 and its GRUs have together.
RANK, MATCHED_RANK = 8, 9
EXPERTS: dict[str, Any] = {"num_experts": "4", "top_k": 2, "lora_dropout": 0.0}
PLAIN_RATES = tuple(Rate(rate / 1000) for rate in (10, 2, 3, 4, 5, 7, 14, 20, 28, 40, 56, 80))
GRU_RATES = tuple(Rate(rate / 1000, factor) for rate in (10, 5, 20, 40) for factor in (0.3, 1.0, 0.1))


class DepthMaterial:
    """A world for each seed, a base model that was taught its facts, and questions on its chains.

    Args:
        people, relations: of the world.
        depths: of the questions.
        held_out: questions of each depth in validation, and in test, at most.
        hidden, layers: of the base model.
        base_steps: of its training; `BATCH` texts each.
        training_count: how many training questions there are.
    """

    def __init__(
        self,
        *,
        people: int = 24,
        relations: int = 6,
        depths: tuple[int, ...] = (1, 2, 3),
        held_out: int = 200,
        hidden: int = 64,
        layers: int = 2,
        base_steps: int = 300,
        training_count: int = BATCH * STEPS,
    ) -> None:
        self.people, self.relations, self.depths, self.held_out = people, relations, depths, held_out
        self.hidden, self.layers, self.base_steps, self.training_count = hidden, layers, base_steps, training_count

    def settings(self) -> dict[str, Any]:
        """Return the sizes of all of it."""
        return dict(vars(self))

    def world(self, seed: int) -> World:
        """Return a seed's world."""
        return make_world(seed, self.people, self.relations)

    def base(self, seed: int, work: Path) -> Base:
        """Return a seed's base model; it is made when it is first asked for, and saved whole or not at all."""
        sizes = "-".join(str(size) for size in (self.people, self.relations, self.hidden, self.layers, self.base_steps))
        folder = work / f"base-{sizes}-seed{seed}"
        if not folder.exists():
            new = work / f".{folder.name}.new"
            shutil.rmtree(new, ignore_errors=True)
            tokenizer = make_tokenizer()
            torch.manual_seed(seed)
            model = make_base(tokenizer, self.hidden, self.layers)
            pretrain(
                model,
                tokenizer,
                single_facts(self.world(seed), tokenizer, BATCH * self.base_steps, seed),
                title=f"base model of seed {seed}",
                steps=self.base_steps,
                batch_size=BATCH,
                learning_rate=3e-3,
                seed=seed,
            )
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            os.replace(new, folder)
        return Base(str(folder))

    def questions(self, task: str, split: str, seed: int) -> Sequence[Question]:
        """Return a split of a seed's questions."""
        del task  # there is one
        world = self.world(seed)
        chains = split_chains(world, seed, self.depths, self.held_out)[split]
        if split == "train":
            return training_questions(world, chains, self.training_count, seed)
        return held_out_questions(world, chains, seed)

    def group(self, question: Question) -> str:
        """Return the depth of a question."""
        return question.place


def single_facts(world: World, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> list[dict[str, list[int]]]:
    """Return what the base model reads: each fact as a sentence and as a question of depth 1, the loss on its last
    name."""
    asked = training_questions(world, world.chains(1), size // 2, seed)
    encoder, rng = QuestionEncoder(tokenizer), random.Random(f"sentences {seed}")
    rows = [encoder.training_row(question) for question in asked]
    sentences = world.sentences()
    for _ in range(size - len(asked)):
        ids = tokenizer(rng.choice(sentences))["input_ids"]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]})
    return rows


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: names, relations and the words of a prompt, one token each."""
    pad, bos, eos, unknown = special = ("<pad>", "<s>", "</s>", "<unk>")
    words = [*special, "Question", "Answer", ":", "(", ")", "of", "is", "or", *PEOPLE, *RELATIONS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown, padding_side="left"
    )


def _mixlora(name: str, title: str, rank: int, step_seconds: float) -> Method:
    adapter = {**EXPERTS, "rounds": 1, "r": rank, "lora_alpha": 2 * rank}
    return Method(name, title, "mixlora", adapter, PLAIN_RATES, step_seconds)


def _graphmoe(rounds: int, step_seconds: float) -> Method:
    adapter = {**EXPERTS, "rounds": rounds, "r": RANK, "lora_alpha": 2 * RANK, "gru_hidden_scale": 0.25}
    title = f"GraphMoE(MixLoRA), T = {rounds}"
    return Method(f"graphmoe-t{rounds}", title, "graphmoe-mixlora", adapter, GRU_RATES, step_seconds)


PART = Part(
    name="depth",
    title="Questions of graded depth",
    tasks=("chains",),
    methods=(
        Method("untouched", "the base model", step_seconds=0.1),
        _mixlora("mixlora", "MixLoRA, T = 1", RANK, 0.12),
        _mixlora("mixlora-matched", "MixLoRA with the GRUs' parameters in rank", MATCHED_RANK, 0.13),
        _graphmoe(2, 0.25),
        _graphmoe(3, 0.3),
        _graphmoe(4, 0.4),
    ),
    references=("mixlora", "mixlora-matched"),
    seeds=tuple(range(10)),
    rate_seeds=3,
    recipe={
        **{"batch": BATCH, "accumulation": 1, "max_steps": STEPS, "scheduler": "linear", "warmup": 0.1},
        **{"max_length": 64, "logging_steps": 10, "save_steps": 50, "keep_checkpoints": 1},
    },
    material=DepthMaterial(),
    base_per_seed=True,
    evaluation_steps=10,
    start_seconds=15,
)

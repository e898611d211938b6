"""The demo's synthetic task: multiple-choice questions about a small made-up world, and texts about that world.

Nothing here is a benchmark. The base model reads facts ("cat is animal") and learns to find a given word in a list of
options. It never sees a question that needs a fact to be answered: that is what fine-tuning is for. A question has the
form of ARC's: four options, the answer is a letter.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LABELS = "ABCD"

KINDS = {
    "animal": ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "goat", "frog", "wolf"],
    "colour": ["red", "blue", "pink", "grey", "black", "white", "green", "brown"],
    "food": ["egg", "bun", "jam", "pie", "ham", "rice", "soup", "bread", "plum"],
    "tool": ["saw", "axe", "pin", "pen", "drill", "knife", "rope", "spade"],
}
PARITIES = {"even": [str(i) for i in range(10, 60, 2)], "odd": [str(i) for i in range(11, 60, 2)]}
LETTERS = {"vowel": list("aeiou"), "consonant": list("bcdfghjklmnpqrstvwxyz")}
OPPOSITES = [("hot", "cold"), ("big", "small"), ("wet", "dry"), ("old", "new"), ("fast", "slow"), ("up", "down")]
OPPOSITE = {word: other for a, b in OPPOSITES for word, other in ((a, b), (b, a))}

GROUPS = {**KINDS, **PARITIES, **LETTERS}
WORDS = [word for words in GROUPS.values() for word in words] + sorted(OPPOSITE) + sorted(GROUPS)


@dataclass(frozen=True)
class Question:
    """A question with four options, of which ``options[answer]`` is right."""

    skill: str
    asked: str
    options: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """What the model reads; a space and the right label follow."""
        lines = "".join(f"{label}. {option}\n" for label, option in zip(LABELS, self.options, strict=True))
        return f"Question: which is {self.asked}?\n{lines}Answer:"

    @property
    def label(self) -> str:
        """The right option's letter."""
        return LABELS[self.answer]

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """The question whatever the order of its options: training and held-out questions share none."""
        return self.asked, tuple(sorted(self.options))


def _ask(rng: random.Random, skill: str, asked: str, right: str, wrong: list[str]) -> Question:
    answer = rng.randrange(len(LABELS))
    return Question(skill, asked, (*wrong[:answer], right, *wrong[answer:]), answer)


def _kind(rng: random.Random) -> Question:
    kind, *others = rng.sample(sorted(KINDS), 4)
    wrong = [rng.choice(KINDS[other]) for other in others]
    return _ask(rng, "kind of thing", kind, rng.choice(KINDS[kind]), wrong)


def _either(rng: random.Random, skill: str, groups: dict[str, list[str]]) -> Question:
    asked, other = rng.sample(sorted(groups), 2)
    return _ask(rng, skill, asked, rng.choice(groups[asked]), rng.sample(groups[other], 3))


def _opposite(rng: random.Random) -> Question:
    word = rng.choice(sorted(OPPOSITE))
    wrong = rng.sample([w for w in sorted(OPPOSITE) if w not in (word, OPPOSITE[word])], 3)
    return _ask(rng, "opposite", f"opposite of {word}", OPPOSITE[word], wrong)


SKILLS = {
    "kind of thing": _kind,
    "even or odd": lambda rng: _either(rng, "even or odd", PARITIES),
    "vowel or consonant": lambda rng: _either(rng, "vowel or consonant", LETTERS),
    "opposite": _opposite,
}


def held_out_questions(seed: int, each: int) -> list[Question]:
    """``each`` different questions of every skill, drawn from ``seed``."""
    rng = random.Random(f"held out {seed}")
    found: dict[object, Question] = {}
    for skill, draw in SKILLS.items():
        wanted = len(found) + each
        while len(found) < wanted:
            question = draw(rng)
            found.setdefault((skill, question.key), question)
    return list(found.values())


def training_question(rng: random.Random, held_out: set[tuple[str, tuple[str, ...]]]) -> Question:
    """A question of a random skill whose key is not among the held-out ones."""
    while True:
        question = SKILLS[rng.choice(sorted(SKILLS))](rng)
        if question.key not in held_out:
            return question


def find_word(rng: random.Random) -> Question:
    """What the base model is taught besides facts: which option is this very word?"""
    right, *wrong = rng.sample(WORDS, 4)
    return _ask(rng, "find the word", right, right, wrong)


def fact(rng: random.Random) -> str:
    """One line of the base model's reading."""
    if rng.random() < 0.2:
        word = rng.choice(sorted(OPPOSITE))
        return f" {OPPOSITE[word]} is opposite of {word}\n"
    group = rng.choice(sorted(GROUPS))
    return f" {rng.choice(GROUPS[group])} is {group}\n"

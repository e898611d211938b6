"""The demo's synthetic task: multiple-choice questions about a small made-up world, and texts about that world.

Nothing here is a benchmark. The base model reads facts ("cat is animal") and learns to find a given word in a list of
options. It never sees a question that needs a fact to be answered: that is what fine-tuning is for. A question has the
form of ARC's: four choices, the answer is a letter.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from graphmoe_model.questions import Question, QuestionSet

CHOICES = 4

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


Key = tuple[str, tuple[str, ...]]


def key_of(question: Question) -> Key:
    """Return the question whatever the order of its choices: training and held-out questions share none."""
    return question.question, tuple(sorted(question.choices))


def _ask(rng: random.Random, asked: str, right: str, wrong: list[str]) -> Question:
    answer = rng.randrange(CHOICES)
    return Question(f"which is {asked}?", (*wrong[:answer], right, *wrong[answer:]), answer)


def _kind(rng: random.Random) -> Question:
    kind, *others = rng.sample(sorted(KINDS), 4)
    wrong = [rng.choice(KINDS[other]) for other in others]
    return _ask(rng, kind, rng.choice(KINDS[kind]), wrong)


def _either(rng: random.Random, groups: dict[str, list[str]]) -> Question:
    asked, other = rng.sample(sorted(groups), 2)
    return _ask(rng, asked, rng.choice(groups[asked]), rng.sample(groups[other], 3))


def _opposite(rng: random.Random) -> Question:
    word = rng.choice(sorted(OPPOSITE))
    wrong = rng.sample([w for w in sorted(OPPOSITE) if w not in (word, OPPOSITE[word])], 3)
    return _ask(rng, f"opposite of {word}", OPPOSITE[word], wrong)


SKILLS = {
    "kind of thing": _kind,
    "even or odd": lambda rng: _either(rng, PARITIES),
    "vowel or consonant": lambda rng: _either(rng, LETTERS),
    "opposite": _opposite,
}


def held_out_questions(seed: int, each: int) -> tuple[QuestionSet, ...]:
    """Return ``each`` different questions of every skill, drawn from ``seed``: one set per skill, called as it is."""
    rng = random.Random(f"held out {seed}")
    sets = []
    for skill, draw in SKILLS.items():
        found: dict[Key, Question] = {}
        while len(found) < each:
            question = draw(rng)
            found.setdefault(key_of(question), question)
        sets.append(QuestionSet(skill, "held out", f"{skill}, held out of the demo's task", tuple(found.values())))
    return tuple(sets)


def training_questions(seed: int, count: int, held_out: Iterable[QuestionSet]) -> list[Question]:
    """Return ``count`` questions, each of a random skill, with no key of a held-out one.

    The same seed gives the same questions: more of them begin with those that fewer are.
    """
    keys = {key_of(question) for own in held_out for question in own}
    return [_training_question(random.Random(f"questions {seed} {i}"), keys) for i in range(count)]


def _training_question(rng: random.Random, held_out: set[Key]) -> Question:
    while True:
        question = SKILLS[rng.choice(sorted(SKILLS))](rng)
        if key_of(question) not in held_out:
            return question


def find_word(rng: random.Random) -> Question:
    """What the base model is taught besides facts: which option is this very word?"""
    right, *wrong = rng.sample(WORDS, 4)
    return _ask(rng, right, right, wrong)


def fact(rng: random.Random) -> str:
    """One line of the base model's reading."""
    if rng.random() < 0.2:
        word = rng.choice(sorted(OPPOSITE))
        return f" {OPPOSITE[word]} is opposite of {word}\n"
    group = rng.choice(sorted(GROUPS))
    return f" {rng.choice(GROUPS[group])} is {group}\n"

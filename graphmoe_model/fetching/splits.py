"""Splits of our own: questions that are nearly the same stand in one of them, and every machine makes the same ones."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from graphmoe_model.questions import Question
from graphmoe_tables.tasks import OWN_SPLITS

# Of a hundred groups. The rest is for the test.
TRAIN, VALIDATION = 70, 10
ALIKE = (1, 2)  # the share of words, of those in either of two texts, that makes them alike when they are in both


def own_splits(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Return train, validation and test, in the questions' order.

    Questions whose contexts are alike (without a context, whose question and choices are) make a group, as do those
    that a chain of such pairs joins. The hash of a group's first text in alphabetical order says which split it is in,
    so that a split depends on no random number and no order.
    """
    texts = [question.context or " ".join([question.question, *question.choices]) for question in questions]
    splits: dict[str, list[Question]] = {name: [] for name in OWN_SPLITS}
    groups = groups_of_alike(texts)
    firsts: dict[int, str] = {}
    for text, group in zip(texts, groups, strict=True):
        firsts[group] = min(text, firsts.get(group, text))
    for question, group in zip(questions, groups, strict=True):
        splits[_split(firsts[group])].append(question)
    return splits


def groups_of_alike(texts: Sequence[str]) -> list[int]:
    """Return a group's number for each text: those that share `ALIKE` of their words, and chains of these.

    Texts are compared as sets of words (Jaccard); one without any is a word itself. Two sets that share half of their
    words share one of the rarest half of either, so that only texts with such a word in common are compared (prefix
    filter: Chaudhuri et al. 2006).
    """
    part, whole = ALIKE
    words = [frozenset(re.findall(r"\w+", text.lower())) or frozenset([text]) for text in texts]
    frequency = Counter(word for own in words for word in own)
    group = list(range(len(texts)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    having: dict[str, list[int]] = defaultdict(list)  # a rare word -> texts that have it among their rarest
    for i in sorted(range(len(texts)), key=lambda i: len(words[i])):
        own = words[i]
        rare = sorted(own, key=lambda word: (frequency[word], word))[: len(own) - -(-part * len(own) // whole) + 1]
        for j in {j for word in rare for j in having[word]}:
            if whole * len(words[j]) >= part * len(own):  # else it is too short to be alike
                shared = len(own & words[j])
                if whole * shared >= part * (len(own) + len(words[j]) - shared):
                    group[root(i)] = root(j)
        for word in rare:
            having[word].append(i)
    return [root(i) for i in range(len(texts))]


def _split(text: str) -> str:
    """Which split a group is in, by its first text."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if place < TRAIN else "validation" if place < TRAIN + VALIDATION else "test"

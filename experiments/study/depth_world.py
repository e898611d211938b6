"""A made-up world of people and relations, and questions that need one, two or three of its facts.

The people sit round a table, and every relation is a number of places: if the boss of ann sits three places on, so does
everybody's boss from them. A question of depth d names d relations and a person ("friend of boss of ann"), so d facts
lead to its answer one after the other. A model is taught the single facts beforehand; it is fine-tuned on some of the
chains and asked others. What it is never told is the table: relations that follow no rule would leave nothing to learn
from one chain about another.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe_model.questions import Question

PEOPLE = (
    *("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "joe", "kim", "leo"),
    *("mia", "ned", "ola", "pam", "quin", "ray", "sue", "tom", "una", "vic", "wes", "zoe"),
)
RELATIONS = ("boss", "friend", "rival", "tutor", "doctor", "cook", "guard", "tailor")
CHOICES = 4


@dataclass(frozen=True)
class Chain:
    """What a question asks for.

    Attributes:
        relations: in the order in which they are read: the last one is followed first.
        person: where the chain begins.
    """

    relations: tuple[str, ...]
    person: str

    @property
    def depth(self) -> int:
        """How many facts it needs."""
        return len(self.relations)

    @property
    def text(self) -> str:
        """As it is asked: ``friend of boss of ann``."""
        return " of ".join([*self.relations, self.person])


@dataclass(frozen=True)
class World:
    """Who is whose what.

    Attributes:
        people: the names.
        facts: relation -> person -> person: each relation leads as many places on from everybody.
    """

    people: tuple[str, ...]
    facts: dict[str, dict[str, str]]

    def follow(self, chain: Chain) -> str:
        """Return the person that a chain leads to."""
        person = chain.person
        for relation in reversed(chain.relations):
            person = self.facts[relation][person]
        return person

    def sentences(self) -> list[str]:
        """Return every fact as a sentence: ``boss of ann is bob``."""
        return [f"{relation} of {one} is {other}" for relation, own in self.facts.items() for one, other in own.items()]

    def chains(self, depth: int) -> list[Chain]:
        """Return all chains of a depth, in a fixed order."""
        orders = itertools.product(self.facts, repeat=depth)
        return [Chain(relations, person) for relations in orders for person in self.people]


def make_world(seed: int, people: int, relations: int) -> World:
    """Draw a world: who sits where, and how many places on each relation is, no two as many.

    Raises:
        ValueError: more people or relations than there are names for, fewer people than a question has choices, or
            more relations than there are other people.
    """
    if not CHOICES <= people <= len(PEOPLE) or not 1 <= relations <= min(len(RELATIONS), people - 1):
        raise ValueError(
            f"a world has {CHOICES} to {len(PEOPLE)} people and 1 to {len(RELATIONS)} relations, fewer than people, "
            f"got {people} and {relations}"
        )
    rng, names = random.Random(f"world {seed}"), PEOPLE[:people]
    seated = rng.sample(names, people)
    facts = {
        relation: {person: seated[(i + places) % people] for i, person in enumerate(seated)}
        for relation, places in zip(RELATIONS, rng.sample(range(1, people), relations), strict=False)
    }
    return World(names, facts)


def split_chains(world: World, seed: int, depths: Sequence[int], held_out: int) -> dict[str, list[Chain]]:
    """Part the chains into ``train``, ``validation`` and ``test``, which share none.

    Args:
        world: whose chains.
        seed: of the choice.
        depths: which depths there are.
        held_out: how many chains of each depth validation has, and test; a quarter of the depth's at most.

    Raises:
        ValueError: a depth has fewer than four chains.
    """
    found: dict[str, list[Chain]] = {"train": [], "validation": [], "test": []}
    for depth in depths:
        chains = world.chains(depth)
        if len(chains) < 4:
            raise ValueError(f"depth {depth} has {len(chains)} chains, too few to hold any out; make the world larger")
        random.Random(f"chains {seed} {depth}").shuffle(chains)
        own = min(held_out, len(chains) // 4)
        found["validation"] += chains[:own]
        found["test"] += chains[own : 2 * own]
        found["train"] += chains[2 * own :]
    return found


def ask(world: World, chain: Chain, place: int, rng: random.Random) -> Question:
    """Return the question for a chain: the right name at ``place`` among `CHOICES`, the others drawn.

    Names are answers of one token, so the model answers with the name itself.
    """
    right = world.follow(chain)
    names = rng.sample([name for name in world.people if name != right], CHOICES - 1)
    names.insert(place, right)
    return Question(f"{chain.text} is", tuple(names), place, labels=tuple(names), place=f"depth {chain.depth}")


def held_out_questions(world: World, chains: Sequence[Chain], seed: int) -> list[Question]:
    """Return one question for each chain; the right name stands equally often at each place of each depth."""
    rng = random.Random(f"held out {seed}")
    counted: dict[int, int] = {}
    questions = []
    for chain in chains:
        number = counted[chain.depth] = counted.get(chain.depth, -1) + 1
        questions.append(ask(world, chain, number % CHOICES, rng))
    return questions


def training_questions(world: World, chains: Sequence[Chain], count: int, seed: int) -> list[Question]:
    """Return ``count`` questions on the given chains: each depth equally often, and so each place of the right name.

    A chain is asked again, with other choices, when all of its depth were asked.
    """
    rng = random.Random(f"training {seed}")
    depths = sorted({chain.depth for chain in chains})
    of_depth = {depth: [chain for chain in chains if chain.depth == depth] for depth in depths}
    left: dict[int, list[Chain]] = {depth: [] for depth in depths}
    questions = []
    for i in range(count):
        depth = depths[i % len(depths)]
        if not left[depth]:
            left[depth] = rng.sample(of_depth[depth], len(of_depth[depth]))
        questions.append(ask(world, left[depth].pop(), i // len(depths) % CHOICES, rng))
    return questions

"""The loops of a listing, found by where its jumps lead: compilers lay code out in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# After these the next instruction does not follow, unless a predicate decides.
ENDS = ("BRA", "EXIT", "RET")


class Flowing(Protocol):
    """What is known of an instruction here."""

    @property
    def kind(self) -> str: ...

    @property
    def conditional(self) -> bool: ...


def natural_loops(code: Sequence[Flowing], jumps: dict[int, int]) -> list[frozenset[int]]:
    """Return each loop's instructions, by where loops begin and an outer one before those in it.

    A loop is a jump back to a block that all ways to the jump pass, with every block from which the jump is reached
    without that one (Aho et al., Compilers, section 9.6). An instruction that jumps to itself is a trap, and no loop.

    Args:
        code: the instructions.
        jumps: by the place of a jump, the instruction that it jumps to.
    """
    begins = sorted({0, *jumps.values(), *(at + 1 for at, each in enumerate(code) if each.kind in ENDS)} - {len(code)})
    blocks = dict(zip(begins, [*begins[1:], len(code)], strict=True))
    before = _ways_in(code, jumps, blocks)
    passed = _passed(begins, before)
    bodies: dict[int, set[int]] = {}
    for begin, end in blocks.items():
        head = jumps.get(end - 1)
        if head is None or head not in passed[begin] or head == end - 1:
            continue
        body, waiting = bodies.setdefault(head, {head}), [begin]
        while waiting:
            each = waiting.pop()
            if each not in body:
                body.add(each)
                waiting += before[each]
    found = {
        head: frozenset(at for begin in body for at in range(begin, blocks[begin])) for head, body in bodies.items()
    }
    return [found[head] for head in sorted(found, key=lambda head: (head, -len(found[head])))]


def _ways_in(code: Sequence[Flowing], jumps: dict[int, int], blocks: dict[int, int]) -> dict[int, set[int]]:
    """The blocks from which each block is entered, blocks by their first instruction."""
    before: dict[int, set[int]] = {begin: set() for begin in blocks}
    for begin, end in blocks.items():
        if end - 1 in jumps:
            before[jumps[end - 1]].add(begin)
        if end in blocks and (code[end - 1].kind not in ENDS or code[end - 1].conditional):
            before[end].add(begin)
    return before


def _passed(begins: Sequence[int], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """The blocks that every way to a block passes, itself included (its dominators)."""
    passed = {begin: set(begins) if begin else {0} for begin in begins}
    changed = True
    while changed:
        changed = False
        for begin in begins[1:]:
            ways = [passed[each] for each in before[begin]]
            found = {begin} | (set.intersection(*ways) if ways else set())
            changed, passed[begin] = changed or found != passed[begin], found
    return passed

"""What a listing of SASS says about loops: which loads of a pass are under way together, and where a program waits.

An instruction's control bits say which of six scoreboards it counts up when it is issued and which have to be at zero
first; copies to shared memory (LDGSTS, cp.async) are put into groups, and DEPBAR waits until so many are left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Of `nvdisasm -c -hex`: a label, or an instruction's address, its name and operands, and the upper half of its encoding
# on the line after it.
LABEL = re.compile(r"^(\.L_[\w.]+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
UPPER = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
JUMP = re.compile(r"`\((\.L_[\w.]+)\)")
GROUPS_LEFT = re.compile(r"SB0, 0x([0-9a-f]+)")
# Where the control bits begin, and in them the scoreboard that is counted up for a result and those that are waited for.
CONTROL, WRITTEN, WAITED = 64 - 23, 5, 11
NONE = 7
# After these the next instruction does not follow, unless a predicate decides.
ENDS = ("BRA", "EXIT", "RET")
# Triton issues loads at most num_stages - 1 passes ahead.
PASSES = 8


class Instruction(NamedTuple):
    """An instruction of the listing.

    Attributes:
        name: such as ``"LDG.E.128"``; operands: as they are printed.
        conditional: whether a predicate decides that it runs.
        board: the scoreboard that tells when its result is there, or None.
        waits: the scoreboards that it waits for.
    """

    name: str
    operands: str
    conditional: bool
    board: int | None
    waits: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Its name without what follows the first point."""
        return self.name.partition(".")[0]


class Loop(NamedTuple):
    """A loop, in a pass as it runs after the first ones, inner loops taken as if they ran once.

    Attributes:
        depth: 1 of one in no other.
        inner: how many loops are in it.
        instructions: all of a pass; ``products`` of them are matrix instructions.
        loads: reads of global memory, copies to shared memory among them.
        round_trips: how often the program waits for loads of the same pass.
        ahead: how many passes before it is waited for a pass's loads are issued, 0 where all are waited for in it.
        between: waits for loads, of whichever pass, that stand between the first and the last load.
    """

    depth: int
    inner: int
    instructions: int
    products: int
    loads: int
    round_trips: int
    ahead: int
    between: int


def loops(listing: str) -> list[Loop]:
    """The loops of a kernel by where they begin, an outer one before those in it."""
    code, jumps = _parse(listing)
    bodies = _natural_loops(code, jumps)
    return [
        _read([code[at] for at in sorted(body)], sum(body <= b for b in bodies), sum(b < body for b in bodies))
        for body in bodies
    ]


def main_loop(found: Sequence[Loop]) -> Loop | None:
    """The one that a kernel spends its time in: of the innermost loops the one with the most loads."""
    innermost = [loop for loop in found if not loop.inner and loop.loads]
    return max(innermost, key=lambda loop: (loop.loads, loop.instructions), default=None)


def instructions(listing: str) -> list[str]:
    """The names of all instructions."""
    return [each.name for each in _parse(listing)[0]]


def _parse(listing: str) -> tuple[list[Instruction], dict[int, int]]:
    """The instructions, and by the place of a jump the one that it jumps to."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = listing.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        label, found = LABEL.match(line), INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(code)
        elif found:
            upper = UPPER.match(after)
            control = int(upper[1], 16) >> CONTROL if upper else 0
            board = control >> WRITTEN & 7
            waits = tuple(b for b in range(6) if control >> WAITED + b & 1)
            code.append(Instruction(found[2], found[3], found[1] is not None, None if board == NONE else board, waits))
    targets = {at: JUMP.search(each.operands) for at, each in enumerate(code) if each.kind == "BRA"}
    return code, {at: labels[found[1]] for at, found in targets.items() if found and labels[found[1]] < len(code)}


def _natural_loops(code: Sequence[Instruction], jumps: dict[int, int]) -> list[frozenset[int]]:
    """Of every jump back to where all ways to it begin, the instructions from which it is reached without leaving."""
    begins = sorted({0, *jumps.values(), *(at + 1 for at, each in enumerate(code) if each.kind in ENDS)} - {len(code)})
    blocks = dict(zip(begins, [*begins[1:], len(code)], strict=True))  # first instruction and the one after the last
    before: dict[int, set[int]] = {begin: set() for begin in begins}
    for begin, end in blocks.items():
        last = code[end - 1]
        if end - 1 in jumps:
            before[jumps[end - 1]].add(begin)
        if end in blocks and (last.kind not in ENDS or last.conditional):
            before[end].add(begin)
    passed = {begin: set(begins) if begin else {0} for begin in begins}  # blocks on every way to a block
    changed = True
    while changed:
        changed = False
        for begin in begins[1:]:
            ways = [passed[each] for each in before[begin]]
            found = {begin} | (set.intersection(*ways) if ways else set())
            changed, passed[begin] = changed or found != passed[begin], found
    bodies: dict[int, set[int]] = {}
    for begin, end in blocks.items():
        head = jumps.get(end - 1)
        if head is None or head not in passed[begin] or (head == begin and end - begin == 1):  # the last: a trap
            continue
        body, waiting = bodies.setdefault(head, {head}), [begin]
        while waiting:
            each = waiting.pop()
            if each not in body:
                body.add(each)
                waiting += before[each]
    found = {head: frozenset(at for b in body for at in range(b, blocks[b])) for head, body in bodies.items()}
    return [found[head] for head in sorted(found, key=lambda head: (head, -len(found[head])))]


def _read(body: Sequence[Instruction], depth: int, inner: int) -> Loop:
    length = len(body)
    loads = [at for at, each in enumerate(body) if is_load(each)]
    # Of the last of so many passes that loads are issued in earlier ones as they are in all.
    waits = [(at % length, issued) for at, issued in _waits([*body] * PASSES) if at // length == PASSES - 1]
    ages = [PASSES - 1 - max(issued) // length for _, issued in waits]
    return Loop(
        depth=depth,
        inner=inner,
        instructions=length,
        products=sum("MMA" in each.kind for each in body),
        loads=len(loads),
        round_trips=ages.count(0),
        ahead=max(ages, default=0),
        between=sum(loads[0] < at < loads[-1] for at, _ in waits) if loads else 0,
    )


def is_load(instruction: Instruction) -> bool:
    """Whether it reads global memory."""
    return instruction.kind in ("LDG", "LDGSTS")


def _waits(code: Sequence[Instruction]) -> Iterator[tuple[int, list[int]]]:
    """Where the program waits for loads, and where those were issued."""
    boards: list[list[int]] = [[] for _ in range(6)]
    copies: list[int] = []  # in no group yet
    groups: list[list[int]] = []
    for at, each in enumerate(code):
        ready = [issued for board in each.waits for issued in boards[board]]
        for board in each.waits:
            boards[board] = []
        if each.kind == "DEPBAR" and (left := GROUPS_LEFT.search(each.operands)):
            done = len(groups) - int(left[1], 16)
            ready += [issued for group in groups[: max(done, 0)] for issued in group]
            groups = groups[max(done, 0) :]
        if ready:
            yield at, ready
        if each.kind == "LDGSTS":
            copies.append(at)
        elif each.kind == "LDGDEPBAR":
            groups.append(copies)
            copies = []
        elif each.kind == "LDG" and each.board is not None:
            boards[each.board].append(at)

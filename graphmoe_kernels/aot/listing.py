"""What a listing of SASS says of a kernel's loops: how long a pass takes, what it loads, and where it waits for that.

An instruction's control bits say how many cycles pass before the next one of its warp, which of six scoreboards tells
when its result is there, and which have to be ready before it. Copies to shared memory (LDGSTS, cp.async) are put into
groups, and DEPBAR waits until so many groups are left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from graphmoe_kernels.aot.flow import natural_loops

# Of `nvdisasm -c -hex`: a label, or an instruction's address, its name and operands, and the upper half of its encoding
# on the line after it.
LABEL = re.compile(r"^(\.L_[\w.]+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
UPPER = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
JUMP = re.compile(r"`\((\.L_[\w.]+)\)")
GROUPS_LEFT = re.compile(r"SB0, 0x([0-9a-f]+)")
# Where the control bits begin in the upper half, and in them the scoreboards of the result, of the operands, and those
# that are waited for; the lowest four are the cycles.
CONTROL, RESULT, READ, WAITED = 41, 5, 8, 11
NO_BOARD = 7
# Cycles until a result is there, of what does not say so by its own count of cycles, for one warp without others;
# roughly the same from sm_80 to sm_100. Loads of global memory are left open. Operands are read, a barrier is passed by
# warps that come about together, and a warp group's product is done, in so many.
RESULT_CYCLES = {"LDS": 30, "LDSM": 33, "MUFU": 22, "SHFL": 24, "HMMA": 33, "ATOMS": 60, "ATOMG": 700}
OTHER_CYCLES, READ_CYCLES, BARRIER_CYCLES, GROUP_PRODUCT_CYCLES = 25, 15, 30, 100
# A multiprocessor's quarter issues an instruction of a warp in a cycle; of these it takes so many.
ISSUE_CYCLES = {"MUFU": 8, "HMMA": 8, "HGMMA": 32}
# Triton issues loads at most num_stages - 1 passes ahead.
PASSES = 8


class Instruction(NamedTuple):
    """An instruction of the listing.

    Attributes:
        name: such as ``"LDG.E.128"``; operands: as they are printed.
        conditional: whether a predicate decides that it runs.
        cycles: until the next instruction of its warp.
        result, read: the scoreboards of its result and of its operands, or None.
        waits: the scoreboards that it waits for.
    """

    name: str
    operands: str
    conditional: bool
    cycles: int
    result: int | None
    read: int | None
    waits: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Its name without what follows the first point."""
        return self.name.partition(".")[0]


class Loop(NamedTuple):
    """A loop, in a pass as it runs after the first ones; a loop in it counts as one pass of its own.

    Attributes:
        depth: 1 of a loop in no other; 0 of what is in no loop at all.
        inner: how many loops are in it.
        instructions: of a pass.
        issue: cycles of its busiest pipe for one warp.
        loads: reads of global memory, copies to shared memory among them.
        spills: reads and writes of local memory, where registers are spilled to (LDL, STL).
        between: waits for loads, of whichever pass, between the first and the last load: "waits between the loads of a
            step".
        cycles: of a pass of one warp if loads took no time.
        waits: of every wait for loads, its cycle and that in which the last of those loads was issued, by the same
            count: one of an earlier pass is negative.
    """

    depth: int
    inner: int
    instructions: int
    issue: int
    loads: int
    spills: int
    between: int
    cycles: int
    waits: tuple[tuple[int, int], ...]


def parse(listing: str) -> tuple[list[Instruction], dict[int, int]]:
    """Read the instructions, and by the place of a jump the one that it jumps to."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = listing.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        label, found, upper = LABEL.match(line), INSTRUCTION.match(line), UPPER.match(after)
        if label:
            labels[label[1]] = len(code)
        elif found and upper:
            bits = int(upper[1], 16) >> CONTROL
            result, read = (None if board == NO_BOARD else board for board in (bits >> RESULT & 7, bits >> READ & 7))
            waits = tuple(board for board in range(6) if bits >> WAITED + board & 1)
            name, operands = found[2], found[3]
            if name == "CALL.REL.NOINC" and JUMP.search(operands):  # from which nothing returns
                name = "BRA"
            # BRA.DIV and BRA.U have their condition among the operands.
            conditional = found[1] is not None or (name.startswith("BRA") and "," in operands)
            code.append(Instruction(name, operands, conditional, max(bits & 15, 1), result, read, waits))
    targets = {at: JUMP.search(each.operands) for at, each in enumerate(code) if each.kind == "BRA"}
    jumps = {at: labels[found[1]] for at, found in targets.items() if found}
    return code, {at: target for at, target in jumps.items() if target < len(code)}


def loops(code: Sequence[Instruction], jumps: dict[int, int]) -> list[Loop]:
    """What is in no loop, then the loops by where they begin, an outer one before those in it."""
    bodies = natural_loops(code, jumps)
    alone = [each for at, each in enumerate(code) if not any(at in body for body in bodies)]
    found = [_read(alone, 0, len(bodies), passes=1)]
    for body in bodies:
        depth, inner = sum(body <= other for other in bodies), sum(other < body for other in bodies)
        found.append(_read([code[at] for at in sorted(body)], depth, inner, PASSES))
    return found


def main_loop(found: Sequence[Loop]) -> Loop | None:
    """The loop that a kernel spends its time in: of the innermost ones the one with the most loads."""
    innermost = [loop for loop in found if loop.depth and not loop.inner and loop.loads]
    return max(innermost, key=lambda loop: (loop.loads, loop.instructions), default=None)


def is_load(instruction: Instruction) -> bool:
    """Whether it reads global memory."""
    return instruction.kind in ("LDG", "LDGSTS")


def _read(body: Sequence[Instruction], depth: int, inner: int, passes: int) -> Loop:
    clock = _Clock()
    for _ in range(passes):
        begin, places = clock.now, clock.run(body)
    loads = [at for at, each in enumerate(body) if is_load(each)]
    busy = {kind: count * sum(each.kind == kind for each in body) for kind, count in ISSUE_CYCLES.items()}
    return Loop(
        depth=depth,
        inner=inner,
        instructions=len(body),
        issue=max(len(body), *busy.values()),
        loads=len(loads),
        spills=sum(each.kind in ("LDL", "STL") for each in body),
        between=sum(loads[0] < at < loads[-1] for at, _, _ in places) if loads else 0,
        cycles=clock.now - begin,
        waits=tuple((now - begin, issued - begin) for _, now, issued in places),
    )


class _Clock:
    """One warp's cycles, with global memory that answers at once."""

    def __init__(self) -> None:
        self.now = 0
        self._ready = [0] * 6  # the cycle of each scoreboard
        self._issued: list[int | None] = [None] * 6  # that of the last load on it
        self._copy: int | None = None  # the last copy in no group yet
        self._groups: list[int | None] = []
        self._product = 0

    def run(self, body: Sequence[Instruction]) -> list[tuple[int, int, int]]:
        """Run a pass; every wait for loads: its place, its cycle, and that in which the last of them was issued."""
        found = []
        for at, each in enumerate(body):
            issued = [cycle for cycle in self._waited(each) if cycle is not None]
            if issued:
                found.append((at, self.now, max(issued)))
            self._issue(each)
        return found

    def _waited(self, each: Instruction) -> list[int | None]:
        found: list[int | None] = []
        for board in each.waits:
            self.now = max(self.now, self._ready[board])
            found.append(self._issued[board])
            self._issued[board] = None
        if each.kind == "DEPBAR" and (left := GROUPS_LEFT.search(each.operands)):
            done = max(len(self._groups) - int(left[1], 16), 0)
            found += self._groups[:done]
            self._groups = self._groups[done:]
        if each.name.startswith("WARPGROUP.DEPBAR"):
            self.now = max(self.now, self._product)
        return found

    def _issue(self, each: Instruction) -> None:
        if each.kind == "BAR":
            self.now += BARRIER_CYCLES
        elif each.kind == "HGMMA":
            self._product = max(self._product, self.now) + GROUP_PRODUCT_CYCLES
        elif each.kind == "LDGSTS":
            self._copy = self.now
        elif each.kind == "LDGDEPBAR":
            self._groups.append(self._copy)
            self._copy = None
        if each.result is not None:
            taken = 0 if is_load(each) else RESULT_CYCLES.get(each.kind, OTHER_CYCLES)
            self._ready[each.result] = max(self._ready[each.result], self.now + taken)
            if each.kind == "LDG":
                self._issued[each.result] = self.now
        if each.read is not None:
            self._ready[each.read] = max(self._ready[each.read], self.now + READ_CYCLES)
        self.now += each.cycles

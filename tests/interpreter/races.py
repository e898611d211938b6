"""No program stores where another program stores or loads, unless atomics order the two.

The stock interpreter runs the programs one after another, so that they never disturb each other; on a GPU they run at
once, in any order, and the result of such a kernel changes from run to run.

What is legal is a message: program A stores, meets a barrier (`tl.debug_barrier()`) and does an atomic operation; then
program B does an atomic operation on the same address, and after it loads or stores what A stored. This is how the last
arriver of a split reduction finds the partial results of all others. The barrier belongs to it: one thread does a
scalar atomic, and nothing else makes it wait for the stores of the other threads (the compiled code has none). Atomics
with ``sem="relaxed"`` or ``scope="cta"`` order nothing between programs. A program that loads what it stored itself
needs the barrier too: the thread that loads an element need not be the one that stored it.

Each element of a launch's tensors remembers who stored it last and who loaded it, as the program's turn and the number
of barriers that it had passed; each program knows, by its atomics, up to which barrier it sees the others.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from tests.interpreter.memory import Region

# An access is one number: the program's turn (from 1), and below it the barriers that the program had passed.
BARRIER_BITS = 20
NOBODY, SEVERAL = 0, -1


class RaceError(Exception):
    """Two programs touch one address, one of them stores, and no atomics order them."""


class _Shadow:
    """Who touched the elements of a stretch of memory: one or more regions that overlap."""

    def __init__(self, first: Region) -> None:
        self.start, self.end, self.unit, self.names = first.start, first.end, first.itemsize, {first.name}

    def extend(self, region: Region) -> None:
        self.end, self.unit = max(self.end, region.end), min(self.unit, region.itemsize)
        self.names.add(region.name)

    @property
    def name(self) -> str:
        """The arguments whose memory this is."""
        return " / ".join(sorted(self.names))

    def allocate(self) -> None:
        size = -(-(self.end - self.start) // self.unit)
        self.stored = np.full(size, NOBODY, dtype=np.int64)
        self.loaded = np.full(size, NOBODY, dtype=np.int64)

    def elements(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        index = (addresses - np.uint64(self.start)).astype(np.int64) // self.unit
        if itemsize > self.unit:
            index = (index[:, None] + np.arange(itemsize // self.unit)).ravel()
        return index


class Races:
    """The accesses of one launch, checked as they come."""

    def __init__(self, regions: list[Region]) -> None:
        self.shadows: list[_Shadow] = []
        for region in regions:  # by their starts
            if self.shadows and region.start < self.shadows[-1].end:
                self.shadows[-1].extend(region)
            else:
                self.shadows.append(_Shadow(region))
        for shadow in self.shadows:
            shadow.allocate()
        self.programs: list[tuple[int, ...]] = [()]
        self.barriers = 0
        self.seen: dict[int, int] = {}  # turn of a program -> its barriers that this program knows to have been passed
        self.published: defaultdict[int, dict[int, int]] = defaultdict(dict)  # the same, by the address of an atomic

    def begin_program(self, program: tuple[int, ...]) -> None:
        """The next program's turn."""
        self.programs.append(program)
        self.barriers, self.seen = 0, {}

    def barrier(self) -> None:
        """What the program's threads did so far comes before what any of them does from now on."""
        self.barriers += 1

    def atomic(self, addresses: np.ndarray, acquires: bool, releases: bool) -> None:
        """The program learns what atomics on these addresses published, and publishes what it knows."""
        for address in addresses.tolist():
            published = self.published[address]
            if acquires:
                _learn(self.seen, published)
            if releases:
                _learn(published, {**self.seen, self._turn: self.barriers})

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        """`RaceError` if a program stored one of the elements and nothing orders that before this load."""
        for shadow, index in self._locate(addresses, itemsize):
            stored = shadow.stored[index]
            self._judge(stored, "loads", "stored", shadow)
            if (stored == self._stamp).any():
                raise RaceError(
                    f"program {self.programs[-1]} loads elements of {shadow.name} that it stored with no "
                    "tl.debug_barrier() since: the thread that loads may be another than the one that stored"
                )
            before = shadow.loaded[index]
            mine = (before == NOBODY) | (before >> BARRIER_BITS == self._turn)
            shadow.loaded[index] = np.where(mine, self._stamp, SEVERAL)

    def store(self, addresses: np.ndarray, values: np.ndarray, itemsize: int) -> None:
        """`RaceError` if another program stored or loaded one of the elements, or if two lanes disagree on its value.

        A store where several programs have loaded is always a race: which of them are ordered is not remembered.
        """
        self._check_lanes(addresses, values)
        for shadow, index in self._locate(addresses, itemsize):
            self._judge(shadow.stored[index], "stores", "stored", shadow)
            self._judge(shadow.loaded[index], "stores", "loaded", shadow)
            shadow.stored[index] = self._stamp

    @property
    def _turn(self) -> int:
        return len(self.programs) - 1

    @property
    def _stamp(self) -> int:
        return self._turn << BARRIER_BITS | self.barriers

    def _locate(self, addresses: np.ndarray, itemsize: int):
        low, high = int(addresses.min()), int(addresses.max())
        for shadow in self.shadows:
            if shadow.start <= low and high + itemsize <= shadow.end:
                yield shadow, shadow.elements(addresses, itemsize)
            elif low < shadow.end and high >= shadow.start:
                inside = (addresses >= np.uint64(shadow.start)) & (addresses <= np.uint64(shadow.end - itemsize))
                yield shadow, shadow.elements(addresses[inside], itemsize)

    def _judge(self, earlier: np.ndarray, does: str, did: str, shadow: _Shadow) -> None:
        foreign = earlier[(earlier != NOBODY) & (earlier >> BARRIER_BITS != self._turn)]
        for stamp in np.unique(foreign).tolist():
            turn, barriers = stamp >> BARRIER_BITS, stamp & ((1 << BARRIER_BITS) - 1)
            if stamp == SEVERAL or self.seen.get(turn, 0) <= barriers:
                other = "several programs" if stamp == SEVERAL else f"program {self.programs[turn]}"
                count = int((foreign == stamp).sum())
                raise RaceError(
                    f"program {self.programs[-1]} {does} {count} elements of {shadow.name} that {other} {did}, "
                    "and nothing orders the two (legal is: store, tl.debug_barrier(), atomic there; atomic on the same "
                    "address, then the access here)"
                )

    def _check_lanes(self, addresses: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(addresses, kind="stable")
        ordered = addresses[order]
        same = ordered[1:] == ordered[:-1]
        if same.any():
            bits = values[order].view(f"u{values.itemsize}")
            if (bits[1:] != bits[:-1])[same].any():
                raise RaceError(f"two lanes of program {self.programs[-1]} store different values to one address")


def _learn(known: dict[int, int], news: dict[int, int]) -> None:
    for turn, barriers in news.items():
        known[turn] = max(known.get(turn, 0), barriers)

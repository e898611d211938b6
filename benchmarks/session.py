"""A run of `pytest benchmarks`: cases measured when they are first asked for, and the document of what was found."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from typing import Any

from benchmarks.cases import Case, Contender
from benchmarks.checks import in_a_line
from benchmarks.conditions import conditions
from benchmarks.document import Document
from benchmarks.layers import Layers
from benchmarks.measure import Found, Workplace, measure
from benchmarks.options import Chosen
from benchmarks.sizes import TINY
from benchmarks.table import rank
from benchmarks.work import measure_limits

# Words of errors after which a device takes no more work: another process has to go on.
LOST = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


class NotMeasured(Exception):
    """A case that this process passes over: no time is left for it, or an earlier process has begun it."""


class DeviceLost(Exception):
    """The device takes no more work in this process."""


class Session:
    """What a run measures, case by case.

    Args:
        chosen: the device, how long a case is timed, and how long the run may take.
        document: what is written; one that another process has begun is gone on with.
    """

    def __init__(self, chosen: Chosen, document: Document) -> None:
        self.chosen, self.document = chosen, document
        self.selected: dict[str, list[Contender]] = {}
        self._place: Workplace | None = None
        self._found: dict[str, Found | Exception] = {}

    @property
    def content(self) -> dict[str, Any]:
        """The document as it is."""
        return self.document.content

    def select(self, contenders: Iterable[tuple[Case, Contender]]) -> None:
        """Measure these alone."""
        self.selected = {}
        for case, contender in contenders:
            self.selected.setdefault(case.name, []).append(contender)

    def place(self) -> Workplace:
        """The device with its limits, which are measured first."""
        if self._place is None:
            chosen = self.chosen
            if not self.content["conditions"]:
                self.content["conditions"] = conditions(chosen.device, chosen.commit) | {"left out": chosen.left_out}
            if not self.content["limits"]:
                self.document.begin("limits")
                start, small = time.perf_counter(), chosen.models == [TINY]
                self.content["limits"] = measure_limits(chosen.device, small, chosen.seconds / 2, chosen.dtype)
                self.document.end("limits", "done", time.perf_counter() - start)
            self._place = Workplace(Layers(chosen.device), self.content, chosen.seconds)
        return self._place

    def __getitem__(self, case: Case) -> Found:
        """What was found of a case; it is measured now if it was not.

        Raises:
            NotMeasured: there is no time for it, or another process has begun it.
            DeviceLost: the device takes no more work; what was found until now is saved.
        """
        if case.name not in self._found:
            self._found[case.name] = self._measure(case)
        known = self._found[case.name]
        if isinstance(known, Exception):
            raise known
        return known

    def _measure(self, case: Case) -> Found | Exception:
        """An error is told to every contender of the case, which is not tried anew for each."""
        if self.document.attempted(case.name):
            return NotMeasured("an earlier process has measured it, or ended in it")
        end, needed = self.chosen.end, rank(case, self.chosen.plan, self.chosen.dtype)[1]
        if end is not None and (left := end - time.monotonic()) < needed:
            note = f"{left:.0f} s left, it may take {needed:.0f}"
            self.document.end(case.name, "skipped", note=note)
            return NotMeasured(note)
        place, device = self.place(), self.chosen.device
        self.document.begin(case.name)
        start = time.perf_counter()
        try:
            with device.memory_bounded():
                found = measure(case._replace(contenders=tuple(self.selected.get(case.name, case.contenders))), place)
            device.synchronize()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            note = f"{in_a_line(error)} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
            self.document.end(case.name, "failed", time.perf_counter() - start, note)
            if any(word in str(error) for word in LOST):
                return DeviceLost(str(error).splitlines()[0])
            device.release()
            return error
        for section in ("checks", "rows", "kernels", "profiles"):
            self.content[section] += getattr(found, section)
        device.release()  # graphs keep memory of their own until they are collected
        self.document.end(case.name, "done", time.perf_counter() - start)
        return found

"""A run of `pytest benchmarks`: cases measured when they are first asked for, and the document of what was found."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Contender
from benchmarks.conditions import conditions, file_name
from benchmarks.document import RESULTS, Document
from benchmarks.limits import LIMIT_SIZES, as_limits, measure_limits
from benchmarks.measure import Found, measure
from benchmarks.memory import TooLarge
from benchmarks.options import Chosen
from benchmarks.profiles import profiles
from benchmarks.sizes import Model
from benchmarks.workplace import Workplace


class Session:
    """What a run measures, case by case.

    Args:
        chosen: the device, and how long a case is timed.
    """

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.path: Path | None = None
        self.document = Document(None)
        self.selected: dict[str, list[Contender]] = {}
        self._workplace: Workplace | None = None
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

    def workplace(self) -> Workplace:
        """The device with its limits, which are measured first."""
        if self._workplace is None:
            device, dtype = self.chosen.device, self.chosen.dtype
            self.content["conditions"] = conditions(device)
            copy_bytes, matrix = LIMIT_SIZES[device.kind]
            found = measure_limits(device, copy_bytes, matrix, self.chosen.seconds / 2, dtype)
            self.content["limits"] = found
            processors = self.content["conditions"]["device"].get("multiprocessors", 1)
            self._workplace = Workplace(device, as_limits(found, processors), self.chosen.seconds, self.chosen.plan)
        return self._workplace

    def __getitem__(self, case: Case) -> Found:
        """What was found of a case; it is measured now if it was not.

        Raises:
            TooLarge: it does not fit in memory.
        """
        if case.name not in self._found:
            workplace = self.workplace()
            self.document.begin(case.name)
            start = time.perf_counter()
            selected = case._replace(contenders=tuple(self.selected.get(case.name, case.contenders)))
            try:
                found = measure(selected, workplace)
            except Exception as error:  # told to every contender of the case, and not tried anew for each
                self._found[case.name] = error
                state = "skipped" if isinstance(error, TooLarge) else "failed"
                self.document.end(case.name, state, time.perf_counter() - start, str(error))
            else:
                self._found[case.name] = found
                self.content["checks"] += found.checks
                self.content["rows"] += found.rows
                self.document.end(case.name, "done", time.perf_counter() - start)
        known = self._found[case.name]
        if isinstance(known, Exception):
            raise known
        return known

    def profile(self, model: Model) -> list[dict[str, Any]]:
        """Where the time of a small whole model goes."""
        self.workplace()
        step = f"profile, {model.name}"
        start = time.perf_counter()
        self.document.begin(step)
        found = profiles(model, self.chosen.device, self.chosen.dtype, self.chosen.plan, self.chosen.providers)
        self.content["profiles"] += found
        self.document.end(step, "done", time.perf_counter() - start)
        return found

    def save(self) -> None:
        """Write what was found to the results, if anything was."""
        if self.content["rows"] or self.content["profiles"]:
            self.path = RESULTS / file_name(self.content["conditions"])
            self.document.path = self.path
            self.document.save()

"""A contract of `lint-imports` that import-linter does not bring: no import circle between any two modules.

Its `acyclic_siblings` compares packages with their neighbours. A module that imports the package that it lies in, whose
``__init__`` imports the module, is a circle too, and shows in none of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output


class NoCircles(Contract):
    """No module imports itself by way of others, also inside functions and for type checkers alone."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look for circles in the graph of all modules, cutting each where it closes to find the next."""
        imported = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
        circles = []
        while (circle := find_circle(imported)) is not None:
            circles.append(circle)
            imported[circle[-2]].remove(circle[-1])
        return ContractCheck(kept=not circles, metadata={"circles": circles})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print the circles, each module importing the next."""
        for circle in check.metadata["circles"]:
            output.print_error(" imports\n".join(circle))
            output.new_line()


def find_circle(imported: Mapping[str, Set[str]]) -> list[str] | None:
    """Return a circle of imports, whose first module stands at its end again, or None."""
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1][::-1]
        return circle
    return None

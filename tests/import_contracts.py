"""A contract of `lint-imports` that import-linter does not bring: no import circle between any two modules.

Its `acyclic_siblings` compares packages with their neighbours. A module that imports the package that it lies in, whose
``__init__`` imports the module, is a circle too, and shows in none of these.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output


class NoCircles(Contract):
    """No module imports itself by way of others, also inside functions and for type checkers alone."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look for one circle in the graph of all modules."""
        imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
        try:
            TopologicalSorter(imported).prepare()
        except CycleError as error:
            return ContractCheck(kept=False, metadata={"circle": error.args[1][::-1]})
        return ContractCheck(kept=True)

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print the circle, each module importing the next."""
        output.print_error(" imports\n".join(check.metadata["circle"]))

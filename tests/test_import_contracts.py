"""The contract that no two modules import each other, which `make check` holds the packages to."""

from __future__ import annotations

import pytest
from grimp import ImportGraph

from tests.import_contracts import NoCircles

CIRCLES = {
    "two modules": [("p.a", "p.b"), ("p.b", "p.a")],
    "three": [("p.a", "p.b"), ("p.b", "q.c"), ("q.c", "p.a")],
    "a package and what is in it": [("p", "p.a"), ("p.a", "p")],
}


def kept(imports: list[tuple[str, str]]) -> bool:
    graph = ImportGraph()
    for module in {name for pair in imports for name in pair}:
        graph.add_module(module)
    for importer, imported in imports:
        graph.add_import(importer=importer, imported=imported)
    contract = NoCircles(name="", session_options={}, contract_options={})
    return contract.check(graph, verbose=False).kept


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_is_found(case: str) -> None:
    """And is none once its last import is gone."""
    assert not kept(CIRCLES[case])
    assert kept(CIRCLES[case][:-1])

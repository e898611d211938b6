"""docs/methods.md names what the tables have: a method or preset that is added is described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphmoe_tables.methods import METHODS, PRESETS

PAGE = (Path(__file__).parents[2] / "docs/methods.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_the_page_describes_every_method(name: str) -> None:
    """By its name in a configuration and by both of its names in the literature."""
    method = METHODS[name]
    assert f'"{name}"' in PAGE
    assert re.search(rf"\b{method.title}\b", PAGE)
    assert re.search(rf"\b{method.dora_title}\b", PAGE)


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_has_every_preset_with_its_rank(name: str) -> None:
    """In a row of its table; of a base method with its rank."""
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line]
    assert len(rows) == 1
    if not name.startswith("graphmoe-"):
        assert f"| r {PRESETS[name]['r']}," in rows[0]

"""docs/models.md names every layout of gated MLPs that is known, so that who has such a model finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphmoe_model.layers.mlp_layouts import LAYOUTS
from tests.model.gated_mlps import SUPPORTED, build

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_page_has_every_layout(layout) -> None:
    """All of its linears in one line."""
    assert [line for line in PAGE.splitlines() if all(f"`{name}`" in line for name in layout.linears)]


def test_every_layout_has_an_example() -> None:
    """Of Transformers' own classes, on which the other tests run."""
    found = [next((o for o in LAYOUTS if o.fits(build(name))), None) for name in SUPPORTED]
    assert set(found) == set(LAYOUTS)

"""What the site makes of the sources by itself; `make docs` builds it, in an environment that has no PyTorch."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

from graphmoe_model import GraphMoEConfig
from graphmoe_tables.recipe import TrainingRecipe

DOCS = Path(__file__).parents[1] / "docs"


def loaded(name: str) -> ModuleType:
    """A module of docs, as the hooks of the site import it."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_have_every_field():
    """The page of a class whose fields have no docstrings listed none of them."""
    fields = loaded("fields")
    own = [field for field in dataclasses.fields(GraphMoEConfig) if field.name in GraphMoEConfig.__annotations__]
    expected = [(field.name, f"`{field.default!r}`", field.metadata["help"]) for field in own]
    assert sorted((row.name, row.default, row.help) for row in fields.config_rows()) == sorted(expected)
    assert [row.name for row in fields.recipe_rows()] == [field.name for field in dataclasses.fields(TrainingRecipe)]
    page = fields.with_fields((DOCS / "api" / "model.md").read_text())
    (line,) = (line for line in page.splitlines() if "gru_hidden_scale" in line)
    assert (
        line == "| `gru_hidden_scale` | `float` | `0.1` | GRU width as a share of the hidden size: G = int(scale * D) |"
    )
    page = fields.with_fields((DOCS / "api" / "training.md").read_text())
    assert "| `preset` | `str | None` | `None`: graphmoe-mixlora | The papers' settings" in page
    assert (
        "| `scheduler` | `str` | `'linear'` | How the learning rate falls. One of linear, cosine, constant. |" in page
    )


def test_the_notebooks_page_has_its_texts_code_and_outputs():
    """On the site it was a file of JSON, with links that led nowhere."""
    page = loaded("notebook_pages").as_page(DOCS / "notebooks" / "first-steps.ipynb")
    assert page.startswith("# First steps with GraphMoE\n")
    assert "```python\nsizes = {" in page
    assert "```text\nunchanged: True\n" in page
    assert "```text\n[{'loss': " in page
    assert page.count("```") % 2 == 0
    assert "[Settings](../settings.md)" in page

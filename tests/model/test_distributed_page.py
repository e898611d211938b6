"""docs/distributed.md and the files of docs/configs: tests that are there, and figures that the cost model gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphmoe_cli.runs.memory import gigabytes
from graphmoe_model import GraphMoEConfig
from graphmoe_model.base_models import model_config
from graphmoe_model.memory import memory_per_gpu
from graphmoe_tables.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/distributed.md").read_text()


def test_every_test_that_the_page_names_is_there():
    """A cell whose test was renamed or deleted is held by nothing."""
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) >= 8
    for file, name in named:
        code = (ROOT / "tests/distributed" / file).read_text()
        assert re.search(rf"^def {name}\(", code, re.MULTILINE), f"{file}::{name}"


def test_every_file_that_the_page_names_is_there():
    """And every file of docs/configs is on the page."""
    named = set(re.findall(r"\(configs/([\w.-]+)\)", PAGE))
    assert named == {path.name for path in (ROOT / "docs/configs").iterdir()}


@pytest.mark.slow
def test_the_figures_of_memory_are_the_cost_model_s():
    """On the page and in the head of each file: who buys GPUs by them reads what the command prints."""
    figures = {
        name: memory_per_gpu(GraphMoEConfig(), model_config(name), gpus=8, tokens=4096)
        for name in ("llama-3-8b", "llama-3-70b")
    }
    for strategy in STRATEGIES:
        small, large = (gigabytes(found[strategy].total) for found in figures.values())
        assert f"| `{strategy}` | {small} | {large} |" in PAGE
        file = ROOT / f"docs/configs/{strategy}.yaml"
        if file.exists():
            figures_of_file = f"Llama-3-8B {small} GB, Llama-3-70B {large} GB"
            assert f"# Memory per GPU, of 8: {figures_of_file} (bf16, AdamW, 4,096 tokens per GPU" in file.read_text()

"""Configurations as a YAML file has them and as Axolotl hands them on, real or not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.integrations import stand_in

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "axolotl"
REAL = stand_in.installed()
needs_axolotl = pytest.mark.skipif(not REAL, reason="Axolotl does not import here: it is no dependency of GraphMoE")

BLOCK = {"num_experts": 4, "gru_hidden_scale": 0.25}
KEYS: dict[str, Any] = {"adapter": "graphmoe", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "graphmoe": BLOCK}
# What Axolotl's schema asks of any configuration.
RUN = {
    "base_model": "none",
    "datasets": [{"path": "none", "type": "alpaca"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "plugins": ["graphmoe_axolotl.GraphMoEPlugin"],
}


def parsed(**changes: Any) -> Any:
    """A configuration as the plugin gets it from Axolotl."""
    cls: Any = importlib.import_module("axolotl.utils.dict").DictDefault if REAL else stand_in.Configuration
    return cls({**KEYS, **changes})


def checked(package: Any, **changes: Any) -> Any:
    """The configuration after Axolotl's schema and the plugin's have read it."""
    if not REAL:
        return stand_in.schema(package.GraphMoEArgs)(**{**KEYS, **changes})
    return importlib.import_module("axolotl.utils.config").validate_config(parsed(**RUN, **changes))

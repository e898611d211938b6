"""The configurations that a command is asked for: of presets, or of settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphmoe_model.config import GraphMoEConfig
from graphmoe_tables.methods import PRESETS


def named_configs(presets: Sequence[str], settings: dict[str, Any]) -> list[tuple[str, GraphMoEConfig]]:
    """Return each configuration by its name: of the presets (``all`` is every one), else one of the settings alone.

    Args:
        settings: fields of `GraphMoEConfig` to overrule the presets', or the defaults.

    Raises:
        ValueError: a preset is unknown, or does not go with the settings.
    """
    if not presets:
        config = GraphMoEConfig(**settings)
        return [(config.method, config)]
    names = list(PRESETS) if "all" in presets else list(dict.fromkeys(presets))
    return [(name, _preset(name, settings)) for name in names]


def _preset(name: str, settings: dict[str, Any]) -> GraphMoEConfig:
    try:
        return GraphMoEConfig.from_preset(name, **settings)
    except ValueError as error:
        raise ValueError(f"--preset {name}: {error}" if name in PRESETS else str(error)) from error

"""A stand-in for what the plugin takes from Axolotl 0.19.0, where Axolotl is not installed.

It has the two names that the plugin imports from ``axolotl.integrations.base``, the dictionary whose missing keys are
None, and those keys of the schema that the plugin reads. It has no loaders, no plugin manager and none of Axolotl's
own checks: what rests on those is tested against the real package alone.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import BaseModel, create_model


@dataclass(frozen=True)
class AdapterCapabilities:
    """As Axolotl declares it."""

    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """Axolotl's has a method for each stage of a run, which all do nothing."""


class Configuration(dict):
    """A parsed configuration: attributes are keys, and what is missing is None."""

    __getattr__ = dict.get


def installed() -> bool:
    """Whether the real Axolotl imports here, with all that its base of plugins needs."""
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        return False
    return True


def modules() -> dict[str, ModuleType]:
    """The stand-in's modules by name, for ``sys.modules``."""
    found = {name: ModuleType(name) for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base")}
    base: Any = found["axolotl.integrations.base"]
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
    return found


def schema(args: type[BaseModel]) -> type[BaseModel]:
    """The keys that the plugin reads, in one class with its own, as Axolotl makes one; no key is checked but by it."""
    settings = sys.modules["graphmoe_axolotl.settings"]
    others = ["lora_model_dir", "rl", "gradient_checkpointing", "gradient_checkpointing_kwargs"]
    keys = {"adapter", *settings.LORA_KEYS, *settings.REFUSED, *others}
    return create_model("Stand_in", __base__=args, **dict.fromkeys(keys, (Any, None)))

"""Recipes as YAML files: read, put together with the command line's options, written, compared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from graphmoe_tables.recipe import FREE_ON_RESUME, TrainingRecipe
from graphmoe_tables.recipe_fields import field_of, flag, nearest

RECIPE_FILE = "recipe.yaml"


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the fields of a `TrainingRecipe` that a YAML file sets.

    Raises:
        ValueError: it cannot be read, is no YAML or no mapping, or has a key that is no field, for which the nearest
            field is named.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(f"cannot read the recipe {path}: {reason}; name a YAML file by --config") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"the recipe {path} must be lines of the form 'key: value', got {type(found).__name__}")
    if "peft_type" in found:
        raise ValueError(f"{path} is an adapter's configuration; name its recipe, recipe.yaml in the same folder")
    known = [field.name for field in dataclasses.fields(TrainingRecipe)]
    for key in found:
        if key not in known:
            raise ValueError(f"the recipe {path} has the unknown key {key!r}{nearest(str(key), known)}")
    return found


def recipe_of(options: Mapping[str, Any], config: str | Path | None = None) -> TrainingRecipe:
    """Return the recipe of the command line's options and a file: options overrule the file.

    Args:
        options: by field; None where an option was not given.
        config: a YAML file.

    Raises:
        ValueError: as `read_settings` and `TrainingRecipe`.
    """
    settings = {} if config is None else read_settings(config)
    given = {name: value for name, value in options.items() if value is not None}
    return TrainingRecipe(**{**settings, **given})


def as_yaml(recipe: TrainingRecipe) -> str:
    """Return the recipe as YAML: every field, by groups, and those that are unset as comments."""
    lines: list[str] = []
    panel = ""
    for field in dataclasses.fields(recipe):
        described = field_of(field)
        if described.panel != panel:
            panel = described.panel
            lines += [*([""] if lines else []), f"# {panel}"]
        value = getattr(recipe, field.name)
        if value is None:
            lines.append(f"# {field.name}: {described.unset}")
        else:
            plain = list(value) if isinstance(value, tuple) else value
            lines.append(yaml.safe_dump({field.name: plain}, default_flow_style=False, width=1000).strip())
    return "\n".join(lines) + "\n"


def write_recipe(recipe: TrainingRecipe, folder: str | Path) -> None:
    """Write `RECIPE_FILE` into a folder, whole or not at all."""
    target = Path(folder) / RECIPE_FILE
    new = target.with_name(f".{RECIPE_FILE}.new")
    new.write_text(as_yaml(recipe), encoding="utf-8")
    os.replace(new, target)


def differences(old: TrainingRecipe, new: TrainingRecipe) -> list[str]:
    """Return what would change when a run of ``old`` is gone on with as ``new``, a line for each field."""
    return [
        f"{field.name} ({flag(field.name)}) was {getattr(old, field.name)!r} and is {getattr(new, field.name)!r}"
        for field in dataclasses.fields(old)
        if field.name not in FREE_ON_RESUME and getattr(old, field.name) != getattr(new, field.name)
    ]

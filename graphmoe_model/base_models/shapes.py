"""Configurations of base models: of known ones by their shapes, of others from a folder or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from graphmoe_inference.folder import BASE, CONFIG, WEIGHTS
from graphmoe_model.base_models.hub import hub_arguments, not_loaded
from graphmoe_model.messages import some
from graphmoe_tables.models import MODEL_SHAPES, check_layers, is_path, known_model, model_shape
from graphmoe_tables.paths import looked_for


def model_config(name: str, layers: int | None = None) -> Any:
    """Return a known model's configuration, with another number of layers if one is given.

    Raises:
        ValueError: no model of that name is known, or fewer than one layer is asked for.
    """
    check_layers(layers)
    sizes = model_shape(name)._asdict()
    del sizes["profiled_layers"]
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes, name_or_path=name)


def load_config(name: str) -> Any:
    """Return the configuration of a folder's model, of a known one, or else of a model on the hub, in this order.

    So a local model may be called as a known one is. Nothing but the configuration is read, and no code of the model's
    is run.

    Raises:
        ValueError: there is none by that name, it is not in the cache while the hub cannot be reached, or it is an
            adapter.
    """
    if known_model(name) is not None and not is_local_model(name):
        return model_config(name)
    check_is_model(name)
    if Path(name).is_dir():
        check_has_model(name)
    arguments = hub_arguments(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = not_loaded("read the configuration of the model", name, arguments, error).rstrip(".")
        raise ValueError(f"{message} (known by name: {', '.join(MODEL_SHAPES)})") from error


def is_local_model(name: str) -> bool:
    """Tell whether a name is that of a folder with a model's configuration."""
    return (Path(name) / CONFIG).is_file()


def check_has_model(folder: str) -> None:
    """Refuse a folder without a model's configuration, as that of a GGUF file alone.

    Raises:
        ValueError: says what the folder has, and what can be done with it.
    """
    if is_local_model(folder):
        return
    there = sorted(path.name for path in Path(folder).glob("*.gguf"))
    todo = "name the folder of a saved model"
    if there:
        todo = (
            f"it has {some(there)}: name it by --gguf-file where the command has that option, else write it out as "
            "Transformers saves models (docs/models.md, GGUF files)"
        )
    raise ValueError(f"{folder} has no config.json, so it is no model that Transformers can load; {todo}")


def check_is_model(name: str) -> None:
    """Refuse a path that is no folder, a file's, an adapter's folder, and that of an export.

    Raises:
        ValueError: says which of them it is.
    """
    if name.endswith(".json"):
        raise ValueError(f"{name} would be a file; name the model's folder, whose config.json is read")
    if name.endswith(".gguf") and Path(name).is_file():
        folder, file = os.path.split(name)
        raise ValueError(f"{name} is a file; name its folder, and the file by --gguf-file: {folder or '.'} and {file}")
    if is_path(name) and not Path(name).is_dir():
        raise ValueError(f"there is no folder {name} to load a model from{looked_for(name)}")
    if (Path(name) / WEIGHTS).exists():
        raise ValueError(
            f"{name} was written by graphmoe export, for programs that have no PEFT; its base model is {name}/{BASE}, "
            "and the adapter is where it was exported from"
        )
    if (Path(name) / "adapter_config.json").exists():
        raise ValueError(
            f"{name} is an adapter: pass its base model with --model and the adapter with --adapter, or to train it on "
            "with --start-from"
        )

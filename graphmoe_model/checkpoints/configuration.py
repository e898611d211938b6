"""An adapter's configuration, read without its weights and before PEFT sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from graphmoe_kernels import shown
from graphmoe_model.messages import first_line
from graphmoe_tables.paths import looked_for


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a folder's adapter_config.json.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        ValueError: the file holds no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; name an adapter's folder on disk (one on the hub is fetched by "
            f"huggingface_hub.snapshot_download){looked_for(folder)}"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; name the folder in which an adapter was saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save or fetch the adapter again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object with the adapter's settings, got {type(config).__name__}")
    return config


def saved_adapter_config(path: str) -> PeftConfig:
    """Read the configuration of an adapter in a folder or on the hub.

    Raises:
        ValueError: there is none that can be read, or it is of a method that PEFT does not know.
    """
    try:
        if Path(path).is_dir():  # PEFT hands a file's values on as they are
            peft_type = read_config(path).get("peft_type")
            if not isinstance(peft_type, str):
                raise ValueError(f"its adapter_config.json names no method: peft_type is {shown(peft_type)}")
        return PeftConfig.from_pretrained(path)
    except KeyError as error:
        raise ValueError(
            f"{path!r} is an adapter of the type {error}, which PEFT does not know; graphmoe convert makes MoE-PEFT's "
            "types MIXLORA, LORAMOE and MOLA into GraphMoE adapters"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the adapter {path!r}: {first_line(error)}") from error

"""The Hugging Face hub: whether it answers, and what is said where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

from graphmoe_model.messages import first_line

HUB_SECONDS = 5.0  # how long the hub may take to answer; Transformers itself tries for more than a minute


def hub_is_reachable() -> bool:
    """Tell whether the Hugging Face hub answers within `HUB_SECONDS`; False where HF_HUB_OFFLINE is set."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # whatever the client's transport raises: there is no answer
        return False
    return True


def hub_arguments(name: str) -> dict[str, Any]:
    """Return what `from_pretrained` has to be told of a model: to read the cache alone if the hub does not answer."""
    if Path(name).is_dir() or hub_is_reachable():
        return {}
    return {"local_files_only": True}  # what an earlier run left in the cache is still there


def not_loaded(what: str, name: str, arguments: dict[str, Any], error: Exception) -> str:
    """Return the message for what `from_pretrained` raised.

    Args:
        what: was to be done, such as "load the model".
        name: the model's folder or name.
        arguments: what `from_pretrained` was given, `hub_arguments` among them.
        error: what it raised.
    """
    if arguments.get("local_files_only"):
        return (
            f"cannot {what} {name!r}: it is neither a folder here nor in the cache, and the hub "
            f"({constants.ENDPOINT}) cannot be reached; name a folder, or fetch it on a machine with a connection and "
            "copy the cache (HF_HOME)"
        )
    more = "; what quantised models need comes with pip install 'graphmoe[quant]'"
    return f"cannot {what} {name!r}: {first_line(error)}{more if isinstance(error, ImportError) else ''}"

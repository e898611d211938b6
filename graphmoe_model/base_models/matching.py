"""Whether an adapter is for the base model that it is put on."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftConfig


def check_base(config: PeftConfig, adapter: str, base: str) -> None:
    """Refuse an adapter of another base model.

    Names are compared, and folders by where they lead: from here, or from where the adapter's folder is, beside which a
    relative name was often meant. An adapter that names no base model fits any.

    Args:
        config: the adapter's.
        adapter: its folder or name.
        base: the model that it would be put on, as ``--model`` names it.

    Raises:
        ValueError: names both.
    """
    recorded = config.base_model_name_or_path
    own = Path(adapter).absolute()
    beside = [str(parent / recorded) for parent in own.parents] if recorded and own.is_dir() else []
    if recorded and recorded != base and not any(_same_folder(place, base) for place in (recorded, *beside)):
        missing = "" if Path(base).is_dir() else " (no folder here, so a name on the hub)"
        raise ValueError(
            f"the adapter {adapter} was trained on the base model {recorded!r}, and --model is {base!r}{missing}; name "
            "that one, or pass --allow-other-base if it is the same model elsewhere"
        )


def check_task(config: PeftConfig, adapter: str) -> None:
    """Refuse an adapter of anything but causal language models; one that names no task is for any.

    Raises:
        ValueError: names what it is for.
    """
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{adapter} is an adapter for {config.task_type}; those of causal language models are trained and evaluated"
        )


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and os.path.samefile(one, other)

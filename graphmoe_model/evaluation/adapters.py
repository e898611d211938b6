"""Adapters for evaluation: attached whole, and to the base model that they were trained on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from graphmoe_model.base_models import hub_is_reachable
from graphmoe_model.checkpoints import saved_adapter_config
from graphmoe_model.messages import first_line


def check_base(config: PeftConfig, adapter: str, base: str) -> None:
    """Refuse an adapter of another base model.

    Names are compared, and folders by where they lead. An adapter that names no base model fits any.

    Raises:
        ValueError: names both.
    """
    recorded = config.base_model_name_or_path
    if recorded and recorded != base and not _same_folder(recorded, base):
        raise ValueError(
            f"the adapter {adapter} was trained on the base model {recorded!r}, and {base!r} would be evaluated; "
            "name that one, or pass --allow-other-base if it is the same model elsewhere"
        )


def attach_adapter(model: PreTrainedModel, adapter: str, config: PeftConfig) -> PeftModel:
    """Attach a saved adapter, of this package's method or of PEFT's own, for evaluation.

    Raises:
        ValueError: it is no adapter of causal language models, does not fit the model, or lacks weights (PEFT would
            evaluate with untrained ones).
    """
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{adapter} is an adapter for {config.task_type}; those of causal language models are evaluated"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter, config=config).eval()
    except (TypeError, ValueError, KeyError, ImportError, OSError, Warning) as error:
        raise ValueError(f"cannot attach the adapter {adapter}: {first_line(error)}") from error
    except RuntimeError as error:  # PyTorch lists what does not fit after a heading
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"the adapter {adapter} does not fit the model: {' '.join(lines[:2])}") from error


def saved_config(adapter: str) -> PeftConfig:
    """Read an adapter's configuration, for `check_base` before anything large is loaded.

    Raises:
        ValueError: there is none, or it is of a method or a version that is not known.
    """
    if not Path(adapter).is_dir() and not hub_is_reachable():
        raise ValueError(f"there is no folder {adapter} to load an adapter from, and the hub cannot be reached")
    config = saved_adapter_config(adapter)
    config.inference_mode = True
    return config


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and os.path.samefile(one, other)

"""Adapters for evaluation: attached whole."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from graphmoe_model.base_models import check_task, hub_is_reachable
from graphmoe_model.checkpoints import saved_adapter_config, weights_file
from graphmoe_model.messages import first_line


def attach_adapter(model: PreTrainedModel, adapter: str, config: PeftConfig) -> PeftModel:
    """Attach a saved adapter, of this package's method or of PEFT's own, for evaluation.

    Raises:
        ValueError: it is no adapter of causal language models, does not fit the model, or lacks weights (PEFT would
            evaluate with untrained ones).
    """
    check_task(config, adapter)
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
    """Read an adapter's configuration, for `graphmoe_model.base_models.check_base` before anything large is loaded.

    Raises:
        ValueError: there is none, or it is of a method or a version that is not known.
        FileNotFoundError: it is a folder without a weight file.
    """
    if not Path(adapter).is_dir() and not hub_is_reachable():
        raise ValueError(f"there is no folder {adapter} to load an adapter from, and the hub cannot be reached")
    config = saved_adapter_config(adapter)
    if Path(adapter).is_dir():
        weights_file(Path(adapter))
    config.inference_mode = True
    return config

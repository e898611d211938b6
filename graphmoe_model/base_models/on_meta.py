"""A model with its adapter on the meta device: everything of it but memory for weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.messages import first_line
from graphmoe_model.tuner import check_targets


class AdaptedOnMeta(NamedTuple):
    """A causal language model with an adapter, on the meta device, and how many parameters it has without it."""

    model: PeftModel
    base: int


def adapted_on_meta(config: GraphMoEConfig, model_config: Any) -> AdaptedOnMeta:
    """Build a model of that (Transformers) configuration with the adapter; nothing is downloaded.

    Raises:
        ValueError: it is no causal language model, or the adapter is of no such, or it cannot be adapted so.
    """
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"adapters of causal language models are counted, got task_type={config.task_type!r}")
    config = copy.deepcopy(config)  # attaching writes the targets it finds into it
    config.inference_mode = False  # a saved adapter's is on, and nothing of it would be trainable
    config.base_model_name_or_path = None  # PEFT warns of another model than the saved one's
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(model_config)
        except ValueError as error:
            raise ValueError(f"this is no causal language model: {first_line(error)}") from error
        base = model.num_parameters()
        if config.target_modules is not None:
            try:
                check_targets(model, config)
            except TypeError as error:  # for the caller the model is as wrong as any other that cannot be adapted
                raise ValueError(str(error)) from error
        return AdaptedOnMeta(get_peft_model(model, config), base)

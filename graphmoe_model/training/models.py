"""What is trained: a base model as the recipe wants it held, its tokenizer, and an adapter, fresh or started from."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from graphmoe_model.base_models import Bits, ModelSource, check_base, check_task, load_base_model
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.conversion import read_adapter, with_rounds, write_adapter
from graphmoe_tables.recipe import TrainingRecipe


def check_installed(recipe: TrainingRecipe) -> None:
    """`ValueError` if DeepSpeed is asked for and missing, with what installs it."""
    if recipe.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs deepspeed: pip install 'graphmoe[distributed]'")


def base_source(recipe: TrainingRecipe) -> ModelSource:
    """Say where the recipe's base model is, and how it is held while it is trained on.

    A quantised base goes to this process's GPU, as nothing moves it later. Any other stays where it is loaded:
    Trainer moves it, and FSDP and ZeRO split it.

    Raises:
        ValueError: as `ModelSource`.
    """
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    bits: Bits | None = 4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else None
    own_gpu = bits is not None and torch.cuda.is_available() and not recipe.use_cpu
    return ModelSource(
        recipe.model,
        recipe.gguf_file,
        bits,
        dtype,
        device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if own_gpu else None,  # of torchrun and accelerate
        storage=dtype if recipe.fsdp else torch.uint8,
    )


def within_positions(recipe: TrainingRecipe, base: Any) -> TrainingRecipe:
    """Return the recipe with no more tokens per row than the base model's configuration has positions.

    `graphmoe eval` cuts prompts at those too: what is trained is then what is asked.
    """
    positions = getattr(base.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= recipe.max_length:
        return recipe
    return dataclasses.replace(recipe, max_length=positions)


def adapter_config(recipe: TrainingRecipe) -> GraphMoEConfig:
    """Return the configuration of the adapter that the recipe trains.

    Raises:
        ValueError: what `GraphMoEConfig` refuses; the adapter to start from cannot be read, has no such rounds, or is
            of another base model or of another kind of model.
    """
    if recipe.start_from is None:
        assert recipe.preset is not None  # resolved
        return GraphMoEConfig.from_preset(recipe.preset, task_type="CAUSAL_LM", **recipe.adapter_settings())
    return _started(recipe).config


def load_model(recipe: TrainingRecipe, source: ModelSource) -> PeftModel:
    """Load the base model and attach the adapter, in fp32, to it.

    Under ZeRO-3 the trainer's arguments have to exist before, as `from_pretrained` then splits the weights it reads.

    Args:
        recipe: of the adapter.
        source: `base_source` of that recipe.

    Raises:
        ValueError: there is no such model, or the adapter does not fit it.
    """
    base: Any = load_base_model(source)
    base.config.use_cache = False
    torch.manual_seed(recipe.seed)
    try:
        return _attach(base, recipe)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot attach the adapter: {error}") from error


def _attach(base: Any, recipe: TrainingRecipe) -> PeftModel:
    if recipe.start_from is None:
        return get_peft_model(base, adapter_config(recipe))
    if recipe.rounds is None:
        model = PeftModel.from_pretrained(base, recipe.start_from, is_trainable=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(_started(recipe), Path(folder) / "adapter")
            model = PeftModel.from_pretrained(base, str(Path(folder) / "adapter"), is_trainable=True)
    model.peft_config["default"].base_model_name_or_path = recipe.model  # PEFT keeps the name of the earlier one
    return model


def _started(recipe: TrainingRecipe) -> Any:
    """The adapter to start from, with fresh GRUs where rounds are asked for."""
    assert recipe.start_from is not None
    try:
        adapter = read_adapter(recipe.start_from)
        check_task(adapter.config, recipe.start_from)
        if not recipe.allow_other_base:
            check_base(adapter.config, recipe.start_from, recipe.model)
        if recipe.rounds is None:
            return adapter
        gru = {} if recipe.gru_hidden_scale is None else {"gru_hidden_scale": recipe.gru_hidden_scale}
        return with_rounds(adapter, recipe.rounds, recipe.seed, **gru)
    except (OSError, ValueError) as error:
        raise ValueError(f"--start-from {recipe.start_from}: {error}") from error

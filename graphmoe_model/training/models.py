"""What is trained: a base model as the recipe wants it held, its tokenizer, and an adapter, fresh or started from."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from graphmoe_model.base_models import check_is_model, load_config
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.conversion import read_adapter, with_rounds, write_adapter
from graphmoe_model.messages import first_line
from graphmoe_tables.recipe import TrainingRecipe

# Option -> what it needs, and what installs it.
NEEDS = {
    "load_in_4bit": ("bitsandbytes", "graphmoe[quant]"),
    "load_in_8bit": ("bitsandbytes", "graphmoe[quant]"),
    "gguf_file": ("gguf", "graphmoe[gguf]"),
    "deepspeed": ("deepspeed", "graphmoe[distributed]"),
}


def check_installed(recipe: TrainingRecipe) -> None:
    """`ValueError` if a package that the recipe needs is missing, with what installs it."""
    for name, (package, install) in NEEDS.items():
        if getattr(recipe, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{name.replace('_', '-')} needs {package}: pip install '{install}'")


def adapter_config(recipe: TrainingRecipe) -> GraphMoEConfig:
    """Return the configuration of the adapter that the recipe trains.

    Raises:
        ValueError: what `GraphMoEConfig` refuses; the adapter to start from cannot be read, or has no such rounds.
    """
    if recipe.start_from is None:
        assert recipe.preset is not None  # resolved
        return GraphMoEConfig.from_preset(recipe.preset, task_type="CAUSAL_LM", **recipe.adapter_settings())
    return _started(recipe).config


def model_config(recipe: TrainingRecipe) -> Any:
    """Return the base model's configuration, without its weights; ``ValueError`` if there is none."""
    if recipe.gguf_file is None:
        return load_config(recipe.model)
    try:
        return AutoConfig.from_pretrained(recipe.model, gguf_file=recipe.gguf_file)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {recipe.gguf_file} of {recipe.model!r}: {first_line(error)}") from error


def load_tokenizer(recipe: TrainingRecipe) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer; ``ValueError`` if there is none."""
    check_is_model(recipe.model)
    try:
        return AutoTokenizer.from_pretrained(recipe.model, **_gguf(recipe))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the tokenizer of {recipe.model!r}: {first_line(error)}") from error


def load_model(recipe: TrainingRecipe) -> PeftModel:
    """Load the base model and attach the adapter, in fp32, to it.

    Under ZeRO-3 the trainer's arguments have to exist before, as `from_pretrained` then splits the weights it reads.

    Raises:
        ValueError: there is no such model, or the adapter does not fit it.
    """
    check_is_model(recipe.model)
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    loading: dict[str, Any] = {"dtype": dtype, **_gguf(recipe)}
    if recipe.load_in_4bit or recipe.load_in_8bit:
        loading["quantization_config"] = _quantization(recipe, dtype)
        if torch.cuda.is_available() and not recipe.use_cpu:
            loading["device_map"] = {"": PartialState().local_process_index}
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(recipe.model, **loading)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"cannot load the model {recipe.model!r}: {first_line(error)}") from error
    if recipe.gguf_file is not None:
        # Its weights are dense by now; with the mark of a quantised model Trainer would refuse to train it.
        base.hf_quantizer.remove_quantization_config(base)
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
        return PeftModel.from_pretrained(base, recipe.start_from, is_trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(_started(recipe), Path(folder) / "adapter")
        return PeftModel.from_pretrained(base, str(Path(folder) / "adapter"), is_trainable=True)


def _started(recipe: TrainingRecipe) -> Any:
    """The adapter to start from, with fresh GRUs where rounds are asked for."""
    assert recipe.start_from is not None
    try:
        adapter = read_adapter(recipe.start_from)
        if recipe.rounds is None:
            return adapter
        gru = {} if recipe.gru_hidden_scale is None else {"gru_hidden_scale": recipe.gru_hidden_scale}
        return with_rounds(adapter, recipe.rounds, recipe.seed, **gru)
    except (OSError, ValueError) as error:
        raise ValueError(f"--start-from {recipe.start_from}: {error}") from error


def _gguf(recipe: TrainingRecipe) -> dict[str, Any]:
    return {} if recipe.gguf_file is None else {"gguf_file": recipe.gguf_file}


def _quantization(recipe: TrainingRecipe, dtype: torch.dtype) -> BitsAndBytesConfig:
    if recipe.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP2 splits floating dtypes only
        bnb_4bit_quant_storage=dtype if recipe.fsdp else torch.uint8,
    )

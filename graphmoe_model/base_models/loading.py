"""Base models and their tokenizers, from a folder, a GGUF file or the hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, get_session
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graphmoe_model.base_models.shapes import check_is_model
from graphmoe_model.messages import first_line, some

Bits = Literal[4, 8]
HUB_SECONDS = 5.0  # how long the hub may take to answer; Transformers itself tries for more than a minute


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is, and how it is loaded.

    Attributes:
        name: a folder, or a model's name on the hub.
        gguf_file: the GGUF file in it that holds the weights, if they are in one.
        bits: 4 or 8: the linears are quantised by bitsandbytes (4: NF4 with double quantisation). None: they are not.
        dtype: of the weights; None: as the model's files have them (fp32 from a GGUF file).
        device: where they go.

    Raises:
        ValueError: quantised twice, an adapter's folder, or a folder that holds no model; says which.
    """

    name: str
    gguf_file: str | None = None
    bits: Bits | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.gguf_file is not None and self.bits is not None:
            raise ValueError(f"{self.gguf_file} is quantised already and is loaded unpacked; leave 4-bit and 8-bit out")
        check_is_model(self.name)
        if Path(self.name).is_dir():
            self._check_folder(Path(self.name))
        for wanted, package, install in (
            (self.gguf_file, "gguf", "gguf"),
            (self.bits, "bitsandbytes", "'graphmoe[quant]'"),
        ):
            if wanted is not None and importlib.util.find_spec(package) is None:
                raise ValueError(f"loading {self.name} so needs the package {package}: pip install {install}")

    def _check_folder(self, folder: Path) -> None:
        there = sorted(path.name for path in folder.glob("*.gguf"))
        if self.gguf_file is not None:
            if not (folder / self.gguf_file).is_file():
                found = f"it has {some(there)}" if there else "it has no .gguf file"
                raise ValueError(f"{folder} has no file {self.gguf_file}; {found}")
        elif not (folder / "config.json").is_file():
            todo = f"it has {some(there)}: name it by --gguf-file" if there else "name the folder of a saved model"
            raise ValueError(f"{folder} has no config.json, so it is no model that Transformers can load; {todo}")

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` of the model and of the tokenizer both take."""
        given: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        if not Path(self.name).is_dir() and not hub_is_reachable():
            given["local_files_only"] = True  # what an earlier run left in the cache is still there
        return given


def hub_is_reachable() -> bool:
    """Tell whether the Hugging Face hub answers within `HUB_SECONDS`; False where HF_HUB_OFFLINE is set."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # whatever the client's transport raises: there is no answer
        return False
    return True


def load_base_model(source: ModelSource) -> PreTrainedModel:
    """Load a causal language model.

    Raises:
        ValueError: there is none, it is not in the cache while the hub cannot be reached, a package for it is missing,
            or its files lack weights, which Transformers would make up.
    """
    loading: dict[str, Any] = {"dtype": "auto" if source.dtype is None else source.dtype, **source.arguments}
    if source.bits is not None:
        loading |= {"quantization_config": _quantisation(source), "device_map": {"": source.device}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name, trust_remote_code=False, output_loading_info=True, **loading
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(_not_loaded("model", source, loading, error)) from error
    model, found = loaded
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"the files of the model {source.name!r} lack weights: {some(missing, 4)}; fetch it again")
    return model if source.bits is not None else model.to(source.device)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ValueError: there is none, or it is not in the cache while the hub cannot be reached.
    """
    arguments = source.arguments
    try:
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=False, **arguments)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(_not_loaded("tokenizer of", source, arguments, error)) from error


def _not_loaded(what: str, source: ModelSource, arguments: dict[str, Any], error: Exception) -> str:
    if arguments.get("local_files_only"):
        return (
            f"cannot load the {what} {source.name!r}: it is neither a folder here nor in the cache, and the hub "
            f"({constants.ENDPOINT}) cannot be reached; name a folder, or fetch it on a machine with a connection and "
            "copy the cache (HF_HOME)"
        )
    return f"cannot load the {what} {source.name!r}: {first_line(error)}"


def _quantisation(source: ModelSource) -> BitsAndBytesConfig:
    if source.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if source.dtype is None else source.dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )

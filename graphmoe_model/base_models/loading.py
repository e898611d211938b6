"""Base models and their tokenizers, from a folder, a GGUF file or the hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graphmoe_model.base_models.gguf_tokens import check_first_token
from graphmoe_model.base_models.hub import hub_arguments, not_loaded
from graphmoe_model.base_models.shapes import check_has_model, check_is_model
from graphmoe_model.messages import some

Bits = Literal[4, 8]
# What a name that is no model's, or a damaged file, makes Transformers raise.
_REFUSALS = (OSError, ValueError, TypeError, ImportError, KeyError, SafetensorError)


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is, and how it is loaded.

    Attributes:
        name: a folder, or a model's name on the hub.
        gguf_file: the GGUF file in it that holds the weights, if they are in one.
        bits: 4 or 8: the linears are quantised by bitsandbytes (4: NF4 with double quantisation). None: they are not.
        dtype: of the weights; None: as the model's files have them (fp32 from a GGUF file).
        device: where they go; None: where Transformers puts them, for a trainer that moves or splits them.
        storage: the dtype that holds 4-bit weights; FSDP2 splits floating ones only.

    Raises:
        ValueError: quantised twice, an adapter's folder, a folder that holds no model, or a package that is missing;
            says which.
    """

    name: str
    gguf_file: str | None = None
    bits: Bits | None = None
    dtype: torch.dtype | None = None
    device: str | None = "cpu"
    storage: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.gguf_file is not None and self.bits is not None:
            raise ValueError(f"{self.gguf_file} is quantised already and is loaded unpacked; leave 4-bit and 8-bit out")
        check_is_model(self.name)
        if Path(self.name).is_dir():
            self._check_folder(Path(self.name))
        for wanted, option, package, extra in (
            (self.gguf_file, "--gguf-file", "gguf", "gguf"),
            (self.bits, f"--load-in-{self.bits}bit", "bitsandbytes", "quant"),
        ):
            if wanted is not None and importlib.util.find_spec(package) is None:
                raise ValueError(f"{option} needs {package}: pip install 'graphmoe[{extra}]'")

    def _check_folder(self, folder: Path) -> None:
        there = sorted(path.name for path in folder.glob("*.gguf"))
        if self.gguf_file is not None:
            if not (folder / self.gguf_file).is_file():
                found = f"it has {some(there)}" if there else "it has no .gguf file"
                raise ValueError(f"{folder} has no file {self.gguf_file}; {found}")
        else:
            check_has_model(self.name)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` of the model, of its configuration and of its tokenizer all take."""
        given: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return given | hub_arguments(self.name)


def load_base_model(source: ModelSource) -> PreTrainedModel:
    """Load a causal language model.

    Raises:
        ValueError: there is none, it is not in the cache while the hub cannot be reached, a package for it is missing,
            or its files are damaged, do not fit its configuration, or lack weights, which Transformers would make up.
    """
    loading: dict[str, Any] = {"dtype": "auto" if source.dtype is None else source.dtype, **source.arguments}
    if source.bits is not None:
        loading["quantization_config"] = _quantisation(source)
        if source.device is not None:
            loading["device_map"] = {"": source.device}
    if source.gguf_file is not None:
        # Else Transformers keeps weights packed where it has kernels for them, in modules that no adapter fits, and
        # marks every model from such a file as quantised, which Trainer refuses to train.
        loading["quantization_config"] = GgufConfig(dequantize=True)
    # Transformers looks for an adapter of that name too, and asks the hub for it unless it is told again.
    looking = {name: value for name, value in source.arguments.items() if name == "local_files_only"}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name, trust_remote_code=False, output_loading_info=True, adapter_kwargs=looking, **loading
        )
    except _REFUSALS as error:
        raise ValueError(not_loaded("load the model", source.name, loading, error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # such as memory that ran out
            raise
        raise ValueError(
            f"the files of the model {source.name!r} do not fit its configuration: weights have other sizes; "
            "fetch it again"
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"the files of the model {source.name!r} lack weights: {some(missing, 4)}; fetch it again")
    return model if source.bits is not None or source.device is None else model.to(source.device)


def load_base_config(source: ModelSource) -> PreTrainedConfig:
    """Read the model's configuration, without its weights.

    Raises:
        ValueError: there is none, or it is not in the cache while the hub cannot be reached.
    """
    return _read("read the configuration of", AutoConfig, source)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ValueError: there is none, it is not in the cache while the hub cannot be reached, or it leaves out the token
            with which a GGUF file says that every text begins.
    """
    tokenizer = _read("load the tokenizer of", AutoTokenizer, source)
    if source.gguf_file is not None:
        check_first_token(tokenizer, source.name, source.gguf_file, source.arguments)
    return tokenizer


def _read(doing: str, kind: Any, source: ModelSource) -> Any:
    """What one of Transformers' auto classes reads of a model beside its weights; ``doing`` is for the refusal."""
    arguments = source.arguments
    try:
        return kind.from_pretrained(source.name, trust_remote_code=False, **arguments)
    except _REFUSALS as error:
        raise ValueError(not_loaded(doing, source.name, arguments, error)) from error


def _quantisation(source: ModelSource) -> BitsAndBytesConfig:
    if source.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if source.dtype is None else source.dtype,
        bnb_4bit_quant_storage=source.storage,
    )

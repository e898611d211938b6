"""An adapter without its model: the configuration and the tensors, as they stand in a saved folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors.torch import save_file
from torch import Tensor

from graphmoe_model.checkpoints import check_digest, read_config, stamp
from graphmoe_model.config import GraphMoEConfig, GraphMoEPeftType, rank_and_alpha
from graphmoe_model.conversion.files import read_weights, write_folder
from graphmoe_model.conversion.layout import (
    CONTAINER,
    Shape,
    check_tensors,
    raise_problems,
    resolved,
)
from graphmoe_model.conversion.loadable import check_values, count_problems, selection_problems
from graphmoe_model.conversion.modules import Module
from graphmoe_model.module_names import ROOT

_TENSOR = re.compile(
    rf"{re.escape(ROOT)}(?P<module>.+?)\.(?:{CONTAINER}\.(?P<part>.+)|(?:lora_[AB]|lora_magnitude_vector)\.weight)"
)


@dataclass(frozen=True)
class Adapter:
    """A GraphMoE adapter.

    Attributes:
        config: its configuration.
        tensors: by the names they have in a saved adapter, on the CPU, each in the dtype it was saved in.
        notes: what whoever converted it should know.
    """

    config: GraphMoEConfig
    tensors: dict[str, Tensor] = dataclasses.field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> list[Module]:
        """List its adapted modules, MLPs and attention projections, in the order of their tensors."""
        gated: dict[str, bool] = {}
        for match in map(_TENSOR.fullmatch, self.tensors):
            if match:
                of_mlp = (match["part"] or "").startswith(("experts.", "gru."))
                gated[match["module"]] = gated.get(match["module"], False) or of_mlp
        return [Module.at(path, is_mlp) for path, is_mlp in gated.items()]


def read_adapter(folder: str | Path) -> Adapter:
    """Read a saved GraphMoE adapter.

    Raises:
        FileNotFoundError: the folder or one of its two files is not there.
        ValueError: it is another method's adapter, a file is damaged, its configuration and weights are of different
            saves, or a module's tensors are not just those that its configuration asks for (all of them are named).
    """
    peft_type = read_config(folder).get("peft_type")
    if peft_type != GraphMoEPeftType.GRAPHMOE.value:
        raise ValueError(
            f"{folder} holds an adapter of peft_type {peft_type!r}, expected 'GRAPHMOE'; from_moe_peft reads "
            "MoE-PEFT's and PEFT's LoRA"
        )
    config, weights = GraphMoEConfig.from_pretrained(str(folder)), read_weights(folder)
    check_digest(Path(folder), config.saved_digest, weights.digest)
    adapter = Adapter(config, weights.tensors)
    check_values(adapter.tensors, str(folder))
    check_adapter(adapter, str(folder))
    return adapter


def write_adapter(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> None:
    """Save an adapter as ``PeftModel.from_pretrained`` loads it; the folder appears whole or not at all.

    Raises:
        ValueError: nothing would load it: its tensors are not just those that its configuration asks for.
        FileExistsError: the folder is a file, or is not empty and ``overwrite`` is off.
    """
    check_adapter(adapter, "the adapter")
    write_folder(folder, lambda place: save_safetensors(adapter.config, adapter.tensors, place), overwrite)


def save_safetensors(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the two files of an adapter as ``PeftModel.save_pretrained`` does."""
    dataclasses.replace(config, inference_mode=True).save_pretrained(str(folder))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    if isinstance(config, GraphMoEConfig):
        stamp(folder)


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Make the ``rank_pattern`` or ``alpha_pattern`` that gives each module its value.

    Keys are last names where all modules of a name agree, else paths; the default needs no key.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], {})[path] = value
    pattern: dict[str, Any] = {}
    for name, group in by_name.items():
        alike = len(set(group.values())) == 1
        chosen = {name: next(iter(group.values()))} if alike else group
        pattern |= {key: value for key, value in chosen.items() if value != default}
    return pattern


def check_adapter(adapter: Adapter, what: str) -> None:
    """Refuse an adapter that nothing loads.

    Raises:
        ValueError: tensors that are missing, have no place or do not have their shape; modules that the configuration
            does not select, or selects without tensors; other numbers of experts than it gives. All are named.
    """
    config: GraphMoEConfig = adapter.config
    problems: list[str] = []
    expected: dict[str, Shape] = {}
    modules = adapter.modules
    for module in modules:
        scoped: dict[str, int | str] = {letter: f"{module.path}.{letter}" for letter in ("F", "n", "in", "out")}
        if isinstance(config.num_experts, int):
            scoped["n"] = config.num_experts
        scoped["r"] = rank_and_alpha(config, module.path)[0]
        expected |= {name: resolved(entry.shape, scoped) for name, entry in module.entries(config)}
    if not any(module.is_mlp for module in modules):
        problems.append("there is no adapted MLP")
    problems += selection_problems(config, modules)
    rest = {name: t for name, t in adapter.tensors.items() if not is_other(config, name)}
    sizes = check_tensors(rest, expected, what, problems)
    found = {m.path: sizes[f"{m.path}.n"] for m in modules if f"{m.path}.n" in sizes}
    raise_problems(count_problems(config, modules, found), what)
    if config.rounds > 1 and sizes["G"] != config.gru_width(sizes["D"]):
        raise ValueError(
            f"{what}: its GRUs have the width {sizes['G']}, but gru_hidden_scale={config.gru_hidden_scale} of the "
            f"hidden size {sizes['D']} is {config.gru_width(sizes['D'])}"
        )


def is_other(config: Any, name: str) -> bool:
    """Tell whether a tensor is none of the method's own.

    It is of a base module (``modules_to_save``) or of embeddings (``trainable_token_indices``,
    ``save_embedding_layers``, a resized vocabulary).
    """
    if ".lora_" in name:
        return False
    saved = any(f".{module}." in name for module in (*EMBEDDING_LAYER_NAMES, *(config.modules_to_save or ())))
    return saved or (config.trainable_token_indices is not None and name.endswith("trainable_tokens_delta"))

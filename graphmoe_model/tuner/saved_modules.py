"""Modules of the base model that are trained beside the experts: ``modules_to_save`` and ``trainable_token_indices``.

PEFT wraps them after it has attached the adapter, so what it refuses there comes too late, and it finds them by the end
of their names, the adapter's own modules included. Both are checked here, before anything in the model has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TaskType, TrainableTokensWrapper
from torch import Tensor, nn

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.module_names import joined, last_names
from graphmoe_model.storage.offloading import check_not_offloaded
from graphmoe_model.storage.weight_management import true_shape

# What PEFT adds by itself for tasks with a head, whether the model has it or not.
_HEADS = {"classifier", "score", "qa_outputs"}
_TASKS_WITH_HEADS = {TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS}

# The modules that an adapter brings, by their paths below the module that it adapts; {} is an adapter's name.
_LORA = ("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_PARTS = ("router", "experts", "gru", "gru.update_gate", "gru.reset_gate", "gru.candidate", "gru.output_proj")
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_OWN = (
    *("base_layer", "lora_graphmoe", "lora_graphmoe.{}", *_LORA, *(f"{name}.{{}}" for name in _LORA)),
    *(f"lora_graphmoe.{{}}.{part}" for part in _PARTS),
    *(f"lora_graphmoe.{{}}.experts.{linear}{end}" for linear in _LINEARS for end in ("", ".router")),
)


def check_saved_modules(
    base: dict[str, nn.Module], selected: list[str], adapter_names: list[str], config: GraphMoEConfig
) -> None:
    """Refuse modules that cannot be trained beside the adapter.

    Args:
        base: the model's modules by name, without the inside of adapted ones.
        selected: the names of those that the adapter adapts.
        adapter_names: of the adapters that the model then has.
        config: the adapter's.

    Raises:
        ValueError: an entry is no module's name; it means a module that is adapted, or a part of one, or of the
            adapter itself; it lies inside another entry's module; a token id is outside of its embedding; an embedding
            is in both fields.
    """
    base = {name: module for name, module in base.items() if not _is_inside_wrapper(base, name)}
    saved: dict[str, str] = {}  # module name -> entry
    for entry in config.modules_to_save or ():
        found = _named(base, entry, "modules_to_save")
        if not found and not (config.task_type in _TASKS_WITH_HEADS and entry in _HEADS):
            raise ValueError(
                f"modules_to_save: no module of the base model is called {entry}; there are {last_names(base)}"
            )
        _check_apart(found, entry, selected, adapter_names)
        wrapped = [name for name in found if isinstance(base[name], BaseTunerLayer | TrainableTokensWrapper)]
        if wrapped:
            raise ValueError(
                f"modules_to_save: {entry} means {joined(wrapped)}, which another adapter of this model adapts; a "
                "module is adapted or saved whole, not both: leave it out, or unload() the model first"
            )
        saved |= dict.fromkeys(found, entry)
    _check_nesting(saved)
    for entry, ids in _token_lists(base, config):
        _check_tokens(base, entry, ids, saved, selected)


def _named(base: dict[str, nn.Module], entry: str, field: str) -> list[str]:
    """List the modules that PEFT takes an entry for: those whose name ends in it, whatever stands before."""
    names = [name for name in base if name.endswith(entry)]
    lists = [name for name in names if isinstance(base[name], nn.ModuleList | nn.ModuleDict)]
    if lists:
        raise ValueError(f"{field}: {entry} is a list of modules ({joined(lists)}), which has no forward to run")
    for name in names:
        check_not_offloaded(base[name], name, field)
    return names


def _is_inside_wrapper(base: dict[str, nn.Module], name: str) -> bool:
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(isinstance(base.get(parent), AuxiliaryTrainingWrapper) for parent in above)


def _check_apart(found: list[str], entry: str, selected: list[str], adapter_names: list[str]) -> None:
    """Refuse an entry that means an adapted module, or any that is not of the base model alone."""
    for name in found:
        adapted = [s for s in selected if f"{name}.".startswith(f"{s}.") or s.startswith(f"{name}.")]
        if adapted:
            raise ValueError(
                f"modules_to_save: {entry} means {name}, and the adapter has {joined(adapted)}; a module is adapted or "
                "saved whole, not both: leave one out (exclude_modules, or a longer name in modules_to_save)"
            )
    own = [f"{s}.{part.format(a)}" for s in selected for part in _OWN for a in adapter_names]
    caught = sorted({name for name in own if name.endswith(entry)})
    if caught:
        instead = f"name the base model's in full: {joined(found)}" if found else "leave it out"
        raise ValueError(
            f"modules_to_save: PEFT finds modules by the end of their names, so {entry} would also mean the adapter's "
            f"own {caught[0].rpartition('.')[2]}, which is trained and saved anyway; {instead}"
        )


def _check_nesting(saved: dict[str, str]) -> None:
    for name, entry in saved.items():
        outer = next((other for other in saved if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"modules_to_save: {entry} means {name}, which lies inside {outer}, saved as a whole already ("
                f"{saved[outer]}); leave one of them out"
            )


def _token_lists(base: dict[str, nn.Module], config: GraphMoEConfig) -> Iterator[tuple[str, list[int]]]:
    """Iterate over embeddings' names and token ids, as PEFT reads ``trainable_token_indices``."""
    given: Any = config.trainable_token_indices
    if given is None:
        return
    if isinstance(given, Mapping):
        yield from given.items()
        return
    model: Any = base[""]
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    yield next((name for name, module in base.items() if module is embeddings), "embed_tokens"), given


def _check_tokens(
    base: dict[str, nn.Module], entry: str, ids: list[int], saved: dict[str, str], selected: list[str]
) -> None:
    found = _named(base, entry, "trainable_token_indices")
    if not found:
        raise ValueError(f"trainable_token_indices: no module is called {entry}; there are {last_names(base)}")
    for name in found:
        taken = "modules_to_save" if name in saved else "target_modules" if name in selected else None
        if taken is not None:
            raise ValueError(
                f"trainable_token_indices: {name} is in {taken} too; train all of its rows or some, not both"
            )
        module = base[name]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or len(true_shape(weight)) != 2 or isinstance(module, ModulesToSaveWrapper):
            kind = f"{type(module).__name__} of another adapter" if _is_wrapper(module) else type(module).__name__
            raise ValueError(
                f"trainable_token_indices: {name} ({kind}) is no embedding or output head with a weight of its own"
            )
        rows = true_shape(weight)[0]
        outside = [i for i in ids if i >= rows]
        if outside:
            raise ValueError(
                f"trainable_token_indices: {name} has {rows} tokens, so there is no token "
                f"{', '.join(map(str, outside[:10]))}; call resize_token_embeddings before you attach the adapter"
            )


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(
        module, TrainableTokensWrapper
    )

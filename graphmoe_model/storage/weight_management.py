"""Weights that something beside the layer holds: shards of FSDP and ZeRO-3, and what accelerate offloads.

Whoever holds them writes where no version counter moves, and gives their storage away between forwards. So nothing made
from such weights is kept, and whoever reads or checks them outside of a forward gathers them first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from graphmoe_model.messages import some
from graphmoe_model.storage.offloading import is_offloaded, onloaded

ATTACH_FIRST = (
    "attach adapters first (get_peft_model, PeftModel.from_pretrained), then shard: Trainer, accelerator.prepare and "
    "deepspeed.initialize take the adapted model, fully_shard its whole decoder layers"
)

TENSOR_PARALLEL = (
    "each device would have a part of every product, and experts, routers and folds take whole ones. Load the model "
    "without tp_plan; to spread it over devices, shard whole decoder layers with FSDP after attaching"
)


class WeightManager(Enum):
    """Who gives a layer's weights their storage and writes to it.

    LAYER: nobody else, so that every write but the documented ones moves a version counter.
    FSDP: FSDP 1 or 2 around the layer or a module above it. It writes gathered weights without moving version counters.
    ZERO: DeepSpeed ZeRO-1 or ZeRO-2, in training. The weights are whole, and are written by steps that are seen, but
        gradients are added up over ranks in the order in which each rank's backward pass comes to them.
    ZERO3: DeepSpeed ZeRO-3. Gradients as there, and each submodule's call and each weight that is read is a collective.
    OFFLOAD: hooks of accelerate, which bring the base's weights from the CPU or from disk for each forward.
    """

    LAYER = "the layer"
    FSDP = "FSDP"
    ZERO = "DeepSpeed ZeRO-1 or ZeRO-2"
    ZERO3 = "DeepSpeed ZeRO-3"
    OFFLOAD = "accelerate's offloading"


# Functions, not methods of the enum: Dynamo of torch 2.11 compiles no call of an enum member's method.


def keeps_folds(manager: WeightManager) -> bool:
    """Tell whether every write to the weights is seen, so that a fold of them may be kept between forwards."""
    return manager is WeightManager.LAYER or manager is WeightManager.ZERO


def allowed_fold(manager: WeightManager, mode: str) -> str:
    """Turn a config's ``fold`` into what a forward may do.

    Literal and folded rounds read weights, and give gradients, in different orders. DeepSpeed pairs them up over
    ranks by their order alone, so ranks must not choose by how many tokens each has: ``"auto"`` is ``"never"``
    under ZeRO-3, where a fold's graph would hold gathered weights until the backward pass, and ``"always"`` in
    training under ZeRO-1 and ZeRO-2.
    """
    if mode != "auto":
        return mode
    if manager is WeightManager.ZERO3:
        return "never"
    return "always" if manager is WeightManager.ZERO and torch.is_grad_enabled() else "auto"


def weight_manager(
    layer: nn.Module, linear: nn.Module, trained: Tensor, offloaded: bool | None = None
) -> WeightManager:
    """Find out who manages the weights of a layer, as it is now.

    Args:
        layer: the layer of experts.
        linear: one of its base's linears, or the base itself.
        trained: one of the active adapter's parameters.
        offloaded: what `is_offloaded` says of the layer, if it was asked already.
    """
    if is_under_fsdp(layer):
        return WeightManager.FSDP
    weight = linear._parameters.get("weight")  # not by its brackets, in which ZeRO-3 gathers it
    if hasattr(getattr(linear, "weight", None) if weight is None else weight, "ds_id"):
        return WeightManager.ZERO3
    if is_offloaded(layer) if offloaded is None else offloaded:
        return WeightManager.OFFLOAD
    return WeightManager.ZERO if hasattr(trained, "_hp_mapping") else WeightManager.LAYER


def is_under_fsdp(module: nn.Module) -> bool:
    """Tell whether FSDP 1 or 2 manages a module's parameters: both mark every module inside of what they shard."""
    return module.__dict__.get("_is_fsdp_managed_module") is True


def is_dtensor(tensor: object) -> bool:
    """Tell whether a tensor is a part of a larger one; asked by name, as the class is slow to import."""
    return type(tensor).__name__ == "DTensor"


def true_shape(tensor: Tensor) -> torch.Size:
    """Return a tensor's shape, also where ZeRO-3 has taken its elements away and left it with none."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """Have a module's parameters whole inside the block, where ZeRO-3 partitioned or accelerate offloaded them.

    All ranks have to enter it. What was gathered by the caller already stays so.
    """
    partitioned = [p for p in module.parameters() if _is_partitioned(p)]
    with onloaded(module):
        if not partitioned:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            yield


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE"


# --- refusals --------------------------------------------------------------------------------------------------------


def check_unsharded(module: nn.Module, name: str) -> None:
    """Refuse a module that no adapter can be attached to any more, as its weights are shards.

    Args:
        module: an MLP, a linear, or a layer that has adapters already.
        name: what to call it in the message.

    Raises:
        TypeError: says who sharded it, and that adapters are attached first.
    """
    if is_under_fsdp(module):
        raise TypeError(
            f"{name} is sharded by FSDP already, which knows nothing of parameters that come later: they would be "
            f"neither sharded nor kept alike on all ranks; {ATTACH_FIRST}"
        )
    if any(type(child._parameters).__name__ == "ZeROOrderedDict" for child in module.modules()):
        raise TypeError(
            f"{name} is run by a DeepSpeed ZeRO-3 engine already, whose optimizer knows nothing of parameters that "
            f"come later; {ATTACH_FIRST}"
        )
    for parameter_name, parameter in module.named_parameters():
        if is_dtensor(parameter.data):
            raise TypeError(
                f"{name}.{parameter_name} is split over devices by tensor parallelism (a DTensor, "
                f"{_placements(parameter)}); {TENSOR_PARALLEL}"
            )


def check_whole(layer: nn.Module, tensors: Iterable[object]) -> None:
    """Refuse a layer whose forward would compute with shards: something below it was split by itself.

    Args:
        layer: the layer of experts.
        tensors: what its forward reads.

    Raises:
        RuntimeError: says what was split, and by whom.
    """
    if any(is_dtensor(tensor) for tensor in tensors):
        raise _split_below(layer)


def check_nothing_wrapped(layer: nn.Module) -> None:
    """Refuse (``RuntimeError``) a layer with FSDP-wrapped modules inside: FSDP 1 leaves tensors without elements."""
    if _sharded_below(layer):
        raise _split_below(layer)


def check_root_gathered(model: nn.Module) -> None:
    """Refuse a model that runs past the FSDP root around it, as ``generate`` of a sharded PEFT model does.

    The root gathers the embedding and the head when it is called itself; a method of a module inside of it does not
    call it.

    Raises:
        RuntimeError: says which call makes ``generate`` work.
    """
    if not is_under_fsdp(model) or not hasattr(model, "get_input_embeddings"):
        return
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not is_dtensor(getattr(embedding, "weight", None)):
        return
    wrapper: Any = sys.modules["torch.distributed.fsdp"].FSDPModule
    inner = (module for module in model.modules() if isinstance(module, wrapper))
    if any(embedding is part for module in inner for part in module.modules()):
        return  # gathered when that one is called
    raise RuntimeError(
        f"this {type(model).__name__} runs inside of a model that FSDP sharded, without that model being called: its "
        "embedding was not gathered. For generate() under FSDP2 call "
        "torch.distributed.fsdp.register_fsdp_forward_method(model, 'generate') once on the model that was passed to "
        "fully_shard last (the PeftModel), and generate on all ranks at once"
    )


def _split_below(layer: nn.Module) -> RuntimeError:
    kind, parts = type(layer).__name__, _sharded_below(layer)
    if not parts:
        return RuntimeError(
            f"this {kind} reads weights that tensor parallelism has split over devices since its adapters were "
            f"attached; {TENSOR_PARALLEL}"
        )
    return RuntimeError(
        f"this {kind} is sharded in parts: FSDP was applied to {some(parts, 3)} inside of it. FSDP gathers a "
        "module's weights when that module is called, and this layer reads those of its projections, routers and "
        "experts without calling them. Apply fully_shard to whole decoder layers, or to this layer as a whole, and to "
        "nothing in it (under FSDP 1 Trainer wraps routers of PEFT models by itself: set fsdp_version: 2)"
    )


def _sharded_below(layer: nn.Module) -> list[str]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has sharded nothing
    if fsdp is None:
        return []
    wrappers = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return [name for name, module in layer.named_modules() if name and isinstance(module, wrappers)]


def _placements(parameter: Any) -> str:
    return f"{', '.join(map(str, parameter.placements))} on a mesh of {parameter.device_mesh.size()}"

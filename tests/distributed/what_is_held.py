"""What one process holds of a model that a Trainer trains: which wrapper it is in, and how many bytes of what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer


def what_is_held(trainer: Trainer) -> dict[str, Any]:
    """The wrapper, how it shards, and this process's bytes of weights and of optimizer state between two steps."""
    model: nn.Module = trainer.model
    plugin = trainer.accelerator.state.deepspeed_plugin
    base = [p for p in model.parameters() if not p.requires_grad]
    adapter = [p for p in model.parameters() if p.requires_grad]
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "fsdp units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "zero stage": None if plugin is None else plugin.zero_stage,
        "base weights": sum(_bytes(p) for p in base),
        "adapter weights": sum(_bytes(p) for p in adapter),
        "adapter dtypes": {str(p.dtype) for p in adapter},
        "optimizer state": _optimizer_state(trainer),
    }


def _bytes(tensor: Tensor) -> int:
    """Of the part that this process holds."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:  # not gathered now, as all but small ones
        tensor = tensor.ds_tensor
    return tensor.numel() * tensor.element_size()


def _optimizer_state(trainer: Trainer) -> int:
    """Of the optimizer's moments, and of the fp32 copy of the weights that DeepSpeed keeps beside them."""
    if trainer.is_deepspeed_enabled:
        wrapper = trainer.model_wrapped.optimizer
        masters = getattr(wrapper, "single_partition_of_fp32_groups", None)
        masters = wrapper.fp32_partitioned_groups_flat if masters is None else masters
        return sum(map(_bytes, masters)) + _moments(wrapper.optimizer)
    return _moments(trainer.optimizer.optimizer)


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """All tensors of the state but the step counters."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(_bytes(t) for t in tensors if t.dim())

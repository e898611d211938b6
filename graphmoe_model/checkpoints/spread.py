"""Loading into parameters that are spread over processes: by DeepSpeed ZeRO-3 (gathered for it) or FSDP2 (sharded)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor, nn

from graphmoe_model.checkpoints.tensor_names import tree_tensors, with_wrapped_modules
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.module_names import plain_name


class _Loading:
    """One load into a model: ZeRO-3's parameters, which are whole while it writes to them, and the new values."""

    def __init__(self, assigns: bool) -> None:
        self.assigns = assigns
        self.gathered: Any = None
        self.values: list[tuple[Tensor, Tensor]] = []

    def gather(self, values: list[tuple[Tensor, Tensor]]) -> None:
        """Make parameters whole until the load is over; every rank calls it with the same ones."""
        if self.assigns:
            raise ValueError(
                "low_cpu_mem_usage=True puts other parameters in the place of the model's, which DeepSpeed ZeRO-3 "
                "manages; leave it out"
            )
        import deepspeed  # it is there: it made the parameters

        self.values = values
        self.gathered = deepspeed.zero.GatheredParameters([parameter for parameter, _ in values], modifier_rank=0)
        self.gathered.__enter__()

    def finish(self) -> None:
        """Spread the parameters again, with rank 0's values; the optimizer's full precision copies get them too."""
        if self.gathered is None:
            return
        self.gathered.__exit__(None, None, None)
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in self.values:
            if hasattr(parameter, "_z3_optimizer"):
                safe_set_full_fp32_param(parameter, value.to(parameter.device))


_loading: ContextVar[_Loading | None] = ContextVar("the load that is going on", default=None)


def load_into_spread(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``set_peft_model_state_dict`` for parameters that are spread, and for modules inside of other wrappers.

    Under ZeRO-3 what it writes to is whole meanwhile. Modules that activation checkpointing or torch.compile is around
    are found by their plain names.
    """

    @wraps(load)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(getattr(model, "peft_config", {}).get(adapter_name), GraphMoEConfig):
            return load(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        state = with_wrapped_modules(model, peft_model_state_dict)
        with _finished(_Loading(assigns=kwargs.get("low_cpu_mem_usage", args[1] if len(args) > 1 else False))):
            return load(model, state, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


@contextmanager
def _finished(loading: _Loading) -> Iterator[None]:
    token = _loading.set(loading)
    try:
        yield
    finally:
        _loading.reset(token)
        loading.finish()


def loaded_in_place(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prepare a model for a state dict that fits it, and return what ``load_state_dict`` then takes.

    ZeRO-3's parameters are gathered until `load_into_spread` is done; for FSDP2's the values are sharded as they are,
    without communication.

    Raises:
        RuntimeError: ZeRO-3 spreads the parameters, and ``set_peft_model_state_dict`` was imported too early to be
            wrapped.
    """
    tree = tree_tensors(model)
    targets = {name: tree[plain_name(name)][1] for name in state if plain_name(name) in tree}
    managed = [(targets[name], value) for name, value in state.items() if hasattr(targets.get(name), "ds_id")]
    if managed:
        loading = _loading.get()
        if loading is None:
            raise RuntimeError(
                "under DeepSpeed ZeRO-3 the parameters are gathered while they are loaded, which this function, "
                "imported from PEFT before graphmoe_model was, does not do; import graphmoe_model first"
            )
        loading.gather(managed)
    return {name: _sharded(value, targets[name]) if name in targets else value for name, value in state.items()}


def _sharded(value: Tensor, target: Tensor) -> Tensor:
    """Shard a whole tensor as FSDP2 keeps the target; every rank has read it, so it takes its part by itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    local = value.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)

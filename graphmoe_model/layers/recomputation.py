"""Activation checkpointing runs a layer a second time, in the backward pass: the second run must be the first again.

A layer's graph depends on which adapter is active, on its dropout and on its scaling. Without checkpointing these may
change between a forward and its backward pass; with it, the layer would be differentiated in another state than it ran
in. The original graph's nodes know what they were made with, so `same_run` compares, and raises. With dropout the graph
depends on the random numbers too, which a wrapper may leave where they are (``preserve_rng_state=False``): the second
run then draws other masks. The generator's state tells, which the host knows without asking a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from graphmoe_model.routing.record import in_backward

_OTHER_MASKS = (
    "this layer has dropout, and activation checkpointing ran it again in the backward pass with other random numbers "
    "than in the forward, so the gradients would be those of other dropout masks: the checkpointing wrapper was made "
    "with preserve_rng_state=False, as Accelerate does for FSDP's activation_checkpointing. Turn that off "
    "(fsdp_activation_checkpointing: false) and set gradient_checkpointing=True in Trainer's arguments, or call "
    "model.gradient_checkpointing_enable() before sharding, or set lora_dropout=0"
)


class Run(NamedTuple):
    """What a forward of a layer depends on besides tensors: the active adapter's name, its dropout rate and scaling."""

    adapter: str | None
    dropout: float
    scaling: float


class Repeats:
    """The forwards of a layer that checkpointing has run again in one backward pass.

    Attributes:
        backward: the backward pass; -1 before the first one.
        random: what `random_state` was after each of them.
    """

    def __init__(self) -> None:
        self.backward = -1
        self.random: set[int | None] = set()

    def add(self, random: int | None) -> None:
        """Count one in, in the backward pass that is running.

        Raises:
            RuntimeError: reentrant checkpointing runs it, with dropout, and leaves the random numbers where they are.
        """
        now = torch._C._current_graph_task_id()
        if self.backward != now:
            self.backward, self.random = now, set()
        self.random.add(random)
        reentrant = torch._C._current_autograd_node()
        if random is not None and getattr(reentrant, "preserve_rng_state", True) is False:
            raise RuntimeError(_OTHER_MASKS)


def random_state(device: torch.device) -> int | None:
    """Tell apart the states of the generator that a device's dropout draws from; None where the host does not know."""
    if device.type == "cpu":
        state = torch.default_generator.get_state()
        return hash(ctypes.string_at(state.data_ptr(), state.numel()))  # 5 KB, without a copy tensor by tensor
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        generator = torch.cuda.default_generators[device.index]
        return hash((generator.initial_seed(), generator.get_offset()))
    return None


class RepeatedLayer(Protocol):
    """A layer whose forwards checkpointing may run again."""

    repeats: Repeats

    def run(self) -> Run:
        """Return what a forward depends on now besides tensors."""


class _SameRun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, layer: RepeatedLayer, run: Run, random: int | None) -> Tensor:
        ctx.layer, ctx.run, ctx.random = layer, run, random
        ctx.own = y.new_empty(1)
        ctx.save_for_backward(ctx.own)  # to ask for it has a checkpointed layer run again, and gives another one
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer: RepeatedLayer = ctx.layer
        try:
            (saved,) = ctx.saved_tensors
        except CheckpointError as error:
            _check(ctx.run, layer.run(), error)
            raise
        if layer.repeats.backward == torch._C._current_graph_task_id():
            _check(ctx.run, layer.run(), None)
            drew_otherwise = ctx.random is not None and ctx.random not in layer.repeats.random
            if drew_otherwise and saved.data_ptr() != ctx.own.data_ptr():  # the second: a run that was not repeated
                raise RuntimeError(_OTHER_MASKS)
        return gradients[0], None, None, None


def same_run(y: Tensor, layer: RepeatedLayer) -> Tensor:
    """A layer's output y, just computed; its backward pass raises if checkpointing ran the layer again otherwise.

    Raises:
        RuntimeError: in the backward pass: the layer is in another state than it ran in, both of which are named, or
            its dropout drew from other random numbers.
    """
    if torch.compiler.is_compiling():
        return y
    differentiated, repeats = torch.is_grad_enabled() and y.requires_grad, in_backward()
    if not differentiated and not repeats:
        return y
    run = layer.run()
    random = random_state(y.device) if run.dropout > 0 and differentiated else None
    if repeats:
        layer.repeats.add(random)
    if not differentiated:
        return y
    result: Tensor = _SameRun.apply(y, layer, run, random)
    return result


def _check(first: Run, now: Run, error: Exception | None) -> None:
    if first == now:
        return
    if first.adapter != now.adapter:
        was, is_now = (f"the adapter {r.adapter!r} active" if r.adapter else "adapters disabled" for r in (first, now))
        what = f"the forward ran with {was}, its backward pass with {is_now}"
    elif first.scaling != now.scaling:
        what = (
            f"the forward ran with the scaling {first.scaling:.6g}, its backward pass with {now.scaling:.6g}: "
            "rescale_adapter_scale or set_scale changed it in between"
        )
    else:
        what = (
            f"the forward ran with dropout {first.dropout}, its backward pass with {now.dropout}: the model went "
            "between model.train() and model.eval() in between"
        )
    raise RuntimeError(
        f"{what}; activation checkpointing repeats the forward in the backward pass, so the gradients would be those "
        "of another computation. Call backward() in the state that the forward ran in, or turn gradient checkpointing "
        "off"
    ) from error

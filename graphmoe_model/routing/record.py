"""What a forward leaves behind about its routing, and what its layers must know about the batch to do so.

A layer hands over its routers' logits, which it computes in any case. Padding, statistics and losses are applied to
them outside of the layer: its graph is the same whether or not its routing is wanted, so activation checkpointing can
run it again in the backward pass, when the forward that it repeats is long over, without knowing anything about it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graphmoe_kernels import topk_softmax_routing
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.module_names import ROOT, plain_name
from graphmoe_model.routing.statistics import GlobalRouting, RoutingStatistics


class RecordedLayer(Protocol):
    """What is read of a layer that hands over its routers' logits."""

    routing_context: RoutingContext
    lora_graphmoe: nn.ModuleDict
    training: bool

    def active_name(self) -> str | None:
        """Return the name of the adapter that runs, or None."""

    def active_config(self) -> GraphMoEConfig | None:
        """Return that adapter's configuration, or None."""

    def router_shapes(self) -> dict[str, tuple[int, int]]:
        """Return [T, n] of each of that adapter's routers, by name relative to the layer."""


class RoutingCollector(Protocol):
    """What counts the routing of forwards, such as `graphmoe_model.routing.expert_load.ExpertLoad`."""

    def add(self, layer: Any, record: RoutingRecord) -> None:
        """Count one forward of a router of the layer."""


class RoutingRecord(NamedTuple):
    """One router in one forward of its layer.

    Attributes:
        logits: of every round, [N, n], differentiable.
        token_mask: [N] bool, False for padding; None if every token counts.
        top_k: experts per token and round.
        form: ``"topk"`` or ``"full"``, as in `graphmoe_kernels.topk_softmax_routing`.
        backend: which implementation routed.
        coefficient: weight of this router's loss in the model's.
        trains: whether the router's weight requires a gradient.
        layer: the layer that it is in.
        router: its name relative to the layer.
    """

    logits: tuple[Tensor, ...]
    token_mask: Tensor | None
    top_k: int
    form: str
    backend: str
    coefficient: float
    trains: bool
    layer: RecordedLayer
    router: str

    def statistics(self) -> RoutingStatistics:
        """Compute what Eq. 8 reads of this router, differentiable in the logits."""
        rounds = [
            topk_softmax_routing(
                logits, self.top_k, statistics=self.form, token_mask=self.token_mask, backend=self.backend
            )
            for logits in self.logits
        ]
        tokens_per_expert = torch.stack([own.tokens_per_expert for own in rounds])  # type: ignore[misc]  # [T, n]
        probability_sums = torch.stack([own.probability_sums for own in rounds])  # type: ignore[misc]  # [T, n]
        if self.token_mask is None:  # filled on the device: no copy from the host
            num_tokens = torch.full((), self.logits[0].shape[0], device=tokens_per_expert.device)
        else:
            num_tokens = self.token_mask.sum()
        return RoutingStatistics(tokens_per_expert, probability_sums, num_tokens)

    def detach(self) -> RoutingRecord:
        """Return the same numbers without the graph behind them."""
        return self._replace(logits=tuple(own.detach() for own in self.logits))

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingRecord:
        """Copy it detached: a model can be copied after a forward, the forward's graph cannot."""
        mask = None if self.token_mask is None else self.token_mask.clone()
        return self._replace(logits=tuple(own.detach().clone() for own in self.logits), token_mask=mask)


@dataclass
class ForwardRouting:
    """One forward of a model: its padding, and the records of its routers.

    Attributes:
        token_mask: [B, P] or None; 0 where a token is padding.
        differentiable: it ran in training mode with gradients enabled.
        repeats: it runs inside a backward pass, where checkpointing repeats a forward of before.
        alone: the decoder was called without the model around it.
        frame: the Python frame in which it runs, until it ends; None in a compiled graph. Held, and not known by its
            address, which a frame after it may get.
        outer: the forward inside which it runs, where a hook or a loss calls the model again.
        records: of the routers that a loss reads.
        in_loss: its router loss is part of its ``outputs.loss``.
        unused: its router loss is part of no loss so far.
        all_processes: the sums over processes, where the loss is one of all their tokens.
    """

    token_mask: Tensor | None = None
    differentiable: bool = False
    repeats: bool = False
    alone: bool = False
    frame: FrameType | None = None
    outer: ForwardRouting | None = None
    records: list[RoutingRecord] = field(default_factory=list)
    in_loss: bool = False
    unused: bool = False
    all_processes: GlobalRouting | None = None

    def runs(self) -> bool:
        """Tell whether its frame is on this thread's stack: an interrupt (Ctrl-C) ends a forward without any hook."""
        if self.frame is None or torch.compiler.is_compiling():
            return True
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def release(self) -> None:
        """Let go of the graph, for a forward whose loss has it."""
        self.records = [record.detach() for record in self.records]
        if self.all_processes is not None:
            self.all_processes = self.all_processes.detach()

    def has_routers(self) -> bool:
        """Tell whether it has a router loss, here or on another process."""
        return bool(self.records) or self.all_processes is not None


class _Thread(threading.local):
    """What each thread has of its own: the forward that it is in, and the last one that it repeated in backward."""

    def __init__(self) -> None:  # once per thread
        self.running: ForwardRouting | None = None
        self.repeated: ForwardRouting | None = None


class RoutingContext:
    """Shared by all layers of a model: which forward is running, and what the last ones recorded.

    Attributes:
        loads: the open `collect_routing` blocks; routing is counted for them although no loss needs it.
        trained: the last training forward with gradients enabled and an active adapter.
        seen: the last training forward with an active adapter, whether or not gradients were enabled.
    """

    def __init__(self) -> None:
        self.loads: list[RoutingCollector] = []
        self.trained: ForwardRouting | None = None
        self.seen: ForwardRouting | None = None
        self._thread = _Thread()
        self._traced: ForwardRouting | None = None  # Dynamo does not see what it writes to a thread's own attributes

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        """Give a copied model a context of its own, without forwards and without collectors."""
        return RoutingContext()

    def __reduce__(self) -> tuple[Any, ...]:
        return RoutingContext, ()

    def running(self) -> ForwardRouting | None:
        """Return the forward that this thread is in, or None between forwards."""
        if torch.compiler.is_compiling():  # a layer compiled alone runs inside a forward that is not
            return self._traced or self._thread.running
        forward = self._thread.running
        if forward is not None and not forward.runs():
            forward = self._thread.running = None
        return forward or self._traced

    def start(self, forward: ForwardRouting) -> None:
        """Enter a forward, which may run inside another."""
        if torch.compiler.is_compiling():
            self._traced = forward
            return
        outer = self.running()
        forward.outer = None if outer is self._traced else outer
        self._thread.running = forward

    def finish(self) -> ForwardRouting | None:
        """Leave this thread's forward for the one around it, if any, and return it."""
        forward = None if torch.compiler.is_compiling() else self._thread.running
        if forward is None:
            forward, self._traced = self._traced, None
        else:
            self._thread.running, forward.outer, forward.frame = forward.outer, None, None
        return forward

    def keep(self, forward: ForwardRouting) -> None:
        """Remember a finished training forward with an active adapter."""
        if forward.repeats:
            self._thread.repeated = forward
            return
        self.seen = forward
        if forward.differentiable:
            self.trained = forward

    def last(self) -> ForwardRouting | None:
        """Return the forward whose loss is asked for: with gradients enabled the last that had them.

        In a backward pass, where a checkpointed function is repeated that asks for it, it is the one repeated.
        """
        if in_backward():
            forward, self._thread.repeated = self._thread.repeated, None
            return forward
        return self.trained if torch.is_grad_enabled() else self.seen

    def token_mask(self, x: Tensor) -> Tensor | None:
        """Return the running forward's padding mask for the tokens of x [B, P, D], as [N] bool; None if all count."""
        forward = self.running()
        mask = None if forward is None else forward.token_mask
        if mask is None or x.dim() != 3:
            return None
        if mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
            return None
        # A copy: whoever made the mask may write into it before the statistics are taken.
        return mask[:, -x.shape[1] :].reshape(-1).to(x.device, torch.bool, copy=True)

    def record(self, layer: RecordedLayer, records: list[RoutingRecord], *, trains: bool) -> ForwardRouting | None:
        """Take what a layer's routers did into the running forward.

        A layer that checkpointing runs again in the backward pass belongs to no running forward, and is not recorded:
        its first run was.

        Args:
            layer: a layer of the model.
            records: of its routers.
            trains: whether a loss will read them; `collect_routing` reads them in any case.

        Returns:
            For a layer that runs on its own, the forward that this was; None inside a model's forward.
        """
        forward, repeated = self.running(), in_backward()
        if forward is None and repeated:
            return None
        alone = None
        if trains:
            if forward is None:
                forward = alone = ForwardRouting(differentiable=torch.is_grad_enabled())
                self.keep(forward)
            forward.records += records
        if not repeated:
            for load in self.loads:
                for record in records:
                    load.add(layer, record)
        return alone


def routed_layers(model: nn.Module) -> dict[str, RecordedLayer]:
    """Find the layers that leave routing records, by their names in the base model.

    What PEFT and wrappers put into the names is removed.
    """
    named = model.named_modules()  # parents first: a wrapper that answers for its layer is replaced by the layer
    return {plain_name(name).rpartition(ROOT)[2]: m for name, m in named if hasattr(m, "routing_context")}


def contexts_of(layers: Iterable[Any]) -> list[RoutingContext]:
    """List the layers' contexts, each once."""
    return list({id(layer.routing_context): layer.routing_context for layer in layers}.values())


def in_backward() -> bool:
    """Tell whether autograd is running a backward pass in this thread, outside of a compiled graph.

    It is the check that ``torch.utils.checkpoint`` itself uses; a compiled graph keeps its own account of what it
    computes again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

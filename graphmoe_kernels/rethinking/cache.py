"""The fold kept between forwards in inference, and rebuilt when any of its sources has changed.

A stale fold is a wrong answer, so every use compares the sources' fingerprints, also inside a compiled graph: there the
comparison is a registered operator that refreshes the kept tensors in place when it has to. A graph that outlives the
process (`exporting`) gets none of that: it computes the fold from the weights that it is given.
"""

from __future__ import annotations

import functools
import itertools
import operator
import secrets
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from graphmoe_kernels._ops import add_op_namespace_prefix
from graphmoe_kernels.rethinking import streams
from graphmoe_kernels.rethinking.folding import FoldSettings, build_fold
from graphmoe_kernels.rethinking.kinds import LayerWeights
from graphmoe_kernels.rethinking.streams import StreamFill
from graphmoe_kernels.tracing import asked_while_tracing

Fingerprint = tuple[tuple[int, ...], tuple[Any, ...]]

# The start is drawn: a handle that was saved with a graph finds no cache of another process, rather than a wrong one.
_serial = itertools.count(secrets.randbits(62))
_optimizer_steps = 0
_caches: weakref.WeakValueDictionary[int, FoldCache] = weakref.WeakValueDictionary()


@asked_while_tracing  # Dynamo of torch 2.11 takes is_exporting() for True under torch.compile too
def exporting() -> bool:
    """Tell whether this call is being written into a graph for other processes: torch.export, ONNX, torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def fold_sources(weights: LayerWeights) -> list[Tensor]:
    """List every tensor that a layer's fold is computed from."""
    experts, base, gru = weights.experts, weights.base, weights.gru
    found = experts.lora.tensors()
    if gru is not None or experts.lora.magnitudes is not None:
        found += base.sources()
    else:
        bias = base.biases()[2]  # all of the base that the cast experts hold
        return found if bias is None else [*found, bias]
    return found if gru is None else [*found, *experts.routers(), *gru]


def fingerprint(tensors: list[Tensor]) -> Fingerprint:
    """What tells these tensors, as they are now, from any others: storage, version, dtype, device, shape.

    Two writes leave no trace in it: through ``.data``, and to a tensor created inside ``torch.inference_mode`` (such
    tensors count no versions). See `FoldCache.drop`.
    """
    addresses = tuple(map(Tensor.data_ptr, tensors))
    try:
        return addresses, tuple(map(_state, tensors))
    except RuntimeError:  # an inference tensor refuses to tell its version
        return addresses, tuple((0 if t.is_inference() else t._version, *_state_but_version(t)) for t in tensors)


# By functions that loop and read in C: every forward that uses a kept fold asks.
_state = operator.attrgetter("_version", "dtype", "device", "shape")
_state_but_version = operator.attrgetter("dtype", "device", "shape")


class _Key(NamedTuple):
    """What a fold was computed from: settings, the count of optimizers' steps, `fingerprint`."""

    settings: FoldSettings
    optimizer_steps: int
    sources: Fingerprint


@functools.cache
def _watch_optimizers() -> None:
    """Count the steps of every optimizer from now on; once for all caches, and not at import."""

    def count(*_: object) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


@dataclass(eq=False)
class _Kept:
    """One fold that a cache holds.

    Attributes:
        fold: never replaced by another one: who has it, has a whole fold.
        key: what it was computed from; None while its tensors are being filled, and once it is dropped.
        held: the sources, so that a freed tensor's address cannot come back as another tensor's.
        fill: the work that filled its tensors.
    """

    fold: Any
    key: _Key | None = None
    held: list[Tensor] = field(default_factory=list)
    fill: StreamFill = field(default_factory=lambda: StreamFill([]))

    def forget(self) -> None:
        self.key, self.held = None, []


class FoldCache:
    """One layer's fold for inference.

    Any optimizer's step ends it: PyTorch's fused optimizers, and others with kernels of their own, write without moving
    version counters. A copy (deepcopy, pickle) starts empty.

    Threads and CUDA streams may share it. A new fold gets tensors of its own, and who is computing with the old one
    keeps that; one thread builds it, while those that need it wait. Work on another stream than the one that filled
    the fold is put after the fill. A fold that a graph reads by its address (a CUDA graph captured with it, or the fold
    that a compiled graph made) stays in memory as long as the cache, and is filled again in place.

    Args:
        weights: gives the layer's weights as they are at the time of the call.
        sources: which of their tensors the fold is computed from.
        build: computes it, as `build_fold` does; what it gives has ``tensors()``.
    """

    def __init__(
        self,
        weights: Callable[[], Any],
        sources: Callable[[Any], list[Tensor]] = fold_sources,
        build: Callable[..., Any] = build_fold,
    ) -> None:
        self.weights, self.sources, self.build = weights, sources, build
        self._start()

    def _start(self) -> None:
        _watch_optimizers()
        self.fold: Any = None
        self._kept: _Kept | None = None  # read without the lock: one attribute, so that nobody sees two states of it
        self._captured: list[_Kept] = []
        self._compiled = False
        self._lock = threading.RLock()
        serial = next(_serial)
        _caches[serial] = self
        # A tensor, so that no compiled graph is specialised to one layer; on the CPU, where it is read without waiting.
        self.handle = torch.tensor(serial, device="cpu")

    def get(self, weights: Any, settings: FoldSettings) -> Any:
        """The fold of ``weights`` under ``settings``: the kept one if it is theirs, else a new one, then kept.

        In an exported graph (`exporting`) it is computed from the weights at every call, and nothing is kept.
        """
        if exporting():
            return self.build(weights, settings)
        sources = self.sources(weights)
        if not torch.compiler.is_compiling():
            return self.refresh(sources, weights, settings)
        if self.fold is None:  # the first compiled call computes its fold in the graph; nothing vouches for it later
            self.fold, self._compiled = self.build(weights, settings, copy=True), True
            return self.fold
        refresh_fold(self.handle, self.fold.tensors(), sources, settings.scale, settings.candidate_input)
        return self.fold

    def refresh(self, sources: list[Tensor], weights: Any, settings: FoldSettings) -> Any:
        """`get` outside of a compiled graph.

        Raises:
            RuntimeError: there is no fold of these weights, in a CUDA graph's capture, where none can be computed.
        """
        key = _Key(settings, _optimizer_steps, fingerprint(sources))
        kept, captures = self._kept, streams.capturing()
        if kept is None or kept.key != key:
            if captures:
                raise RuntimeError(
                    "the layer's fold would be built inside a CUDA graph's capture, where nothing is computed; run the "
                    "layer once in evaluation mode, with the weights it is to have, before capturing it"
                )
            with self._lock:
                kept = self._kept
                if kept is None or kept.key != key:  # no other thread has built it in the meantime
                    kept = self._rebuild(weights, settings)
                    if kept is self._kept:
                        # Detached: a parameter given other storage (`.to`, `param.data = ...`) would let go of the old.
                        kept.held = [t.detach() for t in sources]
                        kept.key = key  # last: from here on other threads take it
        if captures:
            self._keep_for_graph(kept)
        else:
            kept.fill.wait()
        return kept.fold

    def _rebuild(self, weights: Any, settings: FoldSettings) -> _Kept:
        """A new fold, in `_kept` unless its tensors are no plain ones; to be called with the lock."""
        with torch.inference_mode(False), torch.no_grad():
            fold = self.build(weights, settings, copy=True)
            if any(type(t) is not Tensor for t in fold.tensors()):
                return _Kept(fold)  # of a mode that computes shapes alone (FakeTensorMode), or records: no later call's
            if self._kept is not None:
                self._kept.forget()
            read_by_graphs = list(self._captured)
            if self._compiled and self.fold is not None:
                made = self._kept
                read_by_graphs.append(made if made is not None and made.fold is self.fold else _Kept(self.fold))
            kept = next((own for own in read_by_graphs if _alike(own.fold.tensors(), fold.tensors())), None)
            if kept is None:
                kept = _Kept(fold)
            else:
                kept.fill.wait()  # two streams' fills of one memory, in their order
                for old, new in zip(kept.fold.tensors(), fold.tensors(), strict=True):
                    old.copy_(new)
            kept.fill = StreamFill(kept.fold.tensors())
        self._kept, self.fold = kept, kept.fold
        return kept

    def _keep_for_graph(self, kept: _Kept) -> None:
        """Have a fold whose address goes into a CUDA graph stay there."""
        with self._lock:
            if all(own is not kept for own in self._captured):
                self._captured.append(kept)

    def drop(self) -> None:
        """Forget the fold: after a write that leaves no trace in `fingerprint`, or to free its memory.

        Where a graph reads the fold's tensors they stay, as they are, and are filled again at next use.
        """
        with self._lock:  # a build that began before the write must not vouch for itself after it
            if self._kept is not None:
                self._kept.forget()
            if not self._compiled:
                self._kept = self.fold = None

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "sources": self.sources, "build": self.build}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.weights, self.sources, self.build = state["weights"], state["sources"], state["build"]
        self._start()


def _alike(kept: list[Tensor], new: list[Tensor]) -> bool:
    def layout(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
        return [(t.shape, t.dtype, t.device) for t in tensors]

    return layout(kept) == layout(new)


# It asks the host whether weights changed: a replayed CUDA graph would not.
@torch.library.custom_op(
    add_op_namespace_prefix("refresh_fold"), mutates_args=("fold",), tags=(torch.Tag.cudagraph_unsafe,)
)
def refresh_fold(handle: Tensor, fold: list[Tensor], sources: list[Tensor], scale: float, candidate_input: str) -> None:
    """Bring the tensors of a cache's fold up to date with ``sources``; does nothing if they are.

    ``handle`` is `FoldCache.handle`. ``fold`` are that cache's tensors, or copies that a functionalised graph made.
    """
    cache = _caches.get(int(handle))
    if cache is None:
        raise RuntimeError(
            "this graph reads a fold that was kept by another process, or by a layer that no longer exists, so its "
            "weights cannot be looked up; export the model anew (torch.export builds folds inside the graph), or "
            "compile it in the process that runs it"
        )
    settings = FoldSettings(fold[0].dtype, scale, candidate_input)
    kept = cache.refresh(sources, cache.weights(), settings)
    for mine, theirs in zip(fold, kept.tensors(), strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)


@refresh_fold.register_fake
def _(handle, fold, sources, scale, candidate_input):
    return None

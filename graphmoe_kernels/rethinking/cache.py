"""The fold kept between forwards in inference, and rebuilt when any of its sources has changed.

A stale fold is a wrong answer, so every use compares the sources' fingerprints, also inside a compiled graph: there the
comparison is a registered operator that refreshes the kept tensors in place when it has to. A graph that outlives the
process (`exporting`) gets none of that: it computes the fold from the weights that it is given.
"""

from __future__ import annotations

import functools
import itertools
import secrets
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from graphmoe_kernels.rethinking.folding import FoldSettings, build_fold
from graphmoe_kernels.rethinking.weights import LayerWeights
from graphmoe_kernels.tracing import asked_while_tracing

Source = tuple[int, int, torch.dtype, torch.device, tuple[int, ...]]

# The start is drawn: a handle that was saved with a graph finds no cache of another process, rather than a wrong one.
_serial = itertools.count(secrets.randbits(62))
_optimizer_steps = 0
_caches: weakref.WeakValueDictionary[int, FoldCache] = weakref.WeakValueDictionary()


@asked_while_tracing  # Dynamo of torch 2.11 takes is_exporting() for True under torch.compile too
def exporting() -> bool:
    """Tell whether this call is being written into a graph for other processes: torch.export, ONNX, torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def fold_sources(weights: LayerWeights) -> list[Tensor]:
    """Every tensor that a layer's fold is computed from."""
    found: list[Tensor | None] = list(weights.experts)
    if weights.gru is not None or weights.experts.magnitudes is not None:
        found += weights.base.sources()
    else:
        found.append(weights.base.biases()[2])  # all of the base that prepared experts hold
    if weights.gru is not None:
        found += [*weights.routers(), *weights.gru]
    return [t for t in found if t is not None]


def fingerprint(tensors: list[Tensor]) -> tuple[Source, ...]:
    """What tells these tensors, as they are now, from any others: storage, version, dtype, device, shape.

    Two writes leave no trace in it: through ``.data``, and to a tensor created inside ``torch.inference_mode`` (such
    tensors count no versions). See `FoldCache.drop`.
    """
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device, tuple(t.shape)) for t in tensors
    )


@functools.cache
def _watch_optimizers() -> None:
    """Count the steps of every optimizer from now on; once for all caches, and not at import."""

    def count(*_: object) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class FoldCache:
    """One layer's fold for inference.

    It holds its sources, so that a freed tensor's address cannot come back as another tensor's. Any optimizer's step
    ends it: PyTorch's fused optimizers, and others with kernels of their own, write without moving version counters. A
    copy (deepcopy, pickle) starts empty.

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
        self._key: tuple[FoldSettings, int, tuple[Source, ...]] | None = None
        self._held: list[Tensor] = []
        self._compiled = False
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
        """`get` outside of a compiled graph. Tensors of the right size are written in place and keep their address."""
        key = (settings, _optimizer_steps, fingerprint(sources))
        if self.fold is not None and key == self._key:
            return self.fold
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the layer's fold would be built inside a CUDA graph's capture, where nothing is computed; run the "
                "layer once in evaluation mode, with the weights it is to have, before capturing it"
            )
        with torch.inference_mode(False), torch.no_grad():
            fold = self.build(weights, settings, copy=True)
            if any(type(t) is not Tensor for t in fold.tensors()):
                return fold  # of a mode that computes shapes alone (FakeTensorMode), or records: no later call's
            if self.fold is not None and _alike(self.fold.tensors(), fold.tensors()):
                for kept, new in zip(self.fold.tensors(), fold.tensors(), strict=True):
                    kept.copy_(new)
            else:
                self.fold = fold
        # Detached: a parameter given other storage (`.to`, `param.data = ...`) would let go of the old one.
        self._key, self._held = key, [t.detach() for t in sources]
        return self.fold

    def drop(self) -> None:
        """Forget the fold: after a write that leaves no trace in `fingerprint`, or to free its memory.

        A compiled graph keeps reading the fold's tensors, so in that case they stay and are filled again at next use.
        """
        self._key, self._held = None, []
        if not self._compiled:
            self.fold = None

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
@torch.library.custom_op("graphmoe::refresh_fold", mutates_args=("fold",), tags=(torch.Tag.cudagraph_unsafe,))
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

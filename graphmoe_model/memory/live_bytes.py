"""How many bytes the tensors take that a piece of code makes: now, and at most."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make and have not been freed yet.

    It counts real tensors and those of ``FakeTensorMode``, which have sizes and no memory, alike. What an operator
    makes and frees inside of itself is not seen.

    Attributes:
        now: bytes of the storages that live.
        peak: the most that ``now`` has been, since the start or the last `restart`.

    Args:
        known: modules whose parameters and buffers were there before, and views of them, do not count.
    """

    def __init__(self, *known: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._living: dict[int, weakref.ref] = {}
        for module in known:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._watch(tensor, 0)

    def restart(self) -> None:
        """Let the peak begin anew, at what lives now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return out

    def _watch(self, tensor: Tensor, nbytes: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living:
            return
        size = storage.nbytes() if nbytes is None else nbytes

        def freed(_: object) -> None:
            del self._living[key]
            self.now -= size

        self._living[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

"""Memory that one CUDA stream fills and that work on other streams reads."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing() -> bool:
    """Tell whether the work of this thread is being written into a CUDA graph, so that nothing is computed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class StreamFill:
    """Tensors of one device, filled by the work that this thread has queued so far on its current stream.

    On devices without CUDA streams there is nothing to wait for.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = [t for t in tensors if t.is_cuda]
        self._event: torch.cuda.Event | None = None
        self._ordered: set[int] = set()  # streams whose later work comes after the fill
        if self._tensors:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            self._event = stream.record_event()
            self._ordered.add(stream.cuda_stream)

    def wait(self) -> None:
        """Put the current stream's later work after the fill, and keep the memory from being reused before that work.

        Not for a stream that is being captured, which cannot wait for what lies outside of its graph.
        """
        if self._event is None:
            return
        stream = torch.cuda.current_stream(self._tensors[0].device)
        if stream.cuda_stream in self._ordered:
            return
        stream.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(stream)
        self._ordered.add(stream.cuda_stream)

"""Counters of the kernels that sum their splits: zero before a launch, zero again after it, kept for the next one.

A kernel's programs count who comes last (`reduce.comes_last`), and the last one sets the counter back. Launches share
counters only where one runs after the other:

- each thread keeps its own for every device and stream, and a stream runs its kernels in order;
- a launch that a CUDA graph captures gets counters of its own, never given out again: its replays may run beside any
  other work. They come from a reserve that was set to zero before the capture; where there is none (nothing ran before
  the capture), or it is used up, they are made in the graph, whose every replay sets them to zero first;
- under a mode that sees every operation (fake tensors, tracing) nothing is kept.

A launch that fails may leave its counters anywhere: `forget` drops them. (A kernel that a GPU aborts takes the whole
CUDA context of its process with it.)
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Counters kept from the start: few calls need more.
KEPT = 1024
# Counters for captured launches, 1 MiB per device: one of up to 16 tokens of a Llama-3-8B takes 29.
RESERVED = 2**18


class _Kept(threading.local):
    def __init__(self) -> None:
        self.by_stream: dict[tuple[torch.device, int], Tensor] = {}


class _Reserve:
    """Zeros that are given out once each."""

    def __init__(self, device: torch.device) -> None:
        self.zeros = torch.zeros(RESERVED, dtype=torch.int32, device=device)
        self.used = 0
        torch.cuda.synchronize(device)  # once per device: a graph may be replayed on any stream

    def take(self, number: int) -> Tensor | None:
        """The next ``number`` of them, or None where there are not so many."""
        with _lock:
            start, self.used = self.used, self.used + number
        return self.zeros[start : start + number] if start + number <= RESERVED else None


_kept = _Kept()
_reserves: dict[torch.device, _Reserve] = {}
_lock = threading.Lock()


def counters(device: torch.device, number: int) -> Tensor:
    """Return ``number`` or more zeros, int32, for a launch on the device's current stream."""
    if torch._C._len_torch_dispatch_stack() > 0 or device.type == "meta":
        return torch.zeros(number, dtype=torch.int32, device=device)
    stream = 0
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if _capturing(device):
            return _captured(device, number)
    kept = _kept.by_stream.get((device, stream))
    if kept is None or kept.numel() < number:
        kept = _kept.by_stream[device, stream] = _new(device, max(number, KEPT))
    return kept


def forget(device: torch.device) -> None:
    """Drop this thread's counters of a device: a launch has failed, and nobody knows what they hold."""
    for key in [key for key in _kept.by_stream if key[0] == device]:
        del _kept.by_stream[key]


def _new(device: torch.device, number: int) -> Tensor:
    if device.type == "cuda" and device not in _reserves:
        _reserves.setdefault(device, _Reserve(device))
    return torch.zeros(number, dtype=torch.int32, device=device)


def _capturing(device: torch.device) -> bool:
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _captured(device: torch.device, number: int) -> Tensor:
    reserve = _reserves.get(device)
    own = None if reserve is None else reserve.take(number)
    return torch.zeros(number, dtype=torch.int32, device=device) if own is None else own

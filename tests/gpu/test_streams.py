"""A kept fold shared by CUDA streams and threads: filled on one stream, read on others, freed while they still read."""

from __future__ import annotations

import threading

import pytest
import torch

from graphmoe_kernels.testing import relative_error
from tests.gpu.layers import MARKS, make

pytestmark = MARKS

DELAY = 300_000_000  # clock cycles, at least 0.1 s: longer than the host needs to queue all that follows
SAME = 0.02  # bf16, and cuBLAS may choose other products on another stream; a stale fold is off by far more


class Streams:
    """A layer that has run on two streams, so that its kernels are compiled and both have memory to reuse.

    Attributes:
        x, y: an input, and what the layer gives for it with its weights as they are now.
    """

    def __init__(self) -> None:
        self.layer = make(rounds=3, dtype="bf16")
        self.ffn = self.layer.fused.eval()
        self.filling, self.reading = torch.cuda.Stream(), torch.cuda.Stream()
        self.x, _ = self.layer.input(16)
        torch.cuda.synchronize()
        for stream in (self.reading, self.filling):
            self.ffn.refold()
            before = self.run(stream)
        torch.cuda.synchronize()
        with torch.no_grad():
            for parameter in self.layer.leaves().values():
                parameter.mul_(1.25)
            self.y = self.layer.sharing("auto", "triton").eval()(self.x)
        torch.cuda.synchronize()
        assert not relative_error(self.y, before) <= 5 * SAME, "what the memory held before is told from what it holds"

    def run(self, stream: torch.cuda.Stream, delay: int = 0) -> torch.Tensor:
        """Queue the layer's forward on a stream, behind ``delay`` clock cycles of waiting."""
        with torch.cuda.stream(stream), torch.no_grad():
            if delay:
                torch.cuda._sleep(delay)
            return self.ffn(self.x)


def test_a_fold_is_read_after_it_was_filled_on_another_stream():
    """The fill waits behind a delay in its own stream: who reads at once reads what the memory held before."""
    streams = Streams()
    filled = streams.run(streams.filling, DELAY)
    read = streams.run(streams.reading)
    torch.cuda.synchronize()
    assert relative_error(filled, streams.y) <= SAME
    assert relative_error(read, streams.y) <= SAME


def test_a_captured_fold_is_refilled_before_another_stream_reads_it():
    """The same for a fold that a graph keeps at its address, and that is filled in place."""
    streams = Streams()
    with torch.no_grad():
        streams.ffn(streams.x)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            streams.ffn(streams.x)
        for parameter in streams.layer.leaves().values():
            parameter.div_(1.25)
        expected = streams.layer.sharing("auto", "triton").eval()(streams.x)
    torch.cuda.synchronize()
    streams.run(streams.filling, DELAY)
    read = streams.run(streams.reading)
    torch.cuda.synchronize()
    assert relative_error(read, expected) <= SAME


def test_a_fold_that_another_stream_still_reads_is_not_overwritten():
    """Let go of on the host while a stream has reads of it queued: its memory must not be given away before them."""
    streams = Streams()
    streams.run(streams.filling)
    shapes = [(t.shape, t.dtype) for t in streams.ffn._folds["default"].fold.tensors()]
    torch.cuda.synchronize()
    read = streams.run(streams.reading, DELAY)
    streams.ffn.refold()
    with torch.cuda.stream(streams.filling):
        device = streams.x.device
        poison = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape, dtype in shapes for _ in range(3)]
    torch.cuda.synchronize()
    assert relative_error(read, streams.y) <= SAME
    del poison


@pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "a stream per thread"])
def test_threads_that_refold_share_a_layer(own_streams):
    """Serving threads, one of which calls eval() before every request: each gets the layer's own output."""
    streams = Streams()
    failures: list[object] = []

    def serve(index: int) -> None:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        try:
            for _ in range(30):
                if index == 0:
                    streams.ffn.eval()
                y = streams.run(stream)
                stream.synchronize()
                if not relative_error(y, streams.y) <= SAME:
                    failures.append(f"thread {index}: off by {relative_error(y, streams.y)}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []

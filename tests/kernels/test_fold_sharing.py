"""A kept fold shared by threads, CUDA graphs and streams: nobody sees half of one, or memory that was given away.

Threads are stopped at the point that matters, so that these tests do not depend on luck. Graphs and streams are stood
in for by what says that a capture runs, and by streams that write down what is asked of them; tests/gpu has real ones.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from graphmoe_kernels import FoldCache, FoldSettings, RethinkingSpec, build_fold
from graphmoe_kernels.rethinking import streams
from tests.kernels.cases import layer

SPEC = RethinkingSpec(rounds=3, top_k=2, scale=1.5)
SETTINGS = FoldSettings(torch.float64, SPEC.scale, SPEC.candidate_input)


class PausedBuild:
    """`build_fold`, which stops before its end until it is told to go on.

    Attributes:
        began, resume: set when a build has read the weights, and to let it end.
        builds: how many there were.
    """

    def __init__(self) -> None:
        self.began, self.resume, self.builds = threading.Event(), threading.Event(), 0

    def __call__(self, weights, settings, copy=False):
        self.builds += 1
        fold = build_fold(weights, settings, copy=copy)
        self.began.set()
        assert self.resume.wait(20)
        return fold


def in_thread(function):
    """Start a function in a thread of its own."""
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def values(fold):
    return [t.clone() for t in fold.tensors()]


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def test_who_computes_with_a_fold_keeps_it_whole():
    """One thread is in the middle of a forward, another finds a changed weight: the first one's fold stays."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    in_use = cache.get(weights, SETTINGS)
    before = values(in_use)
    weights.gru.output.mul_(1.5)
    changed = cache.get(weights, SETTINGS)
    assert equal(in_use.tensors(), before)
    assert equal(changed.tensors(), build_fold(weights, SETTINGS).tensors())


def test_threads_that_find_no_fold_build_one():
    """The second waits for the first one's build and takes it: two builds at once would take the memory of two."""
    weights, build, found = layer(SPEC), PausedBuild(), []
    cache = FoldCache(lambda: weights, build=build)
    first = in_thread(lambda: found.append(cache.get(weights, SETTINGS)))
    assert build.began.wait(20)
    second = in_thread(lambda: found.append(cache.get(weights, SETTINGS)))
    second.join(0.2)
    assert second.is_alive()
    assert found == []
    build.resume.set()
    first.join(20)
    second.join(20)
    assert build.builds == 1
    assert found[0] is found[1]


def test_a_fold_dropped_during_its_build_is_built_again():
    """refold() after a write through .data, while another thread builds from the old values: those must not be kept."""
    weights, build = layer(SPEC), PausedBuild()
    cache = FoldCache(lambda: weights, build=build)
    builder = in_thread(lambda: cache.get(weights, SETTINGS))
    assert build.began.wait(20)
    weights.gru.output.data.mul_(2)
    dropper = in_thread(cache.drop)
    dropper.join(0.2)
    build.resume.set()
    builder.join(20)
    dropper.join(20)
    assert equal(cache.get(weights, SETTINGS).tensors(), build_fold(weights, SETTINGS).tensors())
    assert build.builds == 2


def test_a_fold_dropped_while_it_is_asked_for_is_still_given():
    """Between a thread's look at what the fold was built from and its taking it, another may call model.eval()."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    expected = values(cache.get(weights, SETTINGS))

    class Dropping(FoldSettings):
        __hash__ = FoldSettings.__hash__

        def __eq__(self, other):
            cache.drop()
            return True

    assert equal(cache.get(weights, Dropping(*SETTINGS)).tensors(), expected)


@pytest.fixture
def quick_switches():
    """Threads that take turns every 20 microseconds, and not after the 5 ms in which a test is over."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_that_drop_and_rebuild_get_whole_folds(quick_switches):
    """Everything at once, for a while: folds dropped, and ended by an optimizer's step, as others ask for them."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    expected, failures = values(cache.get(weights, SETTINGS)), []
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter])  # another model's

    def serve(index):
        try:
            for turn in range(30):
                if index == 0:
                    cache.drop()
                if index == 1 and turn % 4 == 0:
                    optimizer.step()
                if not equal(cache.get(weights, SETTINGS).tensors(), expected):
                    failures.append(f"thread {index}, turn {turn}")
        except Exception as error:
            failures.append(error)

    threads = [in_thread(lambda index=index: serve(index)) for index in range(4)]
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture
def capture(monkeypatch):
    """Whether a CUDA graph is being captured, as the cache is told."""
    state = SimpleNamespace(runs=False)
    monkeypatch.setattr(streams, "capturing", lambda: state.runs)
    return state


def captured(cache, weights, settings, capture):
    """The fold that a graph then reads: built beforehand, asked for in the capture."""
    cache.get(weights, settings)
    capture.runs = True
    fold = cache.get(weights, settings)
    capture.runs = False
    return fold


def test_no_fold_is_built_in_a_capture(capture):
    """It would be computed by every replay, from whatever the weights are, and by none before the first one."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    capture.runs = True
    with pytest.raises(RuntimeError, match=r"inside a CUDA graph's capture.* run the layer once in evaluation mode"):
        cache.get(weights, SETTINGS)
    capture.runs = False
    weights.gru.output.mul_(2)
    captured(cache, weights, SETTINGS, capture)
    weights.gru.output.mul_(2)
    capture.runs = True
    with pytest.raises(RuntimeError, match="inside a CUDA graph's capture"):
        cache.get(weights, SETTINGS)


def test_a_captured_fold_keeps_its_memory_and_is_filled_again(capture):
    """A graph reads it by its address: after drop() with the old values, after the next call with the new ones."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    fold = captured(cache, weights, SETTINGS, capture)
    before, addresses = values(fold), [t.data_ptr() for t in fold.tensors()]
    kept = [weakref.ref(t) for t in fold.tensors()]
    del fold
    cache.drop()
    assert equal([t() for t in kept], before)
    for change in (lambda: weights.gru.output.data.mul_(2), lambda: weights.base.up.mul_(2)):
        change()
        cache.drop()
        found = cache.get(weights, SETTINGS)
        assert [t.data_ptr() for t in found.tensors()] == addresses
        assert equal([t() for t in kept], build_fold(weights, SETTINGS).tensors())


def test_a_captured_fold_outlives_one_of_another_dtype(capture):
    """Autocast and not in turn: the graph's fold stays, and is filled again by the next call in its own dtype."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    kept = [weakref.ref(t) for t in captured(cache, weights, SETTINGS, capture).tensors()]
    cache.get(weights, SETTINGS._replace(dtype=torch.bfloat16))
    assert None not in [t() for t in kept]
    weights.gru.output.mul_(2)
    cache.get(weights, SETTINGS)
    assert equal([t() for t in kept], build_fold(weights, SETTINGS).tensors())


def test_a_fold_that_no_graph_reads_is_freed():
    """Dropping frees memory: 58.6 MB a layer at Llama-3-8B sizes, which training needs."""
    weights = layer(SPEC)
    cache = FoldCache(lambda: weights)
    kept = [weakref.ref(t) for t in cache.get(weights, SETTINGS).tensors()]
    cache.drop()
    assert {t() for t in kept} == {None}


class Stream:
    """A CUDA stream that writes down what it is asked to do."""

    def __init__(self, name):
        self.cuda_stream, self.log = hash(name), []

    def record_event(self):
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.log.append(event)


def test_a_stream_waits_once_for_another_ones_fill(monkeypatch):
    """The stream that filled the tensors waits for nothing. Each other one waits at its first read, and is recorded as
    a reader of every tensor, so that the memory is not given away before its reads."""
    filling, reading = Stream("filling"), Stream("reading")
    current, recorded = [filling], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    tensors = [SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=recorded.append) for _ in range(3)]
    fill = streams.StreamFill(tensors)
    fill.wait()
    assert (filling.log, recorded) == ([], [])
    current[0] = reading
    fill.wait()
    fill.wait()
    assert reading.log == [filling.record_event()]
    assert recorded == [reading] * 3
    streams.StreamFill([torch.ones(1)]).wait()
    assert len(reading.log) == 1, "on the CPU there is nothing to wait for"

"""From a trace to seconds by category: every nanosecond counted once, on made-up events."""

from __future__ import annotations

from typing import Any

import pytest

from graphmoe_model.profiling import CATEGORIES
from graphmoe_model.profiling.attribution import attribute, last_forward
from graphmoe_model.profiling.result import summarise


def event(category: str, name: str, start: float, duration: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    """One complete event of a Chrome trace; times in microseconds."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": 1,
        "tid": thread,
        "args": args,
    }


def named(name: str, start: float, duration: float, thread: int = 1) -> dict[str, Any]:
    return event("user_annotation", f"graphmoe::{name}", start, duration, thread)


def launched(call: str, start: float, kernel: float, duration: float, correlation: int) -> list[dict[str, Any]]:
    """A launch on the host at ``start`` and its kernel on the device at ``kernel``."""
    kind = "cuda_driver" if call.startswith("cu") and not call.startswith("cuda") else "cuda_runtime"
    return [
        event(kind, call, start, 1, correlation=correlation),
        event("kernel", "some_kernel", kernel, duration, thread=7, correlation=correlation),
    ]


def microseconds(**spent: float) -> dict[str, Any]:
    return pytest.approx({**dict.fromkeys(CATEGORIES, 0.0), **{name: us / 1e6 for name, us in spent.items()}})


def test_a_range_inside_another_is_counted_once():
    """The layer's range contains its parts' ranges: a plain sum over ranges would count them twice."""
    trace = [
        named("gru", 40, 5),
        named("forward", 0, 100),
        named("attention", 10, 15),
        named("experts", 30, 50),
        named("mlp", 30, 10),
        event("cpu_op", "aten::mm", 31, 8),
    ]
    assert attribute(trace, on_device=False) == [microseconds(attention=15, experts=35, mlp=10, gru=5, other=35)]


def test_every_forward_has_its_own_figures_in_order_of_time():
    trace = [named("forward", 200, 30), named("mlp", 210, 10), named("forward", 0, 100), named("attention", 0, 100)]
    assert attribute(trace, on_device=False) == [microseconds(attention=100), microseconds(mlp=10, other=20)]


def test_ranges_of_other_threads_are_not_nested_in_each_other():
    """A data loader's thread has the same clock; its forward is a forward of its own."""
    trace = [named("forward", 0, 100), named("mlp", 10, 20), named("forward", 5, 50, thread=2)]
    assert attribute(trace, on_device=False) == [microseconds(mlp=20, other=80), microseconds(other=50)]


def test_a_kernel_counts_for_the_range_it_was_launched_in():
    """Kernels run long after their launch, when the host is in another range or past the forward."""
    trace = [
        named("forward", 0, 100),
        named("attention", 10, 20),
        named("experts", 40, 30),
        named("gru", 50, 10),
        *launched("cudaLaunchKernel", 15, 60, 7, correlation=1),
        *launched("cuLaunchKernelEx", 55, 500, 11, correlation=2),  # as Triton launches
        *launched("cudaLaunchKernel", 65, 600, 13, correlation=3),
        *launched("cudaMemcpyAsync", 95, 700, 17, correlation=4),
        *launched("cudaLaunchKernel", 150, 800, 19, correlation=5),  # after the forward: another's
        event("gpu_user_annotation", "graphmoe::attention", 60, 900, thread=7),  # a picture of the range, no work
    ]
    assert attribute(trace, on_device=True) == [microseconds(attention=7, gru=11, experts=13, other=17)]


def test_one_launch_of_many_kernels_counts_all_of_them():
    graph = launched("cudaGraphLaunch", 15, 60, 7, correlation=1)
    trace = [named("forward", 0, 100), named("mlp", 10, 20), *graph, {**graph[1], "ts": 80, "dur": 5}]
    assert attribute(trace, on_device=True) == [microseconds(mlp=12)]


@pytest.mark.parametrize(
    "trace, on_device, message",
    [
        ([named("mlp", 0, 1)], False, "no range graphmoe::forward"),
        ([named("forward", 0, 9), named("mpl", 0, 1)], False, "expected one of attention, mlp"),
        ([named("forward", 0, 9)], True, "recorded nothing that ran on the device"),
        ([named("forward", 0, 9), launched("cudaLaunchKernel", 1, 2, 3, 4)[1]], True, "1 of the device's activities"),
    ],
)
def test_a_trace_that_cannot_be_attributed_is_refused(trace, on_device, message):
    """Each would otherwise give shares of less than all the time, without a sign of it."""
    with pytest.raises(ValueError, match=message):
        attribute(trace, on_device)


def test_a_kept_trace_is_the_last_forward_with_its_kernels():
    late = launched("cudaLaunchKernel", 205, 900, 3, correlation=2)
    thread_name = {"ph": "M", "name": "thread_name", "ts": 0.0}
    trace = [
        thread_name,
        named("forward", 0, 100),
        *launched("cudaLaunchKernel", 5, 90, 3, 1),
        named("forward", 200, 9),
    ]
    assert last_forward([*trace, *late]) == [thread_name, named("forward", 200, 9), *late]


def test_medians_and_spread_are_over_forwards():
    """One slow forward among three must not move the figures, and must show in the spread."""
    forwards = [dict.fromkeys(CATEGORIES, 0.0) | {"attention": a, "mlp": 1.0} for a in (1.0, 1.0, 3.0)]
    seconds, spread = summarise(forwards)
    assert (seconds["attention"], seconds["mlp"]) == (1.0, 1.0)
    assert spread["attention"] == (0.5, 0.75)

"""A layer's providers side by side in one case: each is checked, and those that pass are timed in turns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.devices import Call
from benchmarks.gpu.layers import Layer, Provider, set_mode

INPUTS = 3


class LayerCase(NamedTuple):
    """What is timed: a forward without gradients, in a CUDA graph or not, or a forward with its backward."""

    tokens: int
    training: bool = False
    graph: bool = False

    @property
    def mode(self) -> str:
        """As results call it."""
        return "training" if self.training else "decode in a graph" if self.graph else "inference"


def time_layer(
    layer: Layer, case: LayerCase, providers: Sequence[Provider], seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Checks, and a row for each provider that passed its check (the dense MLP has none).

    A provider that fails is in the checks with its error, and has no row: what is wrong gets no time. One that does
    not fit in memory is there too, as is one that raises anything else.
    """
    x, rows = layer.input(case.tokens)
    inputs = [x, *(torch.randn_like(x) for _ in range(INPUTS - 1))]
    upstream = torch.randn_like(x)
    checks, calls, peaks = [], {}, {}
    for provider in providers:
        try:
            if provider.checked:
                found = layer.check(provider, x, rows, case.training)
                checks.append(
                    found.record(
                        f"layer: {provider.name}, {case.mode}, T={layer.sizes.rounds}", case.tokens, layer.dtype
                    )
                    | {"experts": layer.sizes.experts}
                )
                if found.fault is not None:
                    continue
            set_mode(provider, case.training)
            single = _call(layer, case, provider, inputs[0], upstream)
            single()
            peaks[provider.name] = layer.device.peak_bytes(single)
            if case.graph:
                calls[provider.name] = layer.device.capture(single)
            else:
                turns = itertools.cycle([_call(layer, case, provider, each, upstream) for each in inputs])
                calls[provider.name] = _next_of(turns)
        except Exception as error:  # it gets no time, the others do; a lost device raises in the next line again
            layer.device.release()
            layer.device.synchronize()
            reason = str(error).strip().splitlines() or ["no message"]
            checks.append(_failed(layer, case, provider, f"{type(error).__name__}: {reason[0]}"))
    timed = layer.device.in_turns(calls, seconds)
    rows_found = [
        {
            "mode": case.mode,
            "rounds": layer.sizes.rounds,
            "experts": layer.sizes.experts,
            "tokens": case.tokens,
            "dtype": layer.sizes.dtype,
            "provider": name,
            "seconds": samples.summary(),
            "peak bytes": peaks[name],
        }
        for name, samples in timed.items()
    ]
    return checks, rows_found


def _next_of(turns: itertools.cycle[Call]) -> Call:
    return lambda: next(turns)()


def _call(layer: Layer, case: LayerCase, provider: Provider, x: Tensor, upstream: Tensor) -> Call:
    if case.training:
        return layer.step(provider, x, upstream)

    def infer() -> Tensor:
        with torch.no_grad():
            return provider.forward(x)

    return infer


def _failed(layer: Layer, case: LayerCase, provider: Provider, fault: str) -> dict[str, Any]:
    return {
        "what": f"layer: {provider.name}, {case.mode}, T={layer.sizes.rounds}",
        "tokens": case.tokens,
        "dtype": layer.sizes.dtype,
        "experts": layer.sizes.experts,
        "passed": False,
        "fault": fault,
    }

"""Where cases are measured: the device, and the layers that one case after another computes with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.cases import Plan
from benchmarks.devices import Device
from benchmarks.layers import Layer, make_mlp
from benchmarks.roofline import Limits
from graphmoe_kernels.cost import Sizes


class Workplace:
    """Layers by their sizes, made when they are first asked for.

    Args:
        device: where everything lies and runs.
        limits: what the device can do, where it was measured.
        seconds: how long the contenders of a case are timed together, some turns at least.
        plan: the sizes of the whole model.
    """

    def __init__(self, device: Device, limits: Limits | None, seconds: float, plan: Plan) -> None:
        self.device, self.limits, self.seconds, self.plan = device, limits, seconds, plan
        self._layers: dict[Sizes, Layer] = {}
        self._mlp: tuple[Sizes, LlamaMLP] | None = None

    def mlp(self, sizes: Sizes) -> LlamaMLP:
        """The frozen MLP of these widths, one for all layers; the last one is kept."""
        key = Sizes(sizes.hidden, sizes.intermediate, 1, experts=2, dtype=sizes.dtype)
        if self._mlp is None or self._mlp[0] != key:
            self._mlp = None
            self.device.release()
            self._mlp = key, make_mlp(sizes, self.device)
        return self._mlp[1]

    def layer(self, sizes: Sizes) -> Layer:
        """The layer of these widths, experts and rank."""
        key = _key(sizes)
        if key not in self._layers:
            self._layers[key] = Layer(sizes, self.device, self.mlp(sizes))
        return self._layers[key]

    def begin(self, needed: Iterable[Sizes]) -> None:
        """Free the layers that are not of the sizes ``needed`` next."""
        keys = {_key(sizes) for sizes in needed}
        self._layers = {key: layer for key, layer in self._layers.items() if key in keys}
        self.device.release()


def _key(sizes: Sizes) -> Sizes:
    return replace(sizes, tokens=1, rounds=1, top_k=1)

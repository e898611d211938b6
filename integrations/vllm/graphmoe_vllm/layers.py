"""An exported model's layers in the places that vLLM has for its own: over its loaded weights, as one operator each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from graphmoe_inference.folder import ExportedModel
from graphmoe_inference.loading import prepare, put_into

QKV = ("q_proj", "k_proj", "v_proj")
FUSED_QKV, OUTPUT = "qkv_proj", "o_proj"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
FUSED = {FUSED_QKV: QKV, GATE_UP: ("gate_proj", "up_proj")}  # vLLM's linears that hold several of the base's


class Part(nn.Module):
    """A linear over rows of a weight that vLLM loaded, whose memory it shares.

    Args:
        linear: vLLM's.
        start, stop: its rows; None: all of them.
    """

    def __init__(self, linear: nn.Module, start: int | None = None, stop: int | None = None) -> None:
        super().__init__()
        rows = slice(start, stop)
        weight: Any = linear.weight
        bias: Any = linear.bias
        self.weight = nn.Parameter(weight.detach()[rows], requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach()[rows], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        return F.linear(x, self.weight, self.bias)


class Joined(nn.Module):
    """Several linears of the same input: y [..., sum of out] for x [..., in]."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Their outputs, one after the other."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class AsOneOperator(nn.Module):
    """A layer that compiled graphs see as one operator, found by its name as vLLM finds its attention.

    What a layer keeps between forwards (its fold) is no matter of a graph: vLLM drops the guards of the graphs that it
    compiles, and keeps them on disk for the next start.

    Args:
        layer: y [N, width] for x [N, in].
        name: its place in the model.
        width: of y.
        pair: whether y comes with None, as vLLM's linears return their output and a bias.
        context: vLLM's layers by name.
    """

    def __init__(self, layer: nn.Module, name: str, width: int, pair: bool, context: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.name, self.width, self.pair = layer, f"{name}.graphmoe", width, pair
        if self.name in context:
            raise ValueError(f"there is a layer {self.name} already; load one model in one engine")
        context[self.name] = self

    def forward(self, x: Tensor) -> Any:
        """y [N, width] for x [N, in], or y and None."""
        y = torch.ops.graphmoe_vllm.layer(x, self.name, self.width)
        return (y, None) if self.pair else y


@torch.library.custom_op("graphmoe_vllm::layer", mutates_args=())
def _layer(x: Tensor, name: str, width: int) -> Tensor:
    own: Any = get_forward_context().no_compile_layers[name]
    return own.layer(x)


@_layer.register_fake
def _layer_shape(x: Tensor, name: str, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def adapt(
    model: nn.Module, exported: ExportedModel, tensors: dict[str, Tensor], source: str, context: dict[str, Any]
) -> None:
    """Put an adapter's layers into a model of vLLM's whose weights are loaded, and compute their folds.

    Args:
        model: vLLM's, whole on this device.
        exported: the adapter's settings and modules.
        tensors: the adapter's.
        source: what errors name.
        context: vLLM's layers by name.

    Raises:
        ValueError: the adapter is on a module that vLLM's model does not have or that this plugin does not know, or its
            tensors do not fit.
    """
    by_name = nn.Module()  # the base's adapted modules in the places that Transformers has for them
    for name in exported.mlps:
        _grow(by_name, name, _mlp(_vllm_module(model, name, source), exported.mlps[name].gate))
    projections = {_projection(name, source) for name in exported.linears}
    for attention, fused in sorted(projections):
        own = _vllm_module(model, attention, source)
        for name, part in _parts(own, fused, f"{attention}.{fused}" in exported.linears).items():
            _grow(by_name, f"{attention}.{name}", part)
    put_into(by_name, exported, tensors, source)
    prepare(by_name)
    for name in exported.mlps:
        parent, _, last = name.rpartition(".")
        width = _vllm_module(model, f"{name}.{DOWN}", source).weight.shape[0]
        layer = AsOneOperator(by_name.get_submodule(name), name, width, False, context)
        setattr(model.get_submodule(parent), last, layer)
    for attention, fused in sorted(projections):
        own = model.get_submodule(attention)
        width = getattr(own, fused).weight.shape[0]
        layer = AsOneOperator(_joined(by_name, attention, fused), f"{attention}.{fused}", width, True, context)
        setattr(own, fused, layer)


def _mlp(mlp: nn.Module, gate: str) -> nn.Module:
    """The weights of vLLM's MLP under the names that the base has for them."""
    both: Any = mlp.get_submodule(GATE_UP)
    own = nn.Module()
    if gate == GATE_UP:
        own.add_module(gate, Part(both))
    else:
        middle = both.weight.shape[0] // 2
        own.add_module("gate_proj", Part(both, 0, middle))
        own.add_module("up_proj", Part(both, middle))
    own.add_module(DOWN, Part(mlp.get_submodule(DOWN)))
    return own


def _parts(attention: Any, fused: str, whole: bool) -> dict[str, Part]:
    """The linears of one of vLLM's projections by the base's names."""
    if fused == OUTPUT or whole:
        return {fused: Part(attention.get_submodule(fused))}
    linear = attention.get_submodule(fused)
    ends = [attention.q_size, attention.q_size + attention.kv_size, attention.q_size + 2 * attention.kv_size]
    return {name: Part(linear, start, stop) for name, start, stop in zip(QKV, [0, *ends], ends, strict=False)}


def _joined(by_name: nn.Module, attention: str, fused: str) -> nn.Module:
    children: Any = by_name.get_submodule(attention)._modules
    return children[fused] if fused in children else Joined([children[name] for name in QKV])


def _projection(name: str, source: str) -> tuple[str, str]:
    """The attention that a linear is of, and vLLM's projection that holds it."""
    attention, _, last = name.rpartition(".")
    if not attention.endswith("self_attn") or last not in (*QKV, FUSED_QKV, OUTPUT):
        raise ValueError(
            f"{source} has an adapter on {name}, and graphmoe_vllm has those on MLPs and on the projections of "
            "attention; run it by graphmoe_inference.load_for_inference"
        )
    return attention, OUTPUT if last == OUTPUT else FUSED_QKV


def _vllm_module(model: nn.Module, name: str, source: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{source} does not fit its base: {name}: {type(model).__name__} of vLLM has no such module; export the "
            "model again"
        ) from error


def _grow(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)

"""Who is timed: a layer computed in several ways, each under a name, all from the same tensors.

A provider is built for one layer at some sizes. Those that compute the rethinking layer have to equal its plain
definition; those that compute less (the MLP alone, the MLP with plain LoRA) are there to compare with, and have to
equal their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.checks import Built, Subject, Tensors
from benchmarks.devices import CpuDevice, Device
from benchmarks.layers import SCALE, Layer, dense_weights, over_tokens
from benchmarks.plain import Forward, plain_literal
from graphmoe_kernels import DenseMLP
from graphmoe_kernels.backend import interpreting
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import stubbed
from graphmoe_kernels.testing import trainable


class Provider(NamedTuple):
    """A way to compute a layer."""

    build: Callable[[Layer, Sizes], Built]
    form: str  # its arithmetic, a form of the cost model or "lora"
    missing: Callable[[Device], str | None] = lambda device: None  # why it cannot run on a device
    capturable: bool = True  # whether a CUDA graph can hold it: nothing in it waits for the device
    computes: bool = True  # whether there is a result to check


def _rethinking(layer: Layer, sizes: Sizes, forward: Forward, module: nn.Module | None) -> Built:
    """A provider that has to equal the rethinking layer."""
    subject = over_tokens(forward, trainable(layer.weights(sizes)))
    definitions = (layer.definition(sizes, exact) for exact in (False, True))
    return Built(subject, module, f"rethinking, {sizes}", *definitions)


def _ours(layer: Layer, sizes: Sizes, *, backend: str, fold: str = "auto") -> Built:
    ffn = layer.ffn(sizes, fold, backend)
    return _rethinking(layer, sizes, ffn, ffn)


def _literal_compiled(layer: Layer, sizes: Sizes) -> Built:
    forward = plain_literal(layer.weights(sizes), layer.spec(sizes))
    torch._dynamo.reset()
    return _rethinking(layer, sizes, torch.compile(forward, dynamic=False, fullgraph=True), None)


def _peer_mixlora(layer: Layer, sizes: Sizes) -> Built:
    return _rethinking(layer, sizes, peers.peer_mixlora(layer.weights(sizes), layer.spec(sizes)), None)


def _dense_definition(layer: Layer, dtype: torch.dtype) -> Subject:
    base = dense_weights(layer.mlp)

    def forward(x: Tensor) -> Tensor:
        gate, up, down = (w.to(dtype) for w in (base.gate, base.up, base.down))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return over_tokens(forward, {})


def _dense_alike(layer: Layer, sizes: Sizes, *, make: Callable[[nn.Module], nn.Module]) -> Built:
    """A provider that has to equal the MLP alone."""
    module = make(layer.mlp)
    definitions = (_dense_definition(layer, dtype) for dtype in (layer.dtype, torch.float64))
    return Built(over_tokens(module, {}), module, f"dense, {sizes.tokens} tokens", *definitions)


def _peft_lora(layer: Layer, sizes: Sizes) -> Built:
    module = peers.peft_lora(layer.mlp, sizes.rank, SCALE * sizes.rank, seed=4)
    tensors = peers.lora_tensors(module)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    base = dense_weights(layer.mlp)
    wide = DenseMLP(*(None if t is None else t.double() for t in base))  # type: ignore[arg-type]
    definitions = (
        over_tokens(lambda x: peers.peft_lora_reference(x, base, tensors, SCALE), tensors),
        over_tokens(lambda x: peers.peft_lora_reference(x, wide, exact, SCALE), exact),
    )
    return Built(over_tokens(module, tensors), module, f"lora, {sizes}", *definitions)


def _compiler_missing(device: Device) -> str | None:
    if not isinstance(device, CpuDevice):
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # inductor has an exception of its own for it, which moved between versions
        return f"torch.compile needs a C++ compiler on a CPU: {str(error).splitlines()[0]}"
    return None


def _stubbed(layer: Layer, sizes: Sizes, *, bind: bool) -> Built:
    built = _ours(layer, sizes, backend="triton")

    def run(given: Tensors) -> Tensors:
        with stubbed(bind=bind):
            return built.subject.run(given)

    return built._replace(subject=built.subject._replace(run=run))


def _no_triton(device: Device) -> str | None:
    return None if find_spec("triton") else "Triton is not installed"


def _triton_missing(device: Device) -> str | None:
    if device.kind == "cuda" or interpreting():
        return None
    return "the Triton kernels run on CUDA devices"


# Launches that do nothing, bound by Triton before that or not: where the CPU stands for a GPU, in the group host.
STUBBED = {"triton_bound": True, "triton_unlaunched": False}
# What each is stands in docs/performance.md.
PROVIDERS = {
    "triton": Provider(partial(_ours, backend="triton"), "folded", _triton_missing),
    "torch": Provider(partial(_ours, backend="torch"), "folded", capturable=False),
    "literal": Provider(partial(_ours, backend="torch", fold="never"), "literal", capturable=False),
    "literal_compiled": Provider(_literal_compiled, "literal", _compiler_missing),
    **{
        name: Provider(partial(_stubbed, bind=bind), "folded", _no_triton, computes=False)
        for name, bind in STUBBED.items()
    },
    "dense": Provider(partial(_dense_alike, make=lambda mlp: mlp), "dense"),
    "peft_lora": Provider(_peft_lora, "lora"),
    "liger": Provider(
        partial(_dense_alike, make=peers.liger_mlp), "dense", lambda device: peers.liger_missing(device.torch)
    ),
    "peer_mixlora": Provider(_peer_mixlora, "peers", capturable=False),
}


def missing(names: Iterable[str], device: Device) -> dict[str, str]:
    """Which of some providers cannot run on a device, and why."""
    found = {name: PROVIDERS[name].missing(device) for name in names}
    return {name: reason for name, reason in found.items() if reason is not None}

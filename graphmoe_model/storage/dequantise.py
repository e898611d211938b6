"""A base's linears as an adapter uses them: their dense weights, their inputs, their gradients.

`graphmoe_model.storage.linear_kinds` has the kinds of linears, plain and quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphmoe_model.storage.linear_kinds import FLOATS, PLAIN, SUPPORTED, find_kind, is_4bit, known_kind, not_readable

# --- what is asked of a linear ---------------------------------------------------------------------------------------


def dense_weight(linear: nn.Module) -> Tensor:
    """Give a linear's weight [out, in] as a plain floating-point tensor: itself, or what its quantisation stands for.

    Raises:
        TypeError: the linear is of no kind that is known, or in a state in which its weight cannot be read.
    """
    if _is_usual(linear):
        return linear.weight  # type: ignore[return-value]
    kind = known_kind(linear)
    reason = kind.obstacle(linear)
    if reason is not None:
        raise TypeError(f"this {type(linear).__name__} {reason}")
    return kind.dense(linear)


def dense_linear(linear: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """Make a plain linear of the weight that a quantised one stands for, in that weight's dtype unless one is given."""
    weight = dense_weight(linear)
    dtype = weight.dtype if dtype is None else dtype
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return plain


def stored_tensors(linear: nn.Module) -> list[Tensor]:
    """List every tensor that `dense_weight` reads, as stored and on the linear's device; the weight's own first."""
    if _is_usual(linear):
        return [linear._parameters["weight"]]  # type: ignore[list-item]
    return known_kind(linear).stored(linear)


def stored_device(linear: nn.Module) -> torch.device:
    """Return the device on which a linear's weight is stored."""
    if _is_usual(linear):
        return linear._parameters["weight"].device  # type: ignore[union-attr]
    return known_kind(linear).stored(linear)[0].device


def input_dtype(linear: nn.Module) -> torch.dtype | None:
    """Return the dtype that a linear's input must have, or None where it takes any floating-point dtype."""
    if _is_usual(linear):
        return linear._parameters["weight"].dtype  # type: ignore[union-attr]
    return known_kind(linear).input_dtype(linear)


def is_linear(module: Any) -> bool:
    """Tell whether a module has the parts of a linear layer: widths, and a weight of its own."""
    has_weight = isinstance(getattr(module, "weight", None), Tensor) or hasattr(module, "W_q")
    return has_weight and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_quantised(linear: nn.Module) -> bool:
    """Tell whether a linear's dense weight is another tensor than its parameter."""
    return not _is_usual(linear) and find_kind(linear) not in (PLAIN, None)


def run_linear(linear: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a linear on x, refusing to train through one that passes no gradient to its input.

    Such linears round their input or read weights packed for inference. In evaluation they work; the gradient of what
    they gave raises.

    Raises:
        TypeError: in training, a gradient has to reach x and none would; in evaluation the backward pass raises it.
    """
    y: Tensor = linear(x, *args, **kwargs)
    if y.requires_grad or not x.requires_grad or not torch.is_grad_enabled():
        return y
    if linear.training:
        raise TypeError(no_gradient(type(linear).__name__, linear))
    refused: Tensor = _RefusesGradient.apply(x, y, no_gradient(type(linear).__name__, linear))
    return refused


class _RefusesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, message: str) -> Tensor:
        ctx.message = message
        return y.clone()  # whoever asked for y may write to it

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise TypeError(ctx.message)


# --- what attaching asks ---------------------------------------------------------------------------------------------


def check_dense(linear: nn.Module, name: str) -> None:
    """Refuse a linear whose dense weight cannot be got, or that does not multiply by it.

    Args:
        linear: a module with ``in_features`` and ``out_features``.
        name: what to call it in the message.

    Raises:
        TypeError: says why, and which linears are supported.
    """
    kind = find_kind(linear)
    if kind is None:
        raise TypeError(f"{name}: {not_readable(linear)}")
    reason = kind.obstacle(linear)
    if reason is not None:
        raise TypeError(f"{name}: this {type(linear).__name__} {reason}")
    # A class of its own may round its weight or its input in every forward.
    if kind is PLAIN and getattr(type(linear), "forward", None) is not nn.Linear.forward and not _is_product(linear):
        raise TypeError(
            f"{name}: {type(linear).__name__} computes something else than x W^T + b with its weight, and "
            f"folds are products of that weight. Supported are {SUPPORTED}; load the base with one of these"
        )


def check_gradients(model: nn.Module) -> None:
    """Refuse a model in which a linear, adapted or not, passes no gradient to its input.

    What is in front of it would train by a wrong gradient. Where the kind does not say, one token tries the linear out.

    Raises:
        TypeError: names the linear, and says what to load in its place.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "in_features") or hasattr(module, "base_layer"):
            continue
        kind = find_kind(module)
        if kind is not None and not kind.passes_gradient(module):
            raise TypeError(
                f"{no_gradient(name, module)}, or attach the adapter for evaluation alone "
                "(PeftModel.from_pretrained as it is by default, without is_trainable=True)"
            )


def no_gradient(name: str, linear: nn.Module) -> str:
    """Say why a linear cannot be trained through, and what to do."""
    weight = getattr(linear, "weight", None)
    return (
        f"{name} (a {type(linear).__name__} with a weight of type {type(weight).__name__}) passes no gradient to its "
        "input, as it rounds the input or reads weights packed for inference: adapters in front of it would be trained "
        "by wrong gradients. To train, load the base with weight-only quantisation (bitsandbytes, torchao's "
        "Int8WeightOnlyConfig or Float8WeightOnlyConfig)"
    )


@contextmanager
def same_parameter(linear: nn.Module) -> Iterator[None]:
    """Let a linear have its own weight again after the block.

    PEFT's DoRA reads 8-bit weights by giving the linear another parameter, which on a CPU has lost its scales.
    """
    weight = linear._parameters.get("weight")
    try:
        yield
    finally:
        if weight is not None:
            linear._parameters["weight"] = weight


def keep_unpacked(model: nn.Module) -> None:
    """Have bitsandbytes' 4-bit linears keep their weights as they are on CPUs with AVX512-BF16.

    There the first forward in evaluation would pack them in place for a kernel of its own: no dense weight could be got
    from them, no gradient would reach their input, and their scales would be rounded to bf16.
    """
    for module in model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_usual(linear: nn.Module) -> bool:
    """Tell whether it is a plain ``nn.Linear``, the usual case, which a compiled forward asks too."""
    weight = linear._parameters.get("weight") if type(linear) is nn.Linear else None
    return type(weight) is nn.Parameter and weight.dtype in FLOATS


def _is_product(linear: Any) -> bool:
    weight: Tensor = linear.weight
    if weight.device.type == "meta" or not weight.numel():
        return True
    with torch.no_grad():
        x = torch.arange(1, weight.shape[1] + 1, device=weight.device).sin().to(weight.dtype)[None]
        y, expected = linear(x).float(), F.linear(x, weight, linear.bias).float()
    return bool((y - expected).abs().max() <= torch.finfo(weight.dtype).eps ** 0.75 * expected.abs().max())

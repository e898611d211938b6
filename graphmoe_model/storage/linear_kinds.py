"""The kinds of linears that a base may have, in one table: `KINDS`.

A linear's kind is told by its module, not by its parameter's type: FSDP gives a 4-bit linear a plain parameter, and the
state that says what its numbers mean stays on the module. (torchao's linears are plain modules; there the weight's type
is all that there is, and FSDP keeps it.) Nothing here changes a module: PEFT's own helper gives an 8-bit linear another
parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUPPORTED = (
    "plain weights in fp64, fp32, fp16 or bf16, bitsandbytes' Linear4bit and Linear8bitLt, torchao's quantised tensors "
    "and HQQLinear"
)


class LinearKind(NamedTuple):
    """How linears of one kind are treated.

    Attributes:
        fits: tells whether a module is of this kind.
        dense: its weight [out, in] as a plain floating-point tensor.
        stored: every tensor that `dense` reads, the weight's own first: what a kept fold is compared with.
        input_dtype: what its input has to be, or None if it takes any floating-point dtype and gives the same back.
        passes_gradient: tells whether a gradient reaches its input, by trying it out where the kind does not say.
        obstacle: why it cannot be adapted in its present state and what to do, or None.
    """

    fits: Callable[[Any], bool]
    dense: Callable[[Any], Tensor]
    stored: Callable[[Any], list[Tensor]]
    input_dtype: Callable[[Any], torch.dtype | None]
    passes_gradient: Callable[[Any], bool]
    obstacle: Callable[[Any], str | None]


def find_kind(linear: nn.Module) -> LinearKind | None:
    """Find the kind of a linear, or None."""
    return next((kind for kind in KINDS if kind.fits(linear)), None)


def known_kind(linear: nn.Module) -> LinearKind:
    """Find the kind of a linear; ``TypeError`` if it is none that is known."""
    kind = find_kind(linear)
    if kind is None:
        raise TypeError(not_readable(linear))
    return kind


def not_readable(linear: nn.Module) -> str:
    """Say of a linear of no kind what it is, and what is supported."""
    weight = getattr(linear, "weight", None)
    found = f"weight is {type(weight).__name__}"
    if isinstance(weight, Tensor):
        found = f"weight is a {type(weight).__name__} of {weight.dtype}, {list(weight.shape)}"
    return (
        f"{type(linear).__name__} is a linear of no kind that this package can read ({found}). Supported are "
        f"{SUPPORTED}; load the base with one of these, or leave this layer out with exclude_modules or "
        "layers_to_transform"
    )


def _inherits(module: nn.Module, package: str, name: str) -> bool:
    """Tell a class by name, so that no package is imported that the base does not use; FSDP makes subclasses."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(module).__mro__)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ImportError(
            f"the base has bitsandbytes' quantised linears, and bitsandbytes cannot be imported ({error}); "
            "pip install 'graphmoe[quant]'"
        ) from error
    return functional


# Plain weights: nn.Linear, and what has the same parts.


def _is_plain(linear: Any) -> bool:
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        return False
    shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
    # Classes of torch's own are fake and distributed tensors. Sharded weights are empty until they are gathered.
    return type(weight).__module__.partition(".")[0] == "torch" and (tuple(weight.shape) == shape or not weight.numel())


def _passes_gradient(linear: Any) -> bool:
    """Try with one token whether a gradient reaches a linear's input."""
    kind = known_kind(linear)
    weight = kind.stored(linear)[0]
    if weight.device.type == "meta":
        return True
    dtype = kind.input_dtype(linear) or torch.get_default_dtype()
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, linear.in_features, dtype=dtype, device=weight.device, requires_grad=True)
        y: Tensor = linear(x)
    return y.requires_grad


# bitsandbytes, 4 bits


def is_4bit(module: Any) -> bool:
    """Tell whether a module is one of bitsandbytes' 4-bit linears."""
    return _inherits(module, "bitsandbytes", "Linear4bit")


def _quant_state(linear: Any) -> Any:
    """Return the parameter's state, or the module's where the parameter is one that FSDP made."""
    return getattr(linear.weight, "quant_state", None) or linear.quant_state


def _is_packed(linear: Any) -> bool:
    return getattr(_quant_state(linear), "packing_format_for_cpu", False)


def _dense_4bit(linear: Any) -> Tensor:
    # As bytes, in a column: a row would be given back transposed, and the storage may be of a float dtype.
    packed = linear.weight.detach().reshape(-1).view(torch.uint8).unsqueeze(1)
    dense: Tensor = _bitsandbytes().dequantize_4bit(packed, _quant_state(linear))
    return dense


def _stored_4bit(linear: Any) -> list[Tensor]:
    state = _quant_state(linear)
    tensors = [linear.weight]
    if state is not None:
        tensors.append(state.absmax)
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def _obstacle_4bit(linear: Any) -> str | None:
    if _quant_state(linear) is None:
        return "is not quantised yet: move the model to its device first, or load it with a BitsAndBytesConfig"
    if _is_packed(linear):
        return (
            "has weights that an evaluation on this CPU packed for AVX512-BF16 before the adapter was attached, from "
            "which no dense weight can be got: load the base anew, and attach the adapter before its first forward"
        )
    return None


# bitsandbytes, 8 bits


def _scales_8bit(linear: Any) -> Tensor | None:
    """Return the rows' scales: the parameter's until the first forward, which takes them into the module's state."""
    scales = getattr(linear.weight, "SCB", None)
    return linear.state.SCB if scales is None else scales


def _dense_8bit(linear: Any) -> Tensor:
    scales = _scales_8bit(linear)
    assert scales is not None
    dense: Tensor = _bitsandbytes().int8_vectorwise_dequant(linear.weight.detach(), scales.to(linear.weight.device))
    return dense


def _stored_8bit(linear: Any) -> list[Tensor]:
    scales = _scales_8bit(linear)
    return [linear.weight] if scales is None else [linear.weight, scales]


def _obstacle_8bit(linear: Any) -> str | None:
    if linear.state.has_fp16_weights:
        return (
            "keeps float weights and rounds them anew in every forward (has_fp16_weights=True, which is for training "
            "the base): load the base with load_in_8bit=True, or without quantisation"
        )
    if linear.weight.dtype != torch.int8 or _scales_8bit(linear) is None:
        return "is not quantised yet: move the model to its device first, or load it with a BitsAndBytesConfig"
    return None


# torchao


def _is_torchao(linear: Any) -> bool:
    return type(getattr(linear, "weight", None)).__module__.partition(".")[0] == "torchao"


def _dense_torchao(linear: Any) -> Tensor:
    dense: Tensor = linear.weight.detach().dequantize()
    return dense


def _inner(tensor: Any) -> list[Tensor]:
    """List the plain tensors in one that is made of several, which has no address and counts no versions itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [inner for name in tensor.__tensor_flatten__()[0] for inner in _inner(getattr(tensor, name))]


def _obstacle_torchao(linear: Any) -> str | None:
    if type(linear.weight).dequantize is not Tensor.dequantize:
        return None
    return (
        f"has a weight of type {type(linear.weight).__name__}, which has no dequantize(): load the base with another "
        "layout, such as Int8WeightOnlyConfig"
    )


# HQQ


def _obstacle_hqq(linear: Any) -> str | None:
    return None if linear.ready else "is not quantised yet: call its initialize()"


def _stored_hqq(linear: Any) -> list[Tensor]:
    return [linear.W_q, *(t for _, t in sorted((linear.meta or {}).items()) if isinstance(t, Tensor))]


PLAIN = LinearKind(
    fits=_is_plain,
    dense=lambda linear: linear.weight,
    stored=lambda linear: [linear.weight],
    input_dtype=lambda linear: linear.weight.dtype,
    passes_gradient=lambda linear: True,
    obstacle=lambda linear: None,
)
# The plain one last: with storage of a float dtype, a 4-bit linear's parameter looks like a plain one.
KINDS = (
    LinearKind(
        fits=is_4bit,
        dense=_dense_4bit,
        stored=_stored_4bit,
        input_dtype=lambda linear: None,
        passes_gradient=lambda linear: not _is_packed(linear),
        obstacle=_obstacle_4bit,
    ),
    LinearKind(
        fits=lambda linear: _inherits(linear, "bitsandbytes", "Linear8bitLt"),
        dense=_dense_8bit,
        stored=_stored_8bit,
        input_dtype=lambda linear: None,
        passes_gradient=lambda linear: True,
        obstacle=_obstacle_8bit,
    ),
    LinearKind(
        fits=lambda linear: _inherits(linear, "hqq", "HQQLinear"),
        dense=lambda linear: linear.dequantize(),
        stored=_stored_hqq,
        input_dtype=lambda linear: linear.compute_dtype,
        passes_gradient=_passes_gradient,
        obstacle=_obstacle_hqq,
    ),
    LinearKind(
        fits=_is_torchao,
        dense=_dense_torchao,
        stored=lambda linear: _inner(linear.weight),
        input_dtype=lambda linear: linear.weight.dtype,
        passes_gradient=_passes_gradient,
        obstacle=_obstacle_torchao,
    ),
    PLAIN,
)

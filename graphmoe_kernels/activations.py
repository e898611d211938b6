"""The activations that expert operators know by name, each with its derivative: one table for every backend.

An operator's schema can hold a name but no Python callable, and its backward recomputes the pre-activation, so every
activation comes as a pair: the function and its derivative, both pointwise and both in any float dtype; and, for the
Triton kernels, the same pair as Triton functions. The names are those of Transformers' ``ACT2FN``; aliases that compute
the same function share one entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.validation import shown

aten: Any = torch.ops.aten


class Activation(NamedTuple):
    """A pointwise function of a tensor and its derivative with respect to that tensor, for PyTorch and for Triton.

    Attributes:
        function, derivative: of a PyTorch tensor.
        both: the two at once, where that is quicker.
        triton, triton_derivative: ``@triton.jit`` functions of one fp32 tile; of the built-in activations the names of
            such functions in `graphmoe_kernels.triton_activations`, so that this table needs no Triton; None where
            there are none, and the activation runs on PyTorch alone.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    triton: Any = None
    triton_derivative: Any = None
    both: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def with_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and derivative of x."""
        return (self.function(x), self.derivative(x)) if self.both is None else self.both(x)

    def is_function(self, held: object) -> bool:
        """Tell whether what an MLP holds is this activation's function, or one of the same code."""
        return _same(self.function, held)

    def same_as(self, other: Activation) -> bool:
        """Tell whether another one has the same functions, or functions of the same code."""
        pairs = zip(self[:4], other[:4], strict=True)
        return all(_same(getattr(one, "fn", one), getattr(another, "fn", another)) for one, another in pairs)


def _same(one: Any, other: Any) -> bool:
    """Whether two functions are one, or made at two times by one piece of code, as by a notebook's cell run twice."""
    if one is other:
        return True
    code = getattr(one, "__code__", None)
    if code is None or code != getattr(other, "__code__", None) or one.__globals__ is not other.__globals__:
        return False
    return not any((f.__closure__, f.__defaults__, f.__kwdefaults__) != (None, None, None) for f in (one, other))


def _backward(operator: Callable[..., Tensor], *settings: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    """Make a derivative of PyTorch's own backward operator, by an upstream gradient of one."""
    return lambda x: operator(_ones(x), x, *settings, **options)


def _ones(x: Tensor) -> Tensor:
    """Ones in the shape of x that take no memory, as filling it takes as long as arithmetic on it."""
    return x.new_ones(()).expand_as(x)


def _silu_with_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """x s and s + x s (1 - s), of one sigmoid s, which takes longer than all else."""
    s = torch.sigmoid(x)
    value = x * s
    return value, s.addcmul_(value, s, value=-1).add_(value)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


_BUILT_IN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _backward(aten.silu_backward)),
    "gelu": (F.gelu, _backward(aten.gelu_backward)),
    "gelu_tanh": (_gelu_tanh, _backward(aten.gelu_backward, approximate="tanh")),
    "quick_gelu": (_quick_gelu, _quick_gelu_derivative),
    "relu": (F.relu, _backward(aten.threshold_backward, 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
    "relu6": (F.relu6, _backward(aten.hardtanh_backward, 0, 6)),
    "leaky_relu": (F.leaky_relu, _backward(aten.leaky_relu_backward, 0.01, False)),
    "hardswish": (F.hardswish, _backward(aten.hardswish_backward)),
    "mish": (F.mish, _backward(aten.mish_backward)),
    "sigmoid": (torch.sigmoid, lambda x: aten.sigmoid_backward(_ones(x), torch.sigmoid(x))),
    "tanh": (torch.tanh, lambda x: aten.tanh_backward(_ones(x), torch.tanh(x))),
    "linear": (lambda x: x, torch.ones_like),
}
_BOTH = {"silu": _silu_with_derivative}
ACTIVATIONS = {name: Activation(*pair, name, f"{name}_derivative", _BOTH.get(name)) for name, pair in _BUILT_IN.items()}

ALIASES: dict[str, str] = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}


def register_activation(
    name: str,
    function: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    *,
    triton: Any = None,
    triton_derivative: Any = None,
) -> None:
    """Make ``function`` available to the operators as ``activation=name``.

    Args:
        name: a new name (a registered activation never changes meaning). The same functions under it again, or
            functions of the same code, as where a notebook's cell is run again, change nothing.
        function: pointwise; takes and returns a tensor of any shape and float dtype.
        derivative: the pointwise derivative of ``function``, same contract.
        triton, triton_derivative: the same two as ``@triton.jit`` functions that take one fp32 tile and return one of
            its shape; both or none. Without them the activation runs on PyTorch, and ``backend="triton"`` refuses it.

    Raises:
        ValueError: ``name`` is another activation's, or one of the Triton functions comes without the other.
        TypeError: ``name`` is no string, a function cannot be called, or a Triton function is not ``@triton.jit``.
    """
    if not isinstance(name, str):
        raise TypeError(f"an activation's name must be a string, got {shown(name)}")
    given = Activation(function, derivative, triton, triton_derivative)
    if name in ACTIVATIONS and ACTIVATIONS[name].same_as(given):
        return
    if name in ACTIVATIONS or name in ALIASES:
        raise ValueError(f"activation {name!r} is registered already, with other functions; choose another name")
    for argument, value in (("function", function), ("derivative", derivative)):
        if not callable(value):
            raise TypeError(f"{argument} must be a function of a tensor, got {shown(value)}")
    if (triton is None) != (triton_derivative is None):
        raise ValueError("triton and triton_derivative belong together: pass both or none")
    for argument, value in (("triton", triton), ("triton_derivative", triton_derivative)):
        # Triton is not imported to ask: what it makes of a function has its parameters' names.
        if value is not None and not hasattr(value, "arg_names"):
            raise TypeError(f"{argument} must be a function decorated with @triton.jit, got {shown(value)}")
        if value is not None and len(value.arg_names) != 1:
            raise TypeError(f"{argument} must take one tile, and takes {', '.join(value.arg_names) or 'nothing'}")
    ACTIVATIONS[name] = given


def get_activation(name: str) -> Activation:
    """Return the activation called ``name`` (an alias is resolved); ``ValueError`` lists the known names otherwise."""
    found = ACTIVATIONS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        known = ", ".join(sorted([*ACTIVATIONS, *ALIASES]))
        raise ValueError(
            f"unknown activation {shown(name)}; known are {known}. "
            "graphmoe_kernels.register_activation(name, function, derivative) adds another."
        )
    return found


@functools.cache
def triton_form(name: str) -> tuple[Any, Any, Any]:
    """Return an activation as kernels take it: the Triton functions of value, derivative and approximate value.

    Raises:
        ValueError: the activation is unknown or has no Triton form.
    """
    from graphmoe_kernels import triton_activations

    check_triton_form(name)
    found = get_activation(name)
    value, derivative = (
        getattr(triton_activations, function) if isinstance(function, str) else function
        for function in (found.triton, found.triton_derivative)
    )
    return value, derivative, triton_activations.APPROXIMATIONS.get(found.triton, value)


def check_triton_form(name: str) -> None:
    """`ValueError` for an activation that has no Triton form."""
    if get_activation(name).triton is None:
        known = ", ".join(other for other, activation in ACTIVATIONS.items() if activation.triton is not None)
        raise ValueError(
            f"activation {name!r} has no Triton form (there are {known}); use backend='torch', or register it with "
            "triton=... and triton_derivative=..."
        )

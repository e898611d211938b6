"""The activations that expert operators know by name, each with its derivative.

An operator's schema can hold a name but no Python callable, and its backward recomputes the pre-activation, so every
activation comes as a pair: the function and its derivative, both pointwise and both in any float dtype. The names are
those of Transformers' ``ACT2FN``; aliases that compute the same function share one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.validation import shown


class Activation(NamedTuple):
    """A pointwise function of a tensor and its derivative with respect to that tensor."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_derivative(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x * x * x))
    inner = _TANH_SCALE * (1 + 3 * _TANH_CUBIC * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _mish_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def _relu6_derivative(x: Tensor) -> Tensor:
    return ((x > 0) & (x < 6)).to(x.dtype)


def _hardswish_derivative(x: Tensor) -> Tensor:
    middle = (2 * x + 3) / 6
    return torch.where(x < -3, torch.zeros_like(x), torch.where(x > 3, torch.ones_like(x), middle))


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu_derivative),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_derivative),
    "relu": Activation(F.relu, lambda x: (x > 0).to(x.dtype)),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
    "relu6": Activation(F.relu6, _relu6_derivative),
    "leaky_relu": Activation(
        lambda x: F.leaky_relu(x, 0.01), lambda x: torch.where(x > 0, torch.ones_like(x), 0.01 * torch.ones_like(x))
    ),
    "hardswish": Activation(F.hardswish, _hardswish_derivative),
    "mish": Activation(F.mish, _mish_derivative),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative),
    "tanh": Activation(torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "linear": Activation(lambda x: x, torch.ones_like),
}

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
    name: str, function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
) -> None:
    """Make ``function`` available to the operators as ``activation=name``.

    Args:
        name: a new name; a name that is taken raises ``ValueError`` (a registered activation never changes meaning).
        function: pointwise; takes and returns a tensor of any shape and float dtype.
        derivative: the pointwise derivative of ``function``, same contract.
    """
    if name in ACTIVATIONS or name in ALIASES:
        raise ValueError(f"activation {name!r} is registered already; choose another name")
    ACTIVATIONS[name] = Activation(function, derivative)


def get_activation(name: str) -> Activation:
    """The activation called ``name`` (an alias is resolved); ``ValueError`` lists the known names otherwise."""
    found = ACTIVATIONS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        known = ", ".join(sorted([*ACTIVATIONS, *ALIASES]))
        raise ValueError(
            f"unknown activation {shown(name)}; known are {known}. "
            "graphmoe_kernels.register_activation(name, function, derivative) adds another."
        )
    return found

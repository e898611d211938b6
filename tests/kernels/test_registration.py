"""Whoever looks at an operator's call from outside finds the registered operator; nobody else pays for it."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphmoe_kernels import RethinkingSpec, rethink
from graphmoe_kernels.registration import seen_from_outside, unseen
from graphmoe_kernels.testing import make_layer


class Seeing(TorchDispatchMode):
    """Enters the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor of a class of its own, as quantised and distributed ones are."""


X = torch.zeros(2, 3)


def test_plain_tensors_without_gradients_are_seen_by_nobody():
    with torch.no_grad():
        assert not seen_from_outside(X, None, nn.Parameter(X))
        assert unseen(X)
    with torch.inference_mode():
        assert unseen(torch.zeros(2))
    assert not seen_from_outside(X), "nothing asks for a gradient"
    assert not unseen(X), "one may come with a weight"


def test_a_gradient_is_seen():
    assert seen_from_outside(X, None, nn.Parameter(X))
    with torch.no_grad():
        assert not seen_from_outside(nn.Parameter(X))


@pytest.mark.parametrize("mode", [Seeing, TorchFunctionMode, FakeTensorMode])
def test_modes_see(mode):
    with torch.no_grad(), mode():
        assert seen_from_outside(X)
        assert not unseen(X)


@torch.no_grad()
def test_tensors_of_other_classes_and_without_data_are_seen():
    assert seen_from_outside(X, X.as_subclass(Subclass))
    assert seen_from_outside(X.to("meta"))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@torch.no_grad()
def test_transformations_and_tracing_see():
    found = []
    torch.vmap(lambda x: (found.append(seen_from_outside(x)), x)[1])(X)
    torch.jit.trace(lambda x: (found.append(seen_from_outside(x)), x + 1)[1], X, check_trace=False)
    assert all(found)
    assert len(found) >= 2


@torch.no_grad()
def test_a_mode_around_a_layer_sees_the_registered_operators():
    layer, spec = make_layer(6, 8, 3, 2, 4), RethinkingSpec(rounds=2, top_k=2, scale=2.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    with Seeing() as mode:
        seen = rethink(x, layer, spec, fold="always").y
    assert sum("graphmoe.expert_swiglu" in name for name in mode.names) == 2
    assert torch.equal(seen, rethink(x, layer, spec, fold="always").y)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@torch.no_grad()
def test_forward_derivatives_are_refused_and_not_lost():
    """No operator has one: it would give a result without a tangent, as if x did not matter."""
    layer, spec = make_layer(6, 8, 3, 2, 4), RethinkingSpec(rounds=2, top_k=2, scale=2.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        rethink(forward_ad.make_dual(x, x), layer, spec, fold="always")
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: rethink(x, layer, spec, fold="always").y, (x,), (x,))

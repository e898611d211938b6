"""The activations' names, their values against Transformers, and their derivatives against autograd."""

import subprocess
import sys

import pytest
import torch
from transformers.activations import ACT2FN

from graphmoe_kernels import (
    ACTIVATIONS,
    GateUp,
    RethinkingSpec,
    activations,
    get_activation,
    register_activation,
    rethink_folded,
    rethink_reference,
    swiglu,
)
from graphmoe_kernels.activations import ALIASES, triton_form
from tests.kernels.cases import assert_equal_to, gradients, layer
from tests.kernels.triton_marks import DEVICE, MARKS

NAMES = sorted([*ACTIVATIONS, *ALIASES])
KINKS = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64)


def away_from_kinks() -> torch.Tensor:
    """fp64 points from -8 to 8, none nearer than 0.01 to a kink of any activation."""
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64) + 0.005
    return x[(x[:, None] - KINKS).abs().amin(dim=1) > 0.01]


@pytest.mark.oracle
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_derivative_is_that_of_the_function(name):
    """Backward multiplies with the hand-written derivative: a wrong one trains in a wrong direction."""
    function, derivative, *_ = ACTIVATIONS[name]
    x = torch.cat([away_from_kinks(), KINKS]).requires_grad_()
    (exact,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(derivative(x.detach()), exact, rtol=1e-12, atol=1e-14)
    at_once = ACTIVATIONS[name].with_derivative(x.detach())
    torch.testing.assert_close(at_once, (function(x).detach(), exact), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=MARKS)])
@pytest.mark.parametrize("name", ["relu", "relu2", "relu6", "leaky_relu", "hardswish"])
def test_kinks_have_pytorchs_gradient(name, backend):
    """bf16 numbers are often -3, 0 or 3 exactly: the backends must not differ there from the reference."""
    gate = KINKS.float()[None].to(DEVICE).requires_grad_()
    swiglu(GateUp(gate, torch.ones_like(gate)), activation=name, backend=backend).sum().backward()
    (exact,) = torch.autograd.grad(ACTIVATIONS[name].function(gate).sum(), gate)
    torch.testing.assert_close(gate.grad, exact)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gelu_tanh"])  # ours; Transformers has its aliases
def test_name_means_what_transformers_means_by_it(name):
    """A model's configuration names its activation: ours of that name must be the same function."""
    x = torch.cat([away_from_kinks(), KINKS])
    # 1e-9: gelu_fast and gelu_python_tanh write sqrt(2/pi) with ten digits.
    torch.testing.assert_close(get_activation(name).function(x), ACT2FN[name](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_function_and_derivative_keep_dtype_and_shape(name, dtype):
    """A Python scalar or a comparison inside an activation must not widen what the operator computes in."""
    x = torch.randn(3, 4).to(dtype)
    for part in ACTIVATIONS[name][:2]:
        assert part(x).dtype == dtype
        assert part(x).shape == x.shape


@pytest.fixture
def _cubic():
    """An activation of our own, registered for one test."""
    register_activation("test_cubic", lambda x: x**3, lambda x: 3 * x**2)
    yield
    del ACTIVATIONS["test_cubic"]


@pytest.mark.usefixtures("_cubic")
def test_registered_activation_works_end_to_end():
    """A registered name runs through operator, recurrence and backward like a built-in one."""
    spec = RethinkingSpec(rounds=2, top_k=2, scale=1.5, activation="test_cubic")
    weights, x = layer(spec), torch.randn(6, 13, dtype=torch.float64)
    upstream = torch.randn_like(x)
    oracle = gradients(lambda x, w: rethink_reference(x, w, spec), x, weights, upstream)
    found = gradients(lambda x, w: rethink_folded(x, w, spec).y, x, weights, upstream)
    assert_equal_to(found, oracle, upstream)


@pytest.mark.parametrize("taken", ["silu", "swish", "gelu_pytorch_tanh"])
def test_taken_name_is_refused(taken):
    """A registered activation never changes its meaning, whether the name is an entry or an alias."""
    before = get_activation(taken)
    with pytest.raises(ValueError, match=f"'{taken}' is registered already, with other functions; choose another"):
        register_activation(taken, torch.sin, torch.cos)
    assert get_activation(taken) is before


def test_the_same_functions_again_change_nothing(monkeypatch):
    """A notebook's cell runs twice, and makes new functions of the same code; what reads another value is another."""
    monkeypatch.setattr(activations, "ACTIVATIONS", dict(ACTIVATIONS))

    def made(power):
        namespace = {}
        exec("f = lambda x: x**3\ndef g(x):\n    return 3 * x**2", shared, namespace)
        return namespace["f"], namespace["g"] if power == 3 else lambda x: power * x

    shared = {}
    first, again, other = made(3), made(3), made(4)
    register_activation("test_again", *first)
    register_activation("test_again", *again)
    assert first[0] is not again[0]
    assert activations.ACTIVATIONS["test_again"][:2] == first
    assert activations.ACTIVATIONS["test_again"].is_function(again[0])
    assert not activations.ACTIVATIONS["test_again"].is_function(again[1])
    with pytest.raises(ValueError, match="'test_again' is registered already, with other functions"):
        register_activation("test_again", *other)


def test_unknown_name_lists_the_known_ones():
    """A typo is answered with what there is, and with the way to add what is not."""
    with pytest.raises(ValueError, match=r"unknown activation 'sliu'; known are .*silu.*register_activation"):
        get_activation("sliu")
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="unknown activation 'sliu'"):
        swiglu(GateUp(x, x), activation="sliu")


def test_an_activation_without_a_triton_form_is_refused_there():
    """Triton's kernels cannot call a PyTorch function: an error that says what to add, and never another backend."""
    register_activation("test_without_triton", torch.sin, torch.cos)
    try:
        with pytest.raises(
            ValueError, match=r"'test_without_triton' has no Triton form \(there are silu, .*triton=\.\.\."
        ):
            triton_form("test_without_triton")
    finally:
        del ACTIVATIONS["test_without_triton"]


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"triton": torch.sin}, ValueError, "triton and triton_derivative belong together"),
        ({"triton": torch.sin, "triton_derivative": torch.cos}, TypeError, "triton must be .* @triton.jit, got <built"),
        ({"function": None}, TypeError, "function must be a function of a tensor, got None"),
        ({"derivative": 1.0}, TypeError, "derivative must be a function of a tensor, got 1.0"),
        ({"name": 3}, TypeError, "an activation's name must be a string, got 3"),
    ],
)
def test_wrong_registrations_are_refused(given, error, message):
    """What a kernel could not call is refused where it is given, not when it first runs."""
    before = dict(ACTIVATIONS)
    with pytest.raises(error, match=message):
        register_activation(**{"name": "test_wrong", "function": torch.sin, "derivative": torch.cos, **given})
    assert before == ACTIVATIONS


def test_the_table_needs_no_triton():
    """Whoever runs on PyTorch alone never loads Triton; every built-in name has its form there."""
    code = """
import sys
from graphmoe_kernels import ACTIVATIONS, register_activation
register_activation("mine", abs, abs)
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ACTIVATIONS:
        value, derivative, approximate = triton_form(name)
        assert (value.__name__, derivative.__name__) == (name, f"{name}_derivative")
        assert approximate is value or approximate.__name__ == f"approximate_{name}"

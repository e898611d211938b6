"""The Triton backend of `gru_step`: values and every gradient in every dtype, strides, registration, compilation."""

from collections import defaultdict

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from graphmoe_kernels import gru_step
from graphmoe_kernels.testing import relative_error, within_budget
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STATE = ("recurrent", "state", "total")


def arguments(tokens, width, dtype=torch.float32, state=True):
    """Arguments of `gru_step` in which no term is small beside the others."""

    def draw(*shape, std=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * std).to(DEVICE, dtype)

    given = {
        "inputs": draw(tokens, 3 * width),
        "recurrent": draw(tokens, 2 * width),
        "state": draw(tokens, width),
        "total": draw(tokens, width),
        "candidate_weight": draw(width, width, std=width**-0.5),
        "candidate_bias": draw(width),
    }
    return given if state else given | dict.fromkeys(STATE)


def run(given, grad=None, needs=None, **settings):
    """The output, and the gradient of each tensor of ``needs`` (all, if None) by its name."""
    leaves = {
        name: t if t is None else t.detach().requires_grad_(grad is not None and (needs is None or name in needs))
        for name, t in given.items()
    }
    out = gru_step(**leaves, **settings)
    if grad is not None:
        out.backward(grad.to(out.dtype))
    return out.detach(), {name: t.grad for name, t in leaves.items() if t is not None and t.grad is not None}


SIZES = [(17, 1), (1, 5), (70, 16), (17, 40), (70, 100)]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_within_budget(dtype, state, activation):
    """Token counts and widths that fill no tile, one and several, in the skinny and the wide configuration.

    The error is that of all sizes together: of the single number that the smallest have as a gradient, the reference's
    own error is a matter of luck.
    """
    found, literal, exact = defaultdict(list), defaultdict(list), defaultdict(list)
    for tokens, width in SIZES:
        given = arguments(tokens, width, dtype, state)
        double = {name: None if t is None else t.double() for name, t in given.items()}
        grad = torch.randn(tokens, 2 * width, device=DEVICE).to(dtype)
        for results, tensors, backend in (
            (found, given, "triton"),
            (literal, given, "reference"),
            (exact, double, "reference"),
        ):
            out, grads = run(tensors, grad, candidate_activation=activation, backend=backend)
            assert out.shape == (tokens, 2 * width)
            assert all(t.dtype == tensors["inputs"].dtype for t in (out, *grads.values()))
            for name, tensor in (("output", out), *grads.items()):
                results[name].append(tensor.double().flatten())
    assert found.keys() == literal.keys()
    for name, oracle in exact.items():
        error, budget = (relative_error(torch.cat(r[name]), torch.cat(oracle)) for r in (found, literal))
        assert within_budget(error, budget, dtype), (name, error, budget)


@pytest.mark.parametrize("state", [True, False])
def test_no_tokens(state):
    """An empty batch has an empty output, empty gradients, and zero gradients for the parameters."""
    given = arguments(0, 40, state=state)
    out, grads = run(given, torch.zeros(0, 80, device=DEVICE), backend="triton")
    assert out.shape == (0, 80)
    assert all(grads[name].shape == given[name].shape for name in grads)
    assert grads["candidate_bias"].abs().sum() == 0
    assert ("candidate_weight" in grads) == state


@pytest.mark.parametrize("tokens", [1, 17])
def test_column_slices_of_wider_tensors(tokens):
    """Callers pass slices of the products they merge: any row stride, also of the weight and of the gradient."""
    given = arguments(tokens, 40)
    wider = {
        name: torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))], dim=-1)
        for name, t in given.items()
    }
    sliced = {name: wider[name][..., t.shape[-1] : 2 * t.shape[-1]] for name, t in given.items()}
    grad = torch.randn(tokens, 240, device=DEVICE)[:, 80:160]
    expected, expected_grads = run(given, grad.contiguous(), backend="triton")
    found, grads = run(sliced, grad, backend="triton")
    assert torch.equal(found, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


def test_transposed_and_expanded_arguments():
    """Elements of a row that do not lie side by side (a transpose, the gradient of a sum) are copied, not misread."""
    given = arguments(17, 16)
    transposed = {
        name: t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2] for name, t in given.items()
    }
    grad = torch.ones((), device=DEVICE).expand(17, 32)
    expected, expected_grads = run(given, grad.contiguous(), backend="triton")
    found, grads = run(transposed, grad, backend="triton")
    assert torch.equal(found, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


@pytest.mark.parametrize(
    "needs", [("inputs",), ("state",), ("total",), ("candidate_weight",), ("candidate_bias",), STATE]
)
def test_gradients_that_are_asked_for_alone(needs):
    """A frozen argument gets no gradient, and the others' do not change for it."""
    given = arguments(17, 16)
    grad = torch.randn(17, 32, device=DEVICE)
    _, everything = run(given, grad, backend="triton")
    _, grads = run(given, grad, needs, backend="triton")
    assert grads.keys() == set(needs)
    assert all(torch.equal(grads[name], everything[name]) for name in needs)


def test_gradients_of_one_token_share_no_memory():
    """The gates' gradient is part of the inputs': as two leaves' grads they must not be one memory."""
    _, grads = run(arguments(1, 16), torch.randn(1, 32, device=DEVICE), backend="triton")
    before = grads["recurrent"].clone()
    grads["inputs"].zero_()
    assert torch.equal(grads["recurrent"], before)


def test_inference_keeps_nothing():
    """The candidate is written for a backward only: not without gradients, and not in the first round."""
    step = torch.ops.graphmoe.gru_step
    later, first = arguments(17, 16), arguments(17, 16, state=False)
    assert [t.numel() for t in step(*later.values(), "sigmoid", False)] == [17 * 32, 0]
    assert [t.numel() for t in step(*later.values(), "sigmoid", True)] == [17 * 32, 17 * 16]
    assert [t.numel() for t in step(*first.values(), "sigmoid", True)] == [17 * 32, 0]


def test_backward_without_what_it_needs_is_refused():
    """The raw operator, told to keep nothing, says so instead of returning a wrong gradient."""
    given = arguments(1, 16)
    given["inputs"].requires_grad_()
    out, _ = torch.ops.graphmoe.gru_step(*given.values(), "sigmoid", False)
    with pytest.raises(RuntimeError, match="save=False, which leaves no backward; pass save=True"):
        out.sum().backward()


def test_repetition_is_bit_equal():
    """No result depends on the order in which programs run."""
    given, grad = arguments(70, 40, torch.bfloat16), torch.randn(70, 80, device=DEVICE)
    first, first_grads = run(given, grad, backend="triton")
    again, again_grads = run(given, grad, backend="triton")
    assert torch.equal(first, again)
    assert all(torch.equal(first_grads[name], again_grads[name]) for name in first_grads)


def test_other_dtypes_are_cast_to_the_inputs():
    """fp32 adapters, and a sum kept in fp32, beside bf16 inputs; their gradients come back in fp32."""
    given = arguments(17, 16)
    given["inputs"] = given["inputs"].bfloat16()
    out, grads = run(given, torch.randn(17, 32, device=DEVICE), backend="triton")
    assert out.dtype == grads["inputs"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in grads.items() if name != "inputs")
    bias = given | {"candidate_bias": given["candidate_bias"].double()}
    assert torch.equal(run(bias, backend="triton")[0], out)


def test_autocast_changes_nothing():
    """Dtypes are the caller's choice, forward and backward, inside autocast too."""
    given, grad = arguments(17, 16), torch.randn(17, 32, device=DEVICE)
    expected, expected_grads = run(given, grad, backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        found, grads = run(given, grad, backend="triton")
    assert torch.equal(found, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


@pytest.mark.parametrize("state", [True, False])
def test_opcheck(state):
    """Schema, fake tensors and autograd of both operators agree with what they do."""
    given = arguments(17, 16, state=state)
    ops = torch.ops.graphmoe
    torch.library.opcheck(ops.gru_step, (*given.values(), "sigmoid", False))
    trained = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    torch.library.opcheck(ops.gru_step, (*trained.values(), "tanh", True))
    _, candidate = ops.gru_step(*given.values(), "tanh", True)
    inputs, recurrent, carried, _, weight, bias = given.values()
    grad = torch.randn(17, 32, device=DEVICE)
    torch.library.opcheck(
        ops.gru_step_backward, (grad, inputs, recurrent, carried, candidate, weight, bias, "tanh", state, True)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("state", [True, False])
def test_compiles_in_one_graph(state, dynamic):
    """torch.compile finds no break, forward or backward, and does not recompile for another token count."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gru_step, fullgraph=True, backend=counter, dynamic=dynamic)
    for tokens in (17, 5) if dynamic else (17,):
        given, grad = arguments(tokens, 16, state=state), torch.randn(tokens, 32, device=DEVICE)
        expected, expected_grads = run(given, grad, backend="triton")
        leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
        out = compiled(**leaves, backend="triton")
        out.backward(grad)
        assert torch.equal(out, expected)
        assert all(torch.equal(leaves[name].grad, expected_grads[name]) for name in expected_grads)
    assert counter.frame_count == 1


REFUSALS = [
    (
        {"inputs": torch.zeros(4, 15, device=DEVICE).double()},
        {},
        ValueError,
        "inputs is torch.float64: the Triton kernels take",
    ),
    ({"state": None}, {}, ValueError, "state missing: recurrent, state and total are given together"),
    ({"total": torch.zeros(4, 6, device=DEVICE)}, {}, ValueError, r"total must be \[4, 5\].*got \[4, 6\]"),
    ({}, {"candidate_activation": "relu"}, ValueError, "unknown candidate_activation 'relu'"),
]


@pytest.mark.parametrize("change, settings, error, message", REFUSALS)
def test_refusals_come_before_a_launch(change, settings, error, message):
    """What the kernels cannot take is refused by name, whichever backend."""
    with pytest.raises(error, match=message):
        gru_step(**(arguments(4, 5) | change), **settings, backend="triton")

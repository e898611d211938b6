"""`gru_step`: Eq. 5 and 6 written out, gradients, budgets and every refusal."""

import pytest
import torch

from graphmoe_kernels import gru_step
from graphmoe_kernels.testing import relative_error, within_budget
from tests.kernels.gru_operands import WIDTH, arguments, by_definition

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.mark.oracle
@BACKENDS
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("tokens, width", [(4, 5), (0, 5), (1, 1), (33, 16)])
def test_equals_the_equations(tokens, width, activation, state, backend):
    """h' and H + h' for a given and for the zero state, at a padded width and at none."""
    given = arguments(tokens, width, state=state)
    exact = by_definition(*given.values(), getattr(torch, activation))
    found = gru_step(**given, candidate_activation=activation, backend=backend)
    assert found.shape == (tokens, 2 * width)
    assert relative_error(found, exact) <= 1e-14


@pytest.mark.oracle
@BACKENDS
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_gradcheck(activation, state, backend):
    """Every floating input gets its gradient, with a state and without."""
    given = {
        name: None if tensor is None else tensor.requires_grad_() for name, tensor in arguments(state=state).items()
    }
    names = [name for name, tensor in given.items() if tensor is not None]

    def run(*tensors):
        changed = given | dict(zip(names, tensors, strict=True))
        return gru_step(**changed, candidate_activation=activation, backend=backend)

    assert torch.autograd.gradcheck(run, [given[name] for name in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [True, False])
def test_error_is_within_budget(dtype, state):
    """Error against fp64 on the same rounded inputs: at most twice that of the equations themselves."""
    given = arguments(64, 24, dtype, state)
    wide = {name: None if tensor is None else tensor.double() for name, tensor in given.items()}
    exact = by_definition(*wide.values(), torch.sigmoid)
    literal = by_definition(*given.values(), torch.sigmoid)
    found = gru_step(**given)
    assert found.dtype == dtype
    assert within_budget(relative_error(found, exact), relative_error(literal, exact), dtype)


def test_half_precision_inputs_with_fp32_weights():
    """fp32 adapters on a bf16 model are cast to the inputs' dtype; their gradients come back in fp32."""
    given = arguments(8, dtype=torch.float32) | {"inputs": torch.randn(8, 3 * WIDTH).bfloat16()}
    for name in ("recurrent", "candidate_weight", "candidate_bias"):
        given[name].requires_grad_()
    found = gru_step(**given)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert given["candidate_weight"].grad.dtype == torch.float32
    assert given["recurrent"].grad.dtype == torch.float32


def test_autocast_changes_nothing():
    """Dtypes are the caller's choice: fp32 inputs are computed in fp32 inside autocast too."""
    given = arguments(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gru_step(**given)
    assert torch.equal(found, gru_step(**given))


@BACKENDS
def test_non_finite_token_stays_its_own_problem(backend):
    """NaN in one token's inputs reaches that token's state only."""
    given = arguments(5, dtype=torch.float32)
    clean = gru_step(**given, backend=backend)
    given["inputs"][3] = float("nan")
    found = gru_step(**given, backend=backend)
    others = torch.tensor([0, 1, 2, 4])
    assert found[3].isnan().all()
    assert torch.equal(found[others], clean[others])


REFUSALS = [
    ({"inputs": torch.zeros(4, 14)}, ValueError, r"inputs must be \[4, 15\] .*width 5.*got \[4, 14\]"),
    ({"inputs": torch.zeros(15)}, ValueError, r"inputs must be .*got \[15\]"),
    ({"inputs": torch.zeros(4, 15).long()}, TypeError, "inputs must be floating point, got torch.int64"),
    ({"state": torch.zeros(4, 6)}, ValueError, r"state must be \[4, 5\].*got \[4, 6\]"),
    ({"state": torch.zeros(3, 5)}, ValueError, r"state must be \[4, 5\].*got \[3, 5\]"),
    ({"state": torch.zeros(4, 5, device="meta")}, ValueError, "state is on meta, inputs on cpu"),
    ({"recurrent": torch.zeros(4, 5)}, ValueError, r"recurrent must be \[4, 10\].*got \[4, 5\]"),
    ({"total": torch.zeros(4, 10)}, ValueError, r"total must be \[4, 5\].*got \[4, 10\]"),
    ({"total": torch.zeros(4, 5).int()}, TypeError, "total must be floating point, got torch.int32"),
    ({"recurrent": None}, ValueError, "recurrent missing: recurrent, state and total are given together"),
    ({"state": None, "total": None}, ValueError, "state and total missing: .* or all None in the first round"),
    ({"inputs": [0.0] * 15}, TypeError, "inputs must be a tensor, got list"),
    ({"state": 0}, TypeError, "state must be a tensor, got int"),
    # One tensor that is wrong is the one that is named, also where it is the first.
    ({"candidate_bias": torch.zeros(4)}, ValueError, r"^candidate_bias must be \[5\].*width 5.*got \[4\]"),
    ({"inputs": torch.zeros(3, 15)}, ValueError, r"^inputs must be \[4, 15\].*got \[3, 15\]"),
    ({"candidate_bias": None}, TypeError, "candidate_bias must be a tensor, got NoneType"),
    ({"candidate_bias": torch.zeros(0)}, ValueError, r"the GRU's width of at least 1; got \[0\]"),
    ({"candidate_activation": ["tanh"]}, ValueError, r"candidate_activation \['tanh'\]; expected one of 'sigmoid'"),
    ({"candidate_weight": torch.zeros(5, 4)}, ValueError, r"candidate_weight must be \[5, 5\].*\[5, 4\]"),
    ({"candidate_bias": torch.zeros(1, 5)}, ValueError, r"candidate_bias must be \[G\].*got \[1, 5\]"),
    (
        {"candidate_activation": "relu"},
        ValueError,
        "candidate_activation 'relu'; expected one of 'sigmoid', 'tanh'",
    ),
    ({"backend": "numpy"}, ValueError, "unknown backend 'numpy'"),
]


@pytest.mark.parametrize("change, error, message", REFUSALS)
def test_refusals_name_argument_and_expectation(change, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    with pytest.raises(error, match=message):
        gru_step(**(arguments(dtype=torch.float32) | change))

"""`expert_swiglu` as an operator among others: dtypes, autocast, broken tokens, registration, every refusal."""

import pytest
import torch

from graphmoe_kernels import expert_swiglu
from graphmoe_kernels.testing import SLACK, relative_error
from tests.kernels.expert_operands import FLOATING, LATER_ROUND, cast, operands, results


def test_fp32_parameters_with_bf16_activations():
    """Adapters stay fp32 on a bf16 model: c and z are bf16, and the adapters' gradients come back in fp32."""
    given = operands(inner=6)
    parameters = ("gate_B", "up_B", "down_A", "fold_gate", "fold_up", "weights")
    mixed = {n: t.float() if n in parameters else t for n, t in cast(given, torch.bfloat16).items()}
    found, rounded = results(mixed), results(cast(given, torch.bfloat16))
    assert found["c"].dtype == found["z"].dtype == torch.bfloat16
    for name in parameters:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], rounded[name]) <= SLACK[torch.bfloat16] * 2


def test_autocast_changes_nothing():
    """Dtypes are the caller's choice: fp32 is computed in fp32 inside autocast too, also in backward."""
    given = cast(operands(inner=6), torch.float32)
    plain = results(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(given)
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_token_stays_its_own_problem(bad, inner):
    """A broken token is NaN or infinite itself and moves no other token, with valid ids and no crash."""
    given = cast(operands(inner=inner), torch.float32)
    clean_c, clean_z = expert_swiglu(**given)
    given["gate"][4] = bad
    given["weights"][4] = float("nan")
    c, z = expert_swiglu(**given)
    others = [i for i in range(9) if i != 4]
    assert not c[4].isfinite().any()
    assert torch.equal(c[others], clean_c[others])
    assert torch.equal(z[others], clean_z[others])


def test_second_derivatives_are_refused():
    """There is no double backward: asking for one is an error, not a silent zero."""
    given = operands()
    given["gate"].requires_grad_()
    c, _ = expert_swiglu(**given)
    (grad,) = torch.autograd.grad(c.square().sum(), given["gate"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"expert_swiglu_backward.* no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("inner, dropout", [(None, 0.0), (6, 0.5)], ids=["first round", "later round, dropout"])
def test_operator_is_registered_as_torch_expects(inner, dropout):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = cast(operands(inner=inner), torch.float32)
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    tensors = [given.get(name) for name in ("gate", "up", *LATER_ROUND, *FLOATING[2:], "experts")]
    rest = (1.5, "silu", dropout, torch.tensor([3]) if dropout else None)
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu.default, (*tensors, *rest))
    plain = [None if t is None else t.detach() for t in tensors]
    grads = torch.randn(9, 21), torch.randn(9, 15)
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu_backward.default, (*grads, *plain, *rest))


REFUSALS = [
    ({"gate": torch.zeros(9)}, ValueError, r"expected gate \[tokens, F\].*got \[9\]"),
    ({"experts": torch.zeros(9).long()}, ValueError, r"experts \[tokens, k\].*\[9\]"),
    ({"down_A": torch.zeros(3, 21)}, ValueError, r"down_A \[experts, rank, F\].*\[3, 21\]"),
    ({"up": torch.zeros(9, 20)}, ValueError, r"up must be \[9, 21\] .*got \[9, 20\]"),
    (
        {"low_gate": torch.zeros(9, 14)},
        ValueError,
        r"low_gate must be \[9, 15\] for 9 tokens, F=21, 5 experts",
    ),
    ({"low_up": torch.zeros(8, 15)}, ValueError, r"low_up must be \[9, 15\].*got \[8, 15\]"),
    ({"gate_B": torch.zeros(5, 3, 21)}, ValueError, r"gate_B must be \[5, 21, 3\].*got \[5, 3, 21\]"),
    ({"up_B": torch.zeros(4, 21, 3)}, ValueError, r"up_B must be \[5, 21, 3\].*got \[4, 21, 3\]"),
    ({"down_A": torch.zeros(5, 3, 20)}, ValueError, r"down_A must be \[5, 3, 21\].*got \[5, 3, 20\]"),
    ({"weights": torch.zeros(9, 3)}, ValueError, r"weights must be \[9, 2\].*got \[9, 3\]"),
    ({"experts": torch.zeros(8, 2).long()}, ValueError, r"experts must be \[9, 2\].*got \[8, 2\]"),
    ({"state": torch.zeros(8, 6)}, ValueError, r"state must be \[9, 6\].*got \[8, 6\]"),
    ({"state": torch.zeros(6)}, ValueError, r"state must be \[9, 6\].*got \[6\]"),
    ({"fold_gate": torch.zeros(21, 5)}, ValueError, r"fold_gate must be \[21, 6\].*got \[21, 5\]"),
    ({"fold_up": torch.zeros(6, 21)}, ValueError, r"fold_up must be \[21, 6\].*got \[6, 21\]"),
    (
        {"up": torch.zeros(9, 21, device="meta")},
        ValueError,
        "up is on meta, gate on cpu; put them on one device",
    ),
    ({"experts": torch.zeros(9, 2).long().to("meta")}, ValueError, "experts is on meta, gate on cpu"),
    ({"experts": torch.zeros(9, 2)}, TypeError, "experts has dtype torch.float32; experts are integers"),
    ({"gate_B": torch.zeros(5, 21, 3).long()}, TypeError, "gate_B has dtype torch.int64; .* floating point"),
    (
        {"experts": torch.zeros(9, 6).long(), "weights": torch.zeros(9, 6)},
        ValueError,
        r"1\.\.5 experts.*got k=6",
    ),
    ({"fold_gate": None}, ValueError, "state, fold_gate and fold_up belong together: pass all three or none"),
    ({"state": None}, ValueError, "state, fold_gate and fold_up belong together"),
    ({"activation": "swoosh"}, ValueError, "unknown activation 'swoosh'; known are"),
    ({"dropout": 0.1}, ValueError, "dropout > 0 needs a seed: one int64 tensor"),
    ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got -0.1"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; expected one of 'auto', 'torch'"),
]


@pytest.mark.parametrize("change, error, message", REFUSALS)
def test_refusals_name_argument_and_expectation(change, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    given = cast(operands(inner=6), torch.float32)
    with pytest.raises(error, match=message):
        expert_swiglu(**(given | change))


@pytest.mark.parametrize("wrong", [5, -1])
def test_id_out_of_range_is_an_error(wrong):
    """An id that names no expert never reads another expert's weights."""
    given = operands()
    given["experts"][3, 1] = wrong
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        expert_swiglu(**given)

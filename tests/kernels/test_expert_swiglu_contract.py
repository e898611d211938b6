"""`expert_swiglu` as an operator among others: dtypes, autocast, broken tokens, registration, every refusal."""

import os
import subprocess
import sys

import pytest
import torch

from graphmoe_kernels import expert_swiglu
from graphmoe_kernels.experts.operands import Inputs, Settings
from graphmoe_kernels.testing import SLACK, relative_error
from tests.kernels.expert_operands import FLOATING, LATER_ROUND, SCALES, cast, operands, results


def test_fp32_parameters_with_bf16_activations():
    """Adapters stay fp32 on a bf16 model: c and z are bf16, and the adapters' gradients come back in fp32."""
    given = operands(inner=6, scales=True)
    parameters = ("gate_B", "up_B", "down_A", "fold_gate", "fold_up", "weights", *SCALES)
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


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scale vectors"])
@pytest.mark.parametrize("inner, dropout", [(None, 0.0), (6, 0.5)], ids=["first round", "later round, dropout"])
def test_operator_is_registered_as_torch_expects(inner, dropout, scales):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = cast(operands(inner=inner, scales=scales), torch.float32)
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    tensors = Inputs(*(given.get(name) for name in Inputs._fields))
    biases = [torch.randn(21), torch.randn(21)] if scales else [None, None]
    seed = torch.tensor([3]) if dropout else None
    settings = Settings(1.5, "silu", dropout, *biases, seed, torch.arange(9).int())
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu.default, (*tensors, *settings, "torch"))
    plain = [None if t is None else t.detach() for t in tensors]
    grads = torch.randn(9, 21), torch.randn(9, 15)
    floating = [t is not None for t in tensors[:-1]]
    for needed in (floating, [False] * len(floating), [i == 0 for i in range(len(floating))]):
        arguments = (*grads, *plain, *settings, "torch", needed)
        torch.library.opcheck(torch.ops.graphmoe.expert_swiglu_backward.default, arguments)


@pytest.mark.oracle
@pytest.mark.parametrize("wanted", [*FLOATING, *LATER_ROUND, *SCALES])
def test_one_gradient_alone_is_that_of_all_together(wanted):
    """What is frozen gets no gradient, and no other input's gradient lands in its place."""
    given = operands(inner=6, scales=True)
    every = results(given)
    leaf = given[wanted].clone().requires_grad_()
    c, z = expert_swiglu(**(given | {wanted: leaf}), scale=1.5)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (c, z)]
    (found,) = torch.autograd.grad([c, z], leaf, upstream)
    assert torch.equal(found, every[wanted])


def test_order_and_tickets_change_nothing():
    """They steer the Triton kernels; elsewhere they are accepted and without effect, and tickets stay zero."""
    given, tickets = operands(inner=6), torch.zeros(1, dtype=torch.int32)
    plain = results(given)
    found = results(given, order=torch.arange(9).flip(0).int(), tickets=tickets)
    assert not tickets.any()
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


def test_scale_vectors_of_ones_change_nothing():
    """m = 1 is the expert without scale vectors."""
    given = operands(inner=6)
    ones = torch.ones(5, 21, dtype=torch.float64)
    for found, exact in zip(
        expert_swiglu(**given, gate_scale=ones, up_scale=ones), expert_swiglu(**given), strict=True
    ):
        assert torch.equal(found, exact)


REFUSALS = [
    ({"gate": torch.zeros(9)}, ValueError, r"expected gate \[tokens, F\].*got \[9\]"),
    ({"experts": torch.zeros(9).long()}, ValueError, r"experts \[tokens, k\].*\[9\]"),
    ({"down_A": torch.zeros(3, 21)}, ValueError, r"down_A \[experts, rank, F\].*\[3, 21\]"),
    ({"up": torch.zeros(9, 20)}, ValueError, r"up must be \[9, 21\] .*got \[9, 20\]"),
    (
        {"low": torch.zeros(9, 15)},
        ValueError,
        r"low must be \[9, 30\] for 9 tokens, F=21, 5 experts of rank 3 \(by down_A\) and k=2; got \[9, 15\]",
    ),
    ({"low": torch.zeros(8, 30)}, ValueError, r"low must be \[9, 30\].*got \[8, 30\]"),
    ({"low_update": torch.zeros(9, 15)}, ValueError, r"low_update must be \[9, 30\].*got \[9, 15\]"),
    ({"low_update": torch.zeros(9, 30).long()}, TypeError, "low_update must be floating point, got torch.int64"),
    (
        {"gate_scale": torch.ones(5, 21)},
        ValueError,
        "gate_scale and up_scale belong together: pass both or none",
    ),
    ({"up_scale": torch.ones(5, 21)}, ValueError, "gate_scale and up_scale belong together"),
    (
        {"gate_scale": torch.ones(5), "up_scale": torch.ones(5, 21)},
        ValueError,
        r"gate_scale must be \[5, 21\].*got \[5\]",
    ),
    (
        {"gate_scale": torch.ones(5, 21), "up_scale": torch.ones(21, 5)},
        ValueError,
        r"up_scale must be \[5, 21\].*got \[21, 5\]",
    ),
    ({"gate_bias": torch.ones(21)}, ValueError, r"gate_bias and up_bias belong together.*\(zeros where there is none"),
    (
        {"gate_bias": torch.ones(21), "up_bias": torch.ones(5, 21)},
        ValueError,
        r"up_bias must be \[21\], as many as gate has columns, got \[5, 21\]",
    ),
    (
        {"gate_bias": torch.ones(21, requires_grad=True), "up_bias": torch.ones(21)},
        ValueError,
        "gate_bias is a constant of this operator and gets no gradient; pass it detached",
    ),
    (
        {"gate_bias": torch.ones(21, device="meta"), "up_bias": torch.ones(21)},
        ValueError,
        "gate_bias is on meta, gate on cpu",
    ),
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
    ({"experts": torch.zeros(9, 2)}, TypeError, "experts must be integers .*, got torch.float32"),
    ({"gate_B": torch.zeros(5, 21, 3).long()}, TypeError, "gate_B must be floating point, got torch.int64"),
    (
        {"experts": torch.zeros(9, 6).long(), "weights": torch.zeros(9, 6)},
        ValueError,
        r"1\.\.5 experts.*got k=6",
    ),
    ({"fold_gate": None}, ValueError, "state, fold_gate and fold_up belong together: pass all three or none"),
    ({"state": None}, ValueError, "state, fold_gate and fold_up belong together"),
    ({"activation": "swoosh"}, ValueError, "unknown activation 'swoosh'; known are"),
    ({"dropout": 0.1}, ValueError, "dropout > 0 needs a seed: one int64 tensor"),
    (
        {"dropout": 0.1, "seed": torch.tensor([7], dtype=torch.int32)},
        ValueError,
        r"seed must be one int64.*torch.int32 \[1\]",
    ),
    ({"dropout": 0.1, "seed": torch.tensor([7, 8])}, ValueError, r"seed must be one int64.*torch.int64 \[2\]"),
    ({"dropout": 0.1, "seed": 42}, TypeError, "seed must be a tensor, got int"),
    ({"dropout": 0.1, "seed": torch.zeros(1, device="meta").long()}, ValueError, "seed is on meta, gate on cpu"),
    ({"order": torch.zeros(9).long()}, ValueError, r"order must be int32 \[9\] and contiguous.*torch.int64 \[9\]"),
    ({"order": torch.zeros(10).int()}, ValueError, r"order must be int32 \[9\].*torch.int32 \[10\]"),
    ({"order": torch.zeros(18).int()[::2]}, ValueError, r"order must be int32 \[9\] and contiguous"),
    ({"order": torch.zeros(9, device="meta").int()}, ValueError, "order is on meta, gate on cpu"),
    ({"tickets": torch.zeros(0).int()}, ValueError, r"tickets must be int32 zeros, 1 or more.*torch.int32 \[0\]"),
    ({"experts": torch.zeros(9, 2).bool()}, TypeError, "experts must be integers .*, got torch.bool"),
    ({"gate": [[0.0] * 21] * 9}, TypeError, "gate must be a tensor, got list; torch.as_tensor makes one"),
    ({"low": None}, TypeError, "low must be a tensor, got NoneType"),
    (
        {"up": torch.zeros(9, 21).to_sparse()},
        TypeError,
        r"up must be a dense tensor, got layout torch.sparse_coo; pass",
    ),
    (
        {"up_B": torch.zeros(5, 21, 3).to(torch.float8_e4m3fn)},
        TypeError,
        "up_B must be floating .*float8_e4m3fn; float64",
    ),
    (
        {"experts": torch.zeros(9, 2, dtype=torch.complex64)},
        TypeError,
        "experts must be integers .*, got torch.complex64",
    ),
    ({"state": torch.tensor(1.0)}, ValueError, r"state must be \[9, 0\].*got \[\]"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ({"scale": "1.5"}, TypeError, "scale must be a number, got '1.5'"),
    ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
    ({"activation": ["silu"]}, ValueError, r"unknown activation \['silu'\]; known are"),
    ({"order": [0] * 9}, TypeError, "order must be a tensor, got list"),
    ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got -0.1"),
    (
        {"backend": "cuda"},
        ValueError,
        "unknown backend 'cuda'; expected one of 'auto', 'triton', 'torch', 'reference'",
    ),
]


@pytest.mark.parametrize("change, error, message", REFUSALS)
def test_refusals_name_argument_and_expectation(change, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    given = cast(operands(inner=6), torch.float32)
    with pytest.raises(error, match=message):
        expert_swiglu(**(given | change))


TRITON_ON_CPU = """
import torch
from graphmoe_kernels import expert_swiglu

gate, low, B = torch.zeros(2, 16), torch.zeros(2, 8), torch.zeros(2, 16, 2)
try:
    expert_swiglu(gate, gate, low, B, B, B.mT, torch.ones(2, 1), torch.zeros(2, 1).long(), backend="triton")
except ValueError as error:
    print(error)
"""


def test_triton_on_cpu_tensors_is_refused():
    """No driver's error from inside Triton, and no other path: what is where, and what runs there.

    In a process of its own, as this one may interpret the kernels.
    """
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", TRITON_ON_CPU], capture_output=True, text=True, env=environment)
    assert "gate is on cpu, and backend='triton' runs on CUDA devices" in run.stdout, run.stdout + run.stderr
    assert "use backend='torch'" in run.stdout


def test_an_intermediate_size_of_0_is_refused():
    """It used to divide by zero where the tokens are cut into blocks."""
    given = operands() | {name: t[..., :0] for name, t in operands().items() if name in ("gate", "up", "down_A")}
    given |= {name: given[name][:, :0] for name in ("gate_B", "up_B")}
    with pytest.raises(ValueError, match=r"gate must be \[tokens, F\] with F of at least 1, got \[9, 0\]"):
        expert_swiglu(**given)


BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
IDS = pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])


@BACKENDS
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_id_out_of_range_is_refused(top_k, wrong, backend):
    """It would read another expert's weights, or make a count of its size: 8 TB for 2^40."""
    given = operands(top_k=top_k)
    given["experts"][3, -1] = wrong
    with pytest.raises(ValueError, match=rf"experts must be in 0\.\.4 \(there are 5\), got .*{wrong}"):
        expert_swiglu(**given, backend=backend)


@BACKENDS
def test_an_expert_twice_in_a_row_is_refused(backend):
    """One of the two would be lost in z and counted in c."""
    given = operands()
    given["experts"][8] = 3
    with pytest.raises(ValueError, match="experts must be distinct within a row"):
        expert_swiglu(**given, backend=backend)


@BACKENDS
@IDS
def test_ids_of_every_integer_dtype(backend, dtype):
    """A narrow dtype must not wrap in the arithmetic on ids, nor bytes index as a mask; dropout reads ids too."""
    given = operands(inner=6)
    settings = {"dropout": 0.5, "seed": torch.tensor([3]), "backend": backend}
    exact = results(given, **settings)
    found = results(given | {"experts": given["experts"].to(dtype)}, **settings)
    for name, tensor in exact.items():
        assert torch.equal(found[name], tensor), name

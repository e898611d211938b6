"""`expert_swiglu` as an operator among others: dtypes, autocast, broken tokens, registration, every refusal."""

import os
import subprocess
import sys

import pytest
import torch

from graphmoe_kernels import GateUp, LowRankUpdate, expert_swiglu, swiglu
from graphmoe_kernels.experts import pytorch_few
from graphmoe_kernels.experts.op import flatten
from graphmoe_kernels.testing import SLACK, relative_error
from tests.kernels.expert_operands import FLOATING, LATER_ROUND, SCALES, cast, operands, packed, results, run


@pytest.fixture(params=["by expert", "gathered"])
def form(request, monkeypatch):
    """Both forms of the PyTorch forward, whatever the sizes."""
    monkeypatch.setattr(pytorch_few, "MOST_PAIRS", 10**6 if request.param == "gathered" else 0)


def test_fp32_parameters_with_bf16_activations(form):
    """Adapters stay fp32 on a bf16 model: c and z are bf16, and the adapters' gradients come back in fp32."""
    given = operands(inner=6, scales=True)
    parameters = ("gate_B", "up_B", "down_A", "fold_gate", "fold_up", "routing_weights", *SCALES)
    mixed = {n: t.float() if n in parameters else t for n, t in cast(given, torch.bfloat16).items()}
    found, rounded = results(mixed), results(cast(given, torch.bfloat16))
    assert found["hidden"].dtype == found["low_down"].dtype == torch.bfloat16
    for name in parameters:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], rounded[name]) <= SLACK[torch.bfloat16] * 2


def test_autocast_changes_nothing(form):
    """Dtypes are the caller's choice: fp32 is computed in fp32 inside autocast too, also in backward."""
    given = cast(operands(inner=6), torch.float32)
    plain = results(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(given)
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_token_stays_its_own_problem(bad, inner, form):
    """A broken token is NaN or infinite itself and moves no other token, with valid ids and no crash."""
    given = cast(operands(inner=inner), torch.float32)
    clean_c, clean_z = run(**given)
    given["gate"][4] = bad
    given["routing_weights"][4] = float("nan")
    c, z = run(**given)
    others = [i for i in range(9) if i != 4]
    assert not c[4].isfinite().any()
    assert torch.equal(c[others], clean_c[others])
    assert torch.equal(z[others], clean_z[others])


def test_second_derivatives_are_refused():
    """There is no double backward: asking for one is an error, not a silent zero."""
    given = operands()
    given["gate"].requires_grad_()
    c, _ = run(**given)
    (grad,) = torch.autograd.grad(c.square().sum(), given["gate"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"expert_swiglu_backward.* no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scale vectors"])
@pytest.mark.parametrize("inner, dropout", [(None, 0.0), (6, 0.5)], ids=["first round", "later round, dropout"])
def test_operator_is_registered_as_torch_expects(inner, dropout, scales):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = cast(operands(inner=inner, scales=scales), torch.float32)
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    extras = {"dropout": dropout, "seed": torch.tensor([3]), "token_order": torch.arange(9).int()}
    biases = {"gate_bias": torch.randn(21), "up_bias": torch.randn(21)} if scales else {}
    flat = flatten(packed(given | extras | biases))
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu.default, (*flat, 1.5, "silu", "torch"))
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in flat]
    grads = torch.randn(9, 21), torch.randn(9, 15)
    floating = [t is not None for t in packed(given).floating()]
    for needed in (floating, [False] * len(floating), [i == 0 for i in range(len(floating))]):
        arguments = (*grads, *plain, 1.5, "silu", "torch", needed)
        torch.library.opcheck(torch.ops.graphmoe.expert_swiglu_backward.default, arguments)


@pytest.mark.oracle
@pytest.mark.parametrize("wanted", [*FLOATING, *LATER_ROUND, *SCALES])
def test_one_gradient_alone_is_that_of_all_together(wanted):
    """What is frozen gets no gradient, and no other input's gradient lands in its place."""
    given = operands(inner=6, scales=True)
    every = results(given)
    leaf = given[wanted].clone().requires_grad_()
    c, z = run(**(given | {wanted: leaf}), scale=1.5)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (c, z)]
    (found,) = torch.autograd.grad([c, z], leaf, upstream)
    assert torch.equal(found, every[wanted])


def test_an_order_of_tokens_changes_nothing():
    """It steers the Triton kernels; elsewhere it is accepted and without effect."""
    given = operands(inner=6)
    plain, found = results(given), results(given, token_order=torch.arange(9).flip(0).int())
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


def test_scale_vectors_of_ones_change_nothing():
    """m = 1 is the expert without scale vectors."""
    given = operands(inner=6)
    ones = torch.ones(5, 21, dtype=torch.float64)
    for found, exact in zip(run(**given, gate_scale=ones, up_scale=ones), run(**given), strict=True):
        assert torch.equal(found, exact)


REFUSALS = [
    ({"gate": torch.zeros(9)}, ValueError, r"expected pre_activations.gate \[tokens, F\].*got \[9\]"),
    ({"expert_ids": torch.zeros(9).long()}, ValueError, r"expert_ids \[tokens, k\].*\[9\]"),
    ({"down_A": torch.zeros(3, 21)}, ValueError, r"down_A \[experts, rank, F\].*\[3, 21\]"),
    ({"up": torch.zeros(9, 20)}, ValueError, r"pre_activations.up must be \[9, 21\] .*got \[9, 20\]"),
    (
        {"low": torch.zeros(9, 15)},
        ValueError,
        r"low must be \[9, 30\] for 9 tokens, F=21, 5 experts of rank 3 \(by down_A\) and k=2; got \[9, 15\]",
    ),
    ({"low": torch.zeros(8, 30)}, ValueError, r"low must be \[9, 30\].*got \[8, 30\]"),
    ({"low_update": torch.zeros(9, 15)}, ValueError, r"low_update must be \[9, 30\].*got \[9, 15\]"),
    ({"low_update": torch.zeros(9, 30).long()}, TypeError, "low_update must be floating point, got torch.int64"),
    ({"gate_scale": torch.ones(5, 21)}, TypeError, "scales.up must be a tensor, got NoneType"),
    ({"up_scale": torch.ones(5, 21)}, TypeError, "scales.gate must be a tensor, got NoneType"),
    (
        {"gate_scale": torch.ones(5), "up_scale": torch.ones(5, 21)},
        ValueError,
        r"scales.gate must be \[5, 21\].*got \[5\]",
    ),
    (
        {"gate_scale": torch.ones(5, 21), "up_scale": torch.ones(21, 5)},
        ValueError,
        r"scales.up must be \[5, 21\].*got \[21, 5\]",
    ),
    ({"gate_bias": torch.ones(21)}, TypeError, "biases.up must be a tensor, got NoneType"),
    (
        {"gate_bias": torch.ones(21), "up_bias": torch.ones(5, 21)},
        ValueError,
        r"biases.up must be \[21\], as many as pre_activations.gate has columns, got \[5, 21\]",
    ),
    (
        {"gate_bias": torch.ones(21, requires_grad=True), "up_bias": torch.ones(21)},
        ValueError,
        "biases.gate is a constant of this operator and gets no gradient; pass it detached",
    ),
    (
        {"gate_bias": torch.ones(21, device="meta"), "up_bias": torch.ones(21)},
        ValueError,
        "biases.gate is on meta, pre_activations.gate on cpu",
    ),
    ({"gate_B": torch.zeros(5, 3, 21)}, ValueError, r"B.gate must be \[5, 21, 3\].*got \[5, 3, 21\]"),
    ({"up_B": torch.zeros(4, 21, 3)}, ValueError, r"B.up must be \[5, 21, 3\].*got \[4, 21, 3\]"),
    ({"down_A": torch.zeros(5, 3, 20)}, ValueError, r"down_A must be \[5, 3, 21\].*got \[5, 3, 20\]"),
    ({"routing_weights": torch.zeros(9, 3)}, ValueError, r"routing_weights must be \[9, 2\].*got \[9, 3\]"),
    ({"expert_ids": torch.zeros(8, 2).long()}, ValueError, r"expert_ids must be \[9, 2\].*got \[8, 2\]"),
    ({"state": torch.zeros(8, 6)}, ValueError, r"update.state must be \[9, 6\].*got \[8, 6\]"),
    ({"state": torch.zeros(6)}, ValueError, r"update.state must be \[9, 6\].*got \[6\]"),
    ({"fold_gate": torch.zeros(21, 5)}, ValueError, r"update.gate must be \[21, 6\].*got \[21, 5\]"),
    ({"fold_up": torch.zeros(6, 21)}, ValueError, r"update.up must be \[21, 6\].*got \[6, 21\]"),
    (
        {"up": torch.zeros(9, 21, device="meta")},
        ValueError,
        "pre_activations.up is on meta, pre_activations.gate on cpu; put them on one device",
    ),
    (
        {"expert_ids": torch.zeros(9, 2).long().to("meta")},
        ValueError,
        "expert_ids is on meta, pre_activations.gate on cpu",
    ),
    ({"expert_ids": torch.zeros(9, 2)}, TypeError, "expert_ids must be integers .*, got torch.float32"),
    ({"gate_B": torch.zeros(5, 21, 3).long()}, TypeError, "B.gate must be floating point, got torch.int64"),
    (
        {"expert_ids": torch.zeros(9, 6).long(), "routing_weights": torch.zeros(9, 6)},
        ValueError,
        r"1\.\.5 experts.*got k=6",
    ),
    ({"fold_gate": None}, TypeError, "update.gate must be a tensor, got NoneType"),
    ({"state": None}, TypeError, "update.state must be a tensor, got NoneType"),
    ({"activation": "swoosh"}, ValueError, "unknown activation 'swoosh'; known are"),
    ({"dropout": 0.1}, TypeError, "dropout.seed must be a tensor, got NoneType"),
    (
        {"dropout": 0.1, "seed": torch.tensor([7], dtype=torch.int32)},
        ValueError,
        r"dropout.seed must be one int64.*torch.int32 \[1\]",
    ),
    ({"dropout": 0.1, "seed": torch.tensor([7, 8])}, ValueError, r"dropout.seed must be one int64.*torch.int64 \[2\]"),
    ({"dropout": 0.1, "seed": 42}, TypeError, "dropout.seed must be a tensor, got int"),
    (
        {"dropout": 0.1, "seed": torch.zeros(1, device="meta").long()},
        ValueError,
        "dropout.seed is on meta, pre_activations.gate on cpu",
    ),
    (
        {"token_order": torch.zeros(9).long()},
        ValueError,
        r"token_order must be int32 \[9\] and contiguous.*torch.int64 \[9\]",
    ),
    ({"token_order": torch.zeros(10).int()}, ValueError, r"token_order must be int32 \[9\].*torch.int32 \[10\]"),
    ({"token_order": torch.zeros(18).int()[::2]}, ValueError, r"token_order must be int32 \[9\] and contiguous"),
    (
        {"token_order": torch.zeros(9, device="meta").int()},
        ValueError,
        "token_order is on meta, pre_activations.gate on cpu",
    ),
    ({"expert_ids": torch.zeros(9, 2).bool()}, TypeError, "expert_ids must be integers .*, got torch.bool"),
    (
        {"gate": [[0.0] * 21] * 9},
        TypeError,
        "pre_activations.gate must be a tensor, got list; torch.as_tensor makes one",
    ),
    ({"low": None}, TypeError, "low must be a tensor, got NoneType"),
    (
        {"up": torch.zeros(9, 21).to_sparse()},
        TypeError,
        r"pre_activations.up must be a dense tensor, got layout torch.sparse_coo; pass",
    ),
    (
        {"up_B": torch.zeros(5, 21, 3).to(torch.float8_e4m3fn)},
        TypeError,
        "B.up must be floating .*float8_e4m3fn; float64",
    ),
    (
        {"expert_ids": torch.zeros(9, 2, dtype=torch.complex64)},
        TypeError,
        "expert_ids must be integers .*, got torch.complex64",
    ),
    ({"state": torch.tensor(1.0)}, ValueError, r"update.state must be \[9, 0\].*got \[\]"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ({"scale": "1.5"}, TypeError, "scale must be a number, got '1.5'"),
    ({"dropout": "0.1"}, TypeError, "dropout.rate must be a number, got '0.1'"),
    ({"activation": ["silu"]}, ValueError, r"unknown activation \['silu'\]; known are"),
    ({"token_order": [0] * 9}, TypeError, "token_order must be a tensor, got list"),
    ({"dropout": 1.0}, ValueError, r"dropout.rate must lie in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout.rate must lie in \[0, 1\), got -0.1"),
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
        run(**(given | change))


PAIR = GateUp(torch.zeros(9, 21), torch.zeros(9, 21))
UPDATE = LowRankUpdate(torch.zeros(9, 6), torch.zeros(21, 6), torch.zeros(21, 6))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pre_activations": tuple(PAIR)}, "pre_activations must be a GateUp, got tuple"),
        ({"B": torch.zeros(5, 21, 3)}, "B must be a GateUp, got Tensor"),
        ({"update": PAIR}, "update must be a LowRankUpdate, got GateUp"),
        ({"scales": UPDATE}, "scales must be a GateUp, got LowRankUpdate"),
        ({"biases": torch.zeros(21)}, "biases must be a GateUp, got Tensor"),
        ({"dropout": 0.1}, "dropout must be a Dropout, got float"),
    ],
)
def test_operands_of_another_type_are_refused(change, message):
    """What belongs together comes together, under its own names."""
    with pytest.raises(TypeError, match=message):
        expert_swiglu(packed(cast(operands(inner=6), torch.float32))._replace(**change))


def test_what_is_no_operands_is_refused():
    """A dict of the same tensors, as the operator's flat form might suggest."""
    with pytest.raises(TypeError, match="operands must be an ExpertOperands, got dict"):
        expert_swiglu(operands())


SWIGLU_REFUSALS = [
    (tuple(PAIR), None, TypeError, "pre_activations must be a GateUp, got tuple"),
    (PAIR, tuple(UPDATE), TypeError, "update must be a LowRankUpdate, got tuple"),
    (PAIR._replace(gate=torch.zeros(21)), None, ValueError, r"expected pre_activations.gate \[tokens, F\]; got \[21\]"),
    (PAIR._replace(up=torch.zeros(9, 20)), None, ValueError, r"pre_activations.up must be \[9, 21\].*got \[9, 20\]"),
    (PAIR._replace(up=torch.zeros(9, 21).int()), None, TypeError, "pre_activations.up must be floating point"),
    (
        PAIR._replace(up=PAIR.up.to("meta")),
        None,
        ValueError,
        "pre_activations.up is on meta, pre_activations.gate on cpu",
    ),
    (GateUp(*(x[:, :0] for x in PAIR)), None, ValueError, r"with F of at least 1, got \[9, 0\]"),
    (PAIR, UPDATE._replace(state=torch.zeros(8, 6)), ValueError, r"update.state must be \[9, 6\].*got \[8, 6\]"),
    (PAIR, UPDATE._replace(gate=torch.zeros(21, 5)), ValueError, r"update.gate must be \[21, 6\].*got \[21, 5\]"),
    (PAIR, UPDATE._replace(up=None), TypeError, "update.up must be a tensor, got NoneType"),
]


@pytest.mark.parametrize("pre_activations, update, error, message", SWIGLU_REFUSALS)
def test_swiglu_refuses(pre_activations, update, error, message):
    """As `expert_swiglu` does, by the names of its own arguments."""
    with pytest.raises(error, match=message):
        swiglu(pre_activations, update)


@pytest.mark.parametrize(
    "setting, message",
    [({"activation": "swoosh"}, "unknown activation 'swoosh'"), ({"backend": "cuda"}, "unknown backend 'cuda'")],
)
def test_swiglu_refuses_unknown_settings(setting, message):
    """Names are looked up before anything runs."""
    with pytest.raises(ValueError, match=message):
        swiglu(PAIR, **setting)


TRITON_ON_CPU = """
import torch
from graphmoe_kernels import ExpertOperands, GateUp, expert_swiglu

gate, low, B = torch.zeros(2, 16), torch.zeros(2, 8), torch.zeros(2, 16, 2)
ones, ids = torch.ones(2, 1), torch.zeros(2, 1).long()
try:
    expert_swiglu(ExpertOperands(GateUp(gate, gate), low, GateUp(B, B), B.mT, ones, ids), backend="triton")
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
    assert "pre_activations.gate is on cpu, and backend='triton' runs on CUDA devices" in run.stdout, (
        run.stdout + run.stderr
    )
    assert "use backend='torch'" in run.stdout


def test_an_intermediate_size_of_0_is_refused():
    """It used to divide by zero where the tokens are cut into blocks."""
    given = operands() | {name: t[..., :0] for name, t in operands().items() if name in ("gate", "up", "down_A")}
    given |= {name: given[name][:, :0] for name in ("gate_B", "up_B")}
    with pytest.raises(
        ValueError, match=r"pre_activations.gate must be \[tokens, F\] with F of at least 1, got \[9, 0\]"
    ):
        run(**given)


BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
IDS = pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])


@BACKENDS
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_id_out_of_range_is_refused(top_k, wrong, backend, form):
    """It would read another expert's weights, or make a count of its size: 8 TB for 2^40."""
    given = operands(top_k=top_k)
    given["expert_ids"][3, -1] = wrong
    with pytest.raises(ValueError, match=rf"expert_ids must be in 0\.\.4 \(there are 5\), got .*{wrong}"):
        run(**given, backend=backend)


@BACKENDS
def test_an_expert_twice_in_a_row_is_refused(backend, form):
    """One of the two would be lost in z and counted in c."""
    given = operands()
    given["expert_ids"][8] = 3
    with pytest.raises(ValueError, match="expert_ids must be distinct within a row"):
        run(**given, backend=backend)


@BACKENDS
@IDS
def test_ids_of_every_integer_dtype(backend, dtype, form):
    """A narrow dtype must not wrap in the arithmetic on ids, nor bytes index as a mask; dropout reads ids too."""
    given = operands(inner=6)
    settings = {"dropout": 0.5, "seed": torch.tensor([3]), "backend": backend}
    exact = results(given, **settings)
    found = results(given | {"expert_ids": given["expert_ids"].to(dtype)}, **settings)
    for name, tensor in exact.items():
        assert torch.equal(found[name], tensor), name

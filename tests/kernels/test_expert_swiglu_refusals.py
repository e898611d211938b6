"""What `expert_swiglu` and `swiglu` refuse, by the argument's name: tensors, types, settings, backends."""

import os
import subprocess
import sys

import pytest
import torch

from graphmoe_kernels import GateUp, LowRankUpdate, expert_swiglu, swiglu
from tests.kernels.expert_operands import cast, operands, packed, run
from tests.kernels.triton_marks import DEVICE

REFUSALS = [
    ({"gate": torch.zeros(9)}, ValueError, r"expected pre_activations.gate \[tokens, F\].*got \[9\]"),
    ({"expert_ids": torch.zeros(9).long()}, ValueError, r"expert_ids \[tokens, k\].*\[9\]"),
    ({"down_A": torch.zeros(3, 21)}, ValueError, r"down_A \[experts, rank, F\].*\[3, 21\]"),
    ({"up": torch.zeros(9, 20)}, ValueError, r"pre_activations.up must be \[9, 21\] .*got \[9, 20\]"),
    (
        {"low": torch.zeros(9, 15)},
        ValueError,
        r"low must be \[9, 30\] for 9 tokens, F=21, 5 experts of rank 3 \(by B and down_A\) and k=2; got \[9, 15\]",
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
        r"biases.up must be \[21\] for 9 tokens, F=21, .*; got \[5, 21\]",
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
    # One tensor that is wrong is the one that is named, also where others could be measured by it.
    ({"down_A": torch.zeros(5, 21, 3)}, ValueError, r"^down_A must be \[5, 3, 21\].*got \[5, 21, 3\]"),
    ({"down_A": torch.zeros(4, 3, 21)}, ValueError, r"^down_A must be \[5, 3, 21\].*got \[4, 3, 21\]"),
    ({"gate_B": torch.zeros(5, 21, 4)}, ValueError, r"^B.gate must be \[5, 21, 3\].*got \[5, 21, 4\]"),
    ({"gate": torch.zeros(9, 20)}, ValueError, r"^pre_activations.gate must be \[9, 21\].*got \[9, 20\]"),
    ({"gate": torch.zeros(8, 21)}, ValueError, r"^pre_activations.gate must be \[9, 21\].*got \[8, 21\]"),
    ({"state": torch.zeros(9, 7)}, ValueError, r"^update.state must be \[9, 6\].*got \[9, 7\]"),
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
    ({"state": torch.tensor(1.0)}, ValueError, r"update.state must be \[9, 6\].*got \[\]"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ({"scale": "1.5"}, TypeError, "scale must be a number, got '1.5'"),
    ({"dropout": "0.1"}, TypeError, "dropout.rate must be a number, got '0.1'"),
    ({"activation": ["silu"]}, ValueError, r"unknown activation \['silu'\]; known are"),
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
        ({"pre_activations": tuple(PAIR)}, "pre_activations must be GateUp, got tuple"),
        ({"B": torch.zeros(5, 21, 3)}, "B must be GateUp, got Tensor"),
        ({"update": PAIR}, "update must be LowRankUpdate or None, got GateUp"),
        ({"scales": UPDATE}, "scales must be GateUp or None, got LowRankUpdate"),
        ({"biases": torch.zeros(21)}, "biases must be GateUp or None, got Tensor"),
        ({"dropout": 0.1}, "dropout must be Dropout or None, got float"),
    ],
)
def test_operands_of_another_type_are_refused(change, message):
    """What belongs together comes together, under its own names."""
    with pytest.raises(TypeError, match=message):
        expert_swiglu(packed(cast(operands(inner=6), torch.float32))._replace(**change), scale=1.0)


def test_what_is_no_operands_is_refused():
    """A dict of the same tensors, as the operator's flat form might suggest."""
    with pytest.raises(TypeError, match="operands must be ExpertOperands, got dict"):
        expert_swiglu(operands(), scale=1.0)


def test_a_forgotten_scale_is_refused():
    """It was 1 by default, which is another adapter's result, without a word."""
    with pytest.raises(TypeError, match="scale"):
        expert_swiglu(packed(operands()))


SWIGLU_REFUSALS = [
    (tuple(PAIR), None, TypeError, "pre_activations must be GateUp, got tuple"),
    (PAIR, tuple(UPDATE), TypeError, "update must be LowRankUpdate or None, got tuple"),
    (PAIR._replace(gate=torch.zeros(21)), None, ValueError, r"expected pre_activations.gate \[tokens, F\]; got \[21\]"),
    (PAIR._replace(up=torch.zeros(9, 20)), None, ValueError, r"pre_activations.up must be \[9, 21\].*got \[9, 20\]"),
    (PAIR._replace(gate=torch.zeros(9, 20)), UPDATE, ValueError, r"pre_activations.gate must be \[9, 21\].*\[9, 20\]"),
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
    operands = ExpertOperands(GateUp(gate, gate), low, GateUp(B, B), B.mT, ones, ids)
    expert_swiglu(operands, scale=1.0, backend="triton")
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


def on_device(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.to(DEVICE) for name, t in given.items()}


@pytest.mark.kernels
def test_unsupported_sizes_and_dtypes_are_refused():
    """Too many slots for a program's registers, and fp64, are errors that name what would work."""
    with pytest.raises(
        ValueError, match=r"k=20 experts per token of rank 3 .*need 512 columns.*up to 256.*lower top_k"
    ):
        run(**on_device(cast(operands(experts=20, top_k=20), torch.float32)), backend="triton")
    with pytest.raises(
        ValueError, match=r"pre_activations.gate is torch.float64: the Triton kernels take float32.*backend='torch'"
    ):
        run(**on_device(operands()), backend="triton")

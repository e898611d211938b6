"""`swiglu`, the round without experts: both backends against the definition, forward and backward, and its contract."""

from __future__ import annotations

import pytest
import torch

from graphmoe_kernels import ACTIVATIONS, ExpertOperands, GateUp, LowRankUpdate, expert_swiglu, get_activation, swiglu
from graphmoe_kernels.experts import pytorch_blocks
from graphmoe_kernels.testing import relative_error, within_budget
from tests.kernels.triton_marks import MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("gate", "up", "state", "fold_gate", "fold_up")
Given = dict[str, torch.Tensor]


def operands(tokens: int = 9, width: int = 21, inner: int | None = 6) -> Given:
    """Random fp64 operands; ``inner`` is the update's rank, None without one."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    found = {"gate": draw(tokens, width), "up": draw(tokens, width)}
    if inner is not None:
        found |= {"state": draw(tokens, inner)}
        found |= {name: draw(width, inner) * inner**-0.5 for name in ("fold_gate", "fold_up")}
    return found


def run(given: Given, backend: str, activation: str = "silu") -> torch.Tensor:
    update = LowRankUpdate(*(given[name] for name in NAMES[2:])) if "state" in given else None
    return swiglu(GateUp(given["gate"], given["up"]), update, activation=activation, backend=backend)


def results(given: Given, backend: str, activation: str = "silu") -> Given:
    """hidden and the gradient of every operand under a fixed random upstream gradient, by name."""
    leaves = {name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, t in given.items()}
    hidden = run(leaves, backend, activation)
    generator = torch.Generator().manual_seed(1)
    hidden.backward(torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden))
    return {"hidden": hidden.detach(), **{name: t.grad for name, t in leaves.items()}}


def to(given: Given, *where: torch.dtype | str) -> Given:
    return {name: t.to(*where) for name, t in given.items()}


def assert_within_budget(given: Given, dtype: torch.dtype, backend: str, activation: str = "silu") -> None:
    """hidden and every gradient against the fp64 oracle, beside the reference in ``dtype``."""
    given = to(to(given, dtype), torch.float64)
    exact, own = (results(to(given, d), "reference", activation) for d in (torch.float64, dtype))
    device = DEVICE if backend == "triton" else "cpu"
    found = results(to(to(given, dtype), device), backend, activation)
    for name in exact:
        error, theirs = relative_error(found[name].cpu(), exact[name]), relative_error(own[name], exact[name])
        assert within_budget(error, theirs, dtype), f"{name}: {error:.2e}, reference {theirs:.2e}"


CASES = {
    "no update": {"inner": None},
    "an update": {"inner": 20, "width": 40},
    "two splits of F": {"tokens": 70, "width": 200, "inner": 20},
    "one token": {"tokens": 1},
    "F = 1": {"width": 1},
    "no tokens": {"tokens": 0},
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_definition_and_reference(case):
    """Values against the definition, every gradient against autograd through the reference, in fp64."""
    given = operands(**case)
    update = [given["state"] @ given[name].T if "state" in given else 0 for name in ("fold_gate", "fold_up")]
    act = get_activation("silu").function
    oracle, found = results(given, "reference"), results(given, "torch")
    assert relative_error(oracle["hidden"], act(given["gate"] + update[0]) * (given["up"] + update[1])) <= 1e-14
    for name, exact in oracle.items():
        assert found[name].shape == exact.shape
        assert relative_error(found[name], exact) <= 1e-13, name


@pytest.mark.oracle
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_one_expert_whose_low_rank_terms_are_zero(backend):
    """What it is beside `expert_swiglu`: the same hidden, of one expert with weight 1."""
    given = operands()
    low, B = torch.zeros(9, 4).double(), torch.zeros(1, 21, 2).double()
    ones, ids = torch.ones(9, 1).double(), torch.zeros(9, 1).long()
    update = LowRankUpdate(*(given[name] for name in NAMES[2:]))
    experts = ExpertOperands(GateUp(given["gate"], given["up"]), low, GateUp(B, B), B.mT, ones, ids, update=update)
    hidden, _ = expert_swiglu(experts, scale=1.0, backend=backend)
    assert relative_error(run(given, backend), hidden) <= 1e-14


@pytest.mark.oracle
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradcheck(activation):
    """The hand-written backward of every operand against finite differences."""
    given = operands(tokens=3, width=4, inner=2)

    def by_tensors(*tensors):
        return run(dict(zip(given, tensors, strict=True)), "torch", activation)

    assert torch.autograd.gradcheck(by_tensors, [t.requires_grad_() for t in given.values()])


@pytest.mark.oracle
@pytest.mark.parametrize("tokens", [16, 40])
def test_blocks_do_not_matter(tokens, monkeypatch):
    """Cutting a batch into blocks changes neither results nor gradients."""
    given = operands(tokens)
    whole = results(given, "torch")
    monkeypatch.setattr(pytorch_blocks, "BLOCK_BYTES", 1)
    cut = results(given, "torch")
    for name, exact in whole.items():
        assert relative_error(cut[name], exact) <= 1e-13, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [None, 16], ids=["no update", "an update"])
def test_error_of_the_pytorch_path_is_within_budget(inner, dtype):
    """Against fp64 on the same rounded operands, forward and every gradient."""
    assert_within_budget(operands(48, width=96, inner=inner), dtype, "torch")


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=MARKS) for d in DTYPES])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_is_within_budget(case, dtype):
    """Token counts and widths that fill no tile, one and several, with an update and without."""
    assert_within_budget(operands(**case), dtype, "triton")


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=MARKS)])
def test_frozen_operands_get_no_gradient(backend):
    """One gradient alone is that of all together, and lands in its own place."""
    given = to(to(operands(), torch.float32), DEVICE)
    every = results(given, backend)
    for wanted in given:
        leaf = given[wanted].clone().requires_grad_()
        hidden = run(given | {wanted: leaf}, backend)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden)
        (found,) = torch.autograd.grad(hidden, leaf, upstream)
        assert torch.equal(found, every[wanted]), wanted


LAYOUTS = {
    "fused gate and up": lambda t: dict(
        zip(("gate", "up"), torch.cat([t["gate"], t["up"]], 1).chunk(2, 1), strict=True)
    ),
    "gate transposed": lambda t: {"gate": t["gate"].T.contiguous().T},
    "state strided": lambda t: {"state": t["state"].repeat(1, 2)[:, :6]},
    "fold transposed": lambda t: {"fold_up": t["fold_up"].T.contiguous().T},
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=MARKS)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(layout, backend):
    """Views that models produce give what contiguous operands give."""
    given = to(to(operands(), torch.float32), DEVICE)
    plain, found = results(given, backend), results(given | layout(given), backend)
    for name, exact in plain.items():
        assert relative_error(found[name], exact) <= (0 if backend == "triton" else 1e-6), name


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=MARKS)])
@pytest.mark.parametrize("inner", [None, 6], ids=["no update", "an update"])
def test_operator_is_registered_as_torch_expects(inner, backend):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = to(to(operands(inner=inner), torch.float32), DEVICE)
    flat = [given[name].requires_grad_() if name in given else None for name in NAMES]
    torch.library.opcheck(torch.ops.graphmoe.swiglu.default, (*flat, "silu", backend))
    plain = [None if t is None else t.detach() for t in flat]
    needed = [t is not None for t in flat]
    upstream = torch.randn(9, 21, device=DEVICE)
    torch.library.opcheck(torch.ops.graphmoe.swiglu_backward.default, (upstream, *plain, "silu", backend, needed))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_nothing_is_written_into_operands(activation):
    """An activation may return what it was given."""
    given = to(operands(inner=None), torch.float32)
    before = {name: t.clone() for name, t in given.items()}
    run(given, "torch", activation)
    for name, t in given.items():
        assert torch.equal(t, before[name]), name


def test_autocast_changes_nothing():
    """fp32 is computed in fp32 inside autocast too, also in backward; parameters of another dtype are cast."""
    given = to(operands(), torch.float32)
    plain = results(given, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        found = results(given, "torch")
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name
    mixed = to(given, torch.bfloat16) | {"fold_gate": given["fold_gate"]}
    found = results(mixed, "torch")
    assert found["hidden"].dtype == torch.bfloat16
    assert found["fold_gate"].dtype == torch.float32

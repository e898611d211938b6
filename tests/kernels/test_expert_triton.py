"""The Triton backend of `expert_swiglu`: values, every gradient, every dtype and configuration, and its contract."""

from __future__ import annotations

import contextlib

import pytest
import torch

from graphmoe_kernels import ACTIVATIONS, launching
from graphmoe_kernels.experts.op import flatten
from graphmoe_kernels.testing import relative_error, within_budget
from tests import interpreter
from tests.kernels.expert_operands import (
    FLOATING,
    LATER_ROUND,
    SCALES,
    cast,
    operands,
    packed,
    results,
    run,
    weights_gradient,
)
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = 8
DIFFERENTIABLE = [*FLOATING, *LATER_ROUND, *SCALES]


def placed(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.to(DEVICE) for name, t in given.items()}


def assert_within_budget(given: dict[str, torch.Tensor], dtype: torch.dtype, **settings) -> None:
    """c, z and every gradient against the fp64 oracle, beside the reference in ``dtype``.

    One token's gradient of its routing weights is a number or two, sums over F that cancel: in one order of F the
    reference may be right to the last bit by luck. Its error is then the largest in some orders of F.
    """
    given = cast(cast(given, dtype), torch.float64)
    exact = results(given, "reference", **settings)
    literal = results(cast(given, dtype), "reference", **settings)
    here = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
    found = results(placed(cast(given, dtype)), "triton", **here)
    assert found.keys() == exact.keys()
    own = {name: relative_error(literal[name], exact[name]) for name in exact}
    for _ in range(ORDERS if len(given["gate"]) == 1 else 0):
        again = weights_gradient(cast(given, dtype), torch.randperm(given["gate"].shape[1]), **settings)
        own["routing_weights"] = max(own["routing_weights"], relative_error(again, exact["routing_weights"]))
    for name in exact:
        error = relative_error(found[name], exact[name])
        assert within_budget(error, own[name], dtype), f"{name}: {error:.2e}, reference {own[name]:.2e}"


CASES = {
    "first round": {},
    "later round": {"inner": 20, "width": 40},
    "wide, two splits of F": {"tokens": 70, "width": 200, "inner": 6},
    "one token": {"tokens": 1, "inner": 6},
    "one token, blocks of F and of G": {"tokens": 1, "inner": 40, "width": 200, "top_k": 3, "rank": 5},
    "two tokens, scale vectors and biases": {"tokens": 2, "inner": 40, "scales": True, "biases": True, "width": 70},
    "one token, rank 40": {"tokens": 1, "experts": 1, "top_k": 1, "rank": 40, "width": 40, "inner": 6},
    "k = 1": {"top_k": 1},
    "n = 1, rank 1": {"experts": 1, "top_k": 1, "rank": 1},
    "k = n": {"top_k": 5, "tokens": 5},
    "prime n, k = 3, rank 5": {"experts": 7, "top_k": 3, "rank": 5, "inner": 6},
    "scale vectors": {"scales": True, "inner": 6},
    "scale vectors and biases": {"scales": True, "biases": True},
    "biases": {"biases": True, "inner": 6},
    "n = 64": {"tokens": 20, "experts": 64, "rank": 2, "width": 40},
    "rank 40, LoRA": {"experts": 1, "top_k": 1, "rank": 40, "width": 40},
    "rank 0": {"experts": 2, "rank": 0, "inner": 20, "width": 40},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_within_budget(case, dtype):
    """Token counts, widths and ranks that fill no tile, one and several; every routing that there is."""
    assert_within_budget(operands(**case), dtype)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation):
    """Values and derivatives are those of the PyTorch functions of the same name."""
    assert_within_budget(operands(tokens=5, width=16, experts=2, rank=2), torch.float32, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_draws_the_mask_of_the_other_backends(dtype):
    """Forward, and backward from the same seed: three slots, so that both halves of a random word are used."""
    given = operands(tokens=20, width=70, top_k=3, inner=6)
    assert_within_budget(given, dtype, dropout=0.4, seed=torch.tensor([2**40 + 7]))


@pytest.mark.parametrize("chosen", [[0, 1], [4, 2]])
def test_experts_that_nobody_chose_get_zero_gradients(chosen):
    """All tokens to two experts: the others' gradients are there, and exactly zero."""
    given = operands()
    given["expert_ids"] = torch.tensor(chosen).expand(9, 2)
    assert_within_budget(given, torch.float32)
    found = results(placed(cast(given, torch.float32)), "triton")
    for name in ("gate_B", "up_B", "down_A"):
        untouched = [e for e in range(5) if e not in chosen]
        assert not found[name][untouched].any()


def test_no_tokens():
    """Nothing in, nothing out, and gradients of the parameters' shapes that are zero."""
    given = placed(cast(operands(tokens=0, inner=6), torch.float32))
    found = results(given, "triton")
    assert found["hidden"].shape == (0, 21)
    assert found["low_down"].shape == (0, 15)
    for name in [*FLOATING, *LATER_ROUND]:
        assert found[name].shape == given[name].shape
        assert not found[name].any()


def configurations() -> list[tuple[str, str]]:
    """Device classes and size classes; on an NVIDIA GPU those of NVIDIA, as other tiles need not fit its memory."""
    classes = [c for c in launching.DEVICE_CLASSES if c.startswith("sm_") or not torch.cuda.is_available()]
    return [(device, size) for device in classes for size in launching.SIZE_CLASSES]


@pytest.mark.parametrize("device, size", configurations())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_configuration(device, size, dtype, monkeypatch):
    """What another device would run is right too; the wide ranks' configurations included."""
    monkeypatch.setattr(launching, "device_class", lambda _: device)
    tokens = 3 if size == "skinny" else 66
    if size == "skinny":  # one token's forward is a kernel of its own, its backward that of many
        assert_within_budget(operands(1, width=80, experts=3, rank=4, inner=20), dtype)
        assert_within_budget(operands(1, width=80, experts=1, top_k=1, rank=68), dtype)
    assert_within_budget(operands(tokens, width=80, experts=3, rank=4, inner=20), dtype)
    if size == "wide":  # three experts' tokens ran with their pairs together, these slot by slot
        assert_within_budget(operands(tokens, width=80, experts=4, rank=4, inner=20), dtype)
    assert_within_budget(operands(tokens, width=80, experts=1, top_k=1, rank=68), dtype)


LAYOUTS = {
    "fused gate and up": lambda t: dict(
        zip(("gate", "up"), torch.cat([t["gate"], t["up"]], 1).chunk(2, 1), strict=True)
    ),
    "low in a wider tensor": lambda t: {"low": t["low"].repeat(1, 2)[:, : t["low"].shape[1]]},
    "state strided": lambda t: {"state": t["state"].repeat(1, 2)[:, :6]},
    "weights transposed": lambda t: {"routing_weights": t["routing_weights"].T.contiguous().T},
    "B transposed": lambda t: {"gate_B": t["gate_B"].mT.contiguous().mT},
    "int32 ids": lambda t: {"expert_ids": t["expert_ids"].int()},
    "uint8 ids": lambda t: {"expert_ids": t["expert_ids"].to(torch.uint8)},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tokens", [9, 1])
def test_layout_does_not_matter(tokens, layout):
    """Views and id dtypes that models produce give what contiguous int64 operands give, bit for bit."""
    given = placed(cast(operands(tokens, inner=6), torch.float32))
    plain, found = results(given, "triton"), results(given | layout(given), "triton")
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


def test_padded_slots_are_no_experts():
    """Ids of one byte with 256 experts, three slots in four: what is no slot is not expert 0."""
    given = placed(cast(operands(tokens=4, experts=256, rank=1, top_k=3, width=16), torch.float32))
    found, narrow = (
        results(given, "triton"),
        results(given | {"expert_ids": given["expert_ids"].to(torch.uint8)}, "triton"),
    )
    for name, exact in found.items():
        assert torch.equal(narrow[name], exact), name


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order of programs")
@pytest.mark.parametrize("order", ["reverse", 3])
@pytest.mark.parametrize("tokens", [9, 2])
def test_results_do_not_depend_on_which_program_comes_last(tokens, order):
    """The last of a tile's programs sums the splits: whoever it is, in the same order."""
    given = cast(operands(tokens=tokens, width=200, inner=6), torch.float32)
    plain = results(given, "triton")
    with interpreter.grid_order(order):
        found = results(given, "triton")
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("wrong", [5, -1, "twice"])
@pytest.mark.parametrize("tokens", [9, 2])
def test_an_id_that_is_no_expert_makes_its_token_nan(tokens, wrong):
    """No memory of others is read, nothing is clipped, and no other token moves."""
    given = placed(cast(operands(tokens), torch.float32))
    bad = tokens // 3
    with torch.no_grad():
        clean = run(**given, backend="triton")
        given["expert_ids"][bad, 1] = given["expert_ids"][bad, 0] if wrong == "twice" else wrong
        found = run(**given, backend="triton")
    others = [i for i in range(tokens) if i != bad]
    assert found[0][bad].isnan().all()
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_token_spoils_its_own_experts_alone(bad):
    """A NaN in one token's row is in its own outputs and its own experts' gradients, and nowhere else."""
    given = placed(cast(operands(experts=5), torch.float32))
    given["expert_ids"][:] = torch.tensor([0, 1])
    given["expert_ids"][4] = torch.tensor([2, 3])
    given["gate"][4] = bad
    found = results(given, "triton")
    assert not found["hidden"][4].isfinite().any()
    assert found["hidden"][[i for i in range(9) if i != 4]].isfinite().all()
    for name in ("gate_B", "up_B", "down_A"):
        assert found[name][[0, 1]].isfinite().all(), name


def test_autocast_and_fp32_parameters():
    """fp32 adapters on bf16 activations get fp32 gradients, inside autocast as outside."""
    given = operands(inner=6)
    parameters = ("gate_B", "up_B", "down_A", "fold_gate", "fold_up")
    mixed = placed({n: t.float() if n in parameters else t for n, t in cast(given, torch.bfloat16).items()})
    plain = results(mixed, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(mixed, "triton")
    assert found["gate_B"].dtype == torch.float32
    assert found["hidden"].dtype == torch.bfloat16
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


def test_frozen_inputs_get_no_gradient_and_cost_none():
    """With frozen experts the second backward kernel does not run; the rest is what it was."""
    given = placed(cast(operands(inner=6), torch.float32))
    plain = results(given, "triton")
    leaves = {name: given[name].requires_grad_() for name in ("gate", "routing_weights", "low")}
    c, z = run(**(given | leaves), scale=1.5, backend="triton")
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (c, z)]
    with launching.recorded() as launches:
        torch.autograd.backward([c, z], upstream)
    names = [each.name for each in launches]
    assert "experts_stream_backward_tokens" in names
    assert "experts_stream_backward_weights" not in names
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, plain[name]), name
    assert given["gate_B"].grad is None


@pytest.mark.parametrize("later", [False, True])
def test_operator_is_registered_as_torch_expects(later):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = placed(cast(operands(inner=6 if later else None, scales=later, biases=later), torch.float32))
    given = {name: t.requires_grad_() if name in DIFFERENTIABLE else t for name, t in given.items()}
    dropout = {"dropout": 0.3, "seed": torch.tensor([3], device=DEVICE)} if later else {}
    flat = flatten(packed(given | dropout))
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu.default, (*flat, 1.5, "silu", "triton"))
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in flat]
    grads = torch.randn(9, 21, device=DEVICE), torch.randn(9, 15, device=DEVICE)
    needed = [t is not None for t in packed(given).floating()]
    arguments = (*grads, *plain, 1.5, "silu", "triton", needed)
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    """Forward and backward in a full graph; one graph serves all token counts when they are dynamic."""
    torch._dynamo.reset()
    given = placed(cast(operands(tokens=6, inner=6), torch.float32))
    sized = ("gate", "up", "low", "low_update", "routing_weights", "state", "expert_ids")

    def by_name(**tensors):
        return run(**tensors, scale=1.5, backend="triton")

    compiled = torch.compile(by_name, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 4):
        part = {name: t[:tokens] if name in sized else t for name, t in given.items()}
        outcomes = []
        for call in (by_name, compiled):
            leaves = {n: t.detach().clone().requires_grad_() for n, t in part.items() if t.is_floating_point()}
            c, z = call(**(part | leaves))
            (c.sum() + z.square().sum()).backward()
            outcomes.append([c.detach(), z.detach(), *(leaf.grad for leaf in leaves.values())])
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)


REFUSALS = [
    ({"activation": "mine"}, "activation 'mine' has no Triton form .*silu.*use backend='torch'"),
]


@pytest.mark.parametrize("change, message", REFUSALS)
def test_refusals_name_argument_and_expectation(change, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    from graphmoe_kernels import register_activation

    with contextlib.suppress(ValueError):
        register_activation("mine", torch.sin, torch.cos)
    given = placed(cast(operands(), torch.float32))
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    try:
        with pytest.raises(ValueError, match=message):
            run(**given, **change, backend="triton")
    finally:
        ACTIVATIONS.pop("mine", None)

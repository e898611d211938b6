"""The backward of `expert_swiglu` as a stream, and forward with it: gradients, layouts, order, ids that are none."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from graphmoe_kernels import expert_swiglu
from graphmoe_kernels.backend import standing_for
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp
from graphmoe_kernels.experts.triton import stream_plan
from graphmoe_kernels.experts.triton.sizes import Sizes
from graphmoe_kernels.launching import recorded
from graphmoe_kernels.testing import relative_error, within_budget
from tests import interpreter
from tests.kernels.expert_operands import cast, operands, packed, results
from tests.kernels.expert_operands import run as run_experts
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Given = dict[str, torch.Tensor]
PLACING = ["experts_count_tuples", "experts_place_rows"]
BACKWARD = ["experts_stream_backward_tokens", "experts_stream_backward_weights"]
STEPS = [*PLACING, "experts_stream", "experts_stream_sum", *PLACING, *BACKWARD, "experts_stream_sum_tokens"]


def assert_within_budget(given: Given, dtype: torch.dtype, steps: list[str] = STEPS, **settings: object) -> None:
    """c, z and every gradient, of these kernels, against the fp64 oracle, beside the reference in ``dtype``."""
    given = cast(cast(given, dtype), torch.float64)
    exact, own = (results(cast(given, d), "reference", **settings) for d in (torch.float64, dtype))
    with recorded() as launches:
        found = gradients(cast(given, dtype), **settings)
    assert [each.name for each in launches] == steps
    assert found.keys() == exact.keys()
    for name in exact:
        error, theirs = relative_error(found[name], exact[name]), relative_error(own[name], exact[name])
        assert within_budget(error, theirs, dtype), f"{name}: {error:.2e}, reference {theirs:.2e}"


def gradients(given: Given, **settings: object) -> Given:
    """c, z and every gradient on Triton, by name."""
    here = [{k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in d.items()} for d in (given, settings)]
    return {name: x.cpu() for name, x in results(here[0], "triton", **here[1]).items()}


GRADIENT_CASES = {
    "one tuple": {"tokens": 65, "experts": 2, "rank": 2},
    "experts in two runs each": {"tokens": 230, "experts": 3, "inner": 6},
    "experts in three runs each": {"tokens": 300, "experts": 4, "rank": 2, "width": 70, "inner": 6},
    "k = 1, several runs": {"tokens": 200, "experts": 3, "top_k": 1, "inner": 6},
    "k = 1, rank 20": {"tokens": 65, "experts": 2, "top_k": 1, "rank": 20, "width": 70},
    "n = 1, rank 1": {"tokens": 65, "experts": 1, "top_k": 1, "rank": 1, "inner": 6},
    "whole tiles, three blocks": {"tokens": 128, "experts": 2, "rank": 16, "width": 192, "inner": 16},
    "scale vectors": {"tokens": 130, "experts": 3, "scales": True, "inner": 6, "width": 72},
    "scale vectors and biases": {"tokens": 65, "experts": 2, "scales": True, "biases": True},
    "scale vectors and biases, k = 1": {"tokens": 65, "experts": 2, "top_k": 1, "scales": True, "biases": True},
    "biases": {"tokens": 65, "experts": 2, "biases": True, "inner": 6},
    "slots, k = 2": {"tokens": 66, "experts": 8, "rank": 2, "width": 40, "inner": 6},
    "slots, k = 4, experts of several tiles": {"tokens": 90, "experts": 4, "top_k": 4, "rank": 2, "width": 20},
    "slots, k = 3, scale vectors": {"tokens": 65, "experts": 5, "top_k": 3, "scales": True, "biases": True},
    "slots, n = 64": {"tokens": 65, "experts": 64, "rank": 1, "width": 20, "inner": 6},
    "slots, rank 20": {"tokens": 65, "experts": 3, "rank": 20, "width": 40},
}


# Each of two slots has its own launches; eight experts share their sums with the other launch, four have splits.
APART = {
    "n = 8": {"tokens": 257, "experts": 8, "rank": 1, "width": 70, "inner": 6},
    "n = 4, rank 20, scale vectors": {"tokens": 130, "experts": 4, "rank": 20, "width": 72, "scales": True},
}


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("case", APART.values(), ids=APART)
def test_gradients_of_slots_apart(case, pieces, monkeypatch):
    """The second launch adds to what the first has written: tokens' gradients, and the sums of the experts'."""
    monkeypatch.setattr(stream_plan, "BUFFER_BYTES", 0 if pieces == 2 else 2**26)
    pieces = 1 if "inner" not in case else pieces  # without H M^T nothing is buffered
    backward = [BACKWARD[0], BACKWARD[0], BACKWARD[1], BACKWARD[1]]
    steps = [*PLACING, *["experts_stream"] * 2 * pieces, *STEPS[3:6], *backward * pieces, STEPS[-1]]
    assert_within_budget(operands(**case), torch.bfloat16, steps)


@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_gradients_are_within_budget(case):
    """Tuples of several tiles, experts of several tuples, sizes that fill no tile."""
    assert_within_budget(operands(**case), torch.bfloat16)


def test_gradients_in_fp16():
    """The other half precision."""
    assert_within_budget(operands(tokens=100, experts=3, inner=6), torch.float16)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_with_dropout(top_k):
    """Both kernels draw the forward's mask again, the one of columns by tokens too."""
    given = operands(tokens=70, experts=max(2, top_k), top_k=top_k, width=70, inner=6)
    assert_within_budget(given, torch.bfloat16, dropout=0.4, seed=torch.tensor([2**40 + 7]))


@pytest.mark.parametrize("activation", ["quick_gelu", "relu2", "gelu_tanh"])
def test_gradients_of_activations(activation):
    """One with a derivative of zero, and two that take more than silu's."""
    assert_within_budget(operands(tokens=65, experts=1, top_k=1), torch.bfloat16, activation=activation)


def on_meta(size: Sizes) -> ExpertOperands:
    """Operands of a call without their memory."""
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    n, r, width, wide = size.num_experts, size.rank, size.width, empty(size.tokens, size.width)
    B, low = empty(n, width, r), empty(size.tokens, 2 * n * r)
    return ExpertOperands(
        GateUp(wide, wide), low, GateUp(B, B), empty(n, r, width), *[empty(size.tokens, size.slots)] * 2
    )


def test_sums_of_experts_take_bounded_memory():
    """Splits times experts are few, or all splits share one sum; 64 experts of Llama-3-8B would take 5.8 GB else."""
    for experts, tokens, slots in ((8, 8192, 2), (22, 8192, 2), (64, 8192, 2), (256, 8192, 8), (1, 300, 1), (4, 65, 4)):
        size = Sizes(tokens, 14336, experts, 16, slots)
        with standing_for("sm_90"):
            plan = stream_plan.stream_plan("stream_backward_weights", on_meta(size), size, "silu")
        assert plan.constants["SHARED"] or plan.splits * experts <= 40, size
        assert plan.splits * (14336 // plan.constants["BLOCK_F"]) >= 132, size  # each multiprocessor of an H100 has one


@pytest.mark.parametrize("chosen", [[0, 1], [3, 1]])
def test_experts_that_nobody_chose_get_zero_gradients(chosen):
    """All tokens to one tuple of six: its experts' gradients are right, the others' exactly zero."""
    given = operands(tokens=97, experts=4, inner=6)
    given["expert_ids"] = torch.tensor(chosen).expand(97, 2)
    assert_within_budget(given, torch.bfloat16)
    found = gradients(cast(given, torch.bfloat16))
    for name in ("gate_B", "up_B", "down_A"):
        assert not found[name][[e for e in range(4) if e not in chosen]].any()


def test_only_what_is_needed_is_launched():
    """Where no expert's weights learn, the kernel of their gradients is left out."""
    here = packed({name: x.to(DEVICE) for name, x in cast(operands(tokens=65, experts=2), torch.bfloat16).items()})
    low = here.low.requires_grad_()
    with recorded() as launches:
        sum(x.float().sum() for x in expert_swiglu(here, scale=1.0, backend="triton")).backward()
    assert low.grad is not None
    assert [each.name for each in launches] == [name for name in STEPS if name != BACKWARD[1]]


def test_gradients_of_slots_in_pieces(monkeypatch):
    """What rows of slots give is summed piece by piece; the last is narrower than the buffer."""
    monkeypatch.setattr(stream_plan, "BUFFER_BYTES", 0)
    steps = [*STEPS[:2], *["experts_stream"] * 4, *STEPS[3:6], *BACKWARD * 4, STEPS[-1]]
    assert_within_budget(operands(tokens=66, experts=5, width=200, inner=6), torch.bfloat16, steps)


def test_gradients_in_two_pieces_of_h_m(monkeypatch):
    """Each piece's H M^T is made once and read by both kernels; the second piece is narrower and fills no block."""
    monkeypatch.setattr(stream_plan, "BUFFER_BYTES", 0)
    steps = [*STEPS[:3], *STEPS[2:6], *BACKWARD, *BACKWARD, STEPS[-1]]
    assert_within_budget(operands(tokens=150, experts=3, width=200, inner=6), torch.bfloat16, steps)


@pytest.fixture(scope="module", params=[(165, 3, 2), (165, 8, 2), (130, 4, 20)], ids=["pairs", "slots", "apart"])
def plain(request) -> tuple[Given, Given]:
    """Operands, and their results and gradients: three tuples, two of two tiles; eight experts, each of several; and
    four whose slots are launches apart."""
    torch.manual_seed(3)
    tokens, experts, rank = request.param
    given = cast(operands(tokens=tokens, experts=experts, rank=rank, inner=6, width=130), torch.bfloat16)
    return given, gradients(given)


def test_layout_does_not_matter(plain):
    """Views and id dtypes, as models have them, give what plain operands give, bit for bit."""
    given, exact = plain
    gate, up = torch.cat([given["gate"], given["up"]], 1).chunk(2, 1)
    fold_gate, fold_up = torch.cat([given["fold_gate"], given["fold_up"]]).chunk(2)
    found = gradients(
        given
        | {"gate": gate, "up": up, "fold_gate": fold_gate, "fold_up": fold_up}
        | {"low_update": given["low_update"].repeat(1, 2)[:, : given["low"].shape[1]]}
        | {"state": given["state"].repeat(1, 2)[:, :6], "expert_ids": given["expert_ids"].to(torch.uint8)}
    )
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        assert torch.equal(found[name], x), name


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order of programs")
@pytest.mark.parametrize("order", ["reverse", 3])
def test_results_do_not_depend_on_the_order_of_programs(order, plain):
    """Placing and sums are the same whichever program runs first."""
    given, exact = plain
    with interpreter.grid_order(order):
        found = gradients(given)
    for name, x in exact.items():
        assert torch.equal(found[name], x), name


BY_TOKEN = ("gate", "up", "low", "routing_weights", "expert_ids", "low_update", "state")


def mean_gradients(given: Given, rows: list[int]) -> Given:
    """Every gradient of a fixed function of the outputs of some rows' tokens."""
    leaves = {name: x.to(DEVICE).requires_grad_(x.is_floating_point()) for name, x in given.items()}
    hidden, low_down = run_experts(**leaves, scale=1.5, backend="triton")
    (hidden[rows].float().square().sum() + low_down[rows].float().square().sum()).backward()
    return {name: x.grad.cpu() for name, x in leaves.items() if x.grad is not None}


@pytest.mark.parametrize("wrong", [5, -1, None], ids=["too large", "negative", "twice"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_id_that_is_no_expert_moves_no_other_gradient(wrong, top_k):
    """Its pre-activations' gradients are NaN, other tokens' the same bit for bit, experts' as if it were not there."""
    if top_k == 1 and wrong is None:
        pytest.skip("one id cannot stand twice")
    n = 2 if top_k == 1 else 3
    given = cast(operands(tokens=70, experts=n, top_k=top_k, scales=True, inner=6), torch.bfloat16)
    broken = given | {"expert_ids": given["expert_ids"].clone()}
    broken["expert_ids"][3, -1] = given["expert_ids"][3, 0] if wrong is None else wrong
    broken["expert_ids"][40, 0] = 17
    others = [i for i in range(70) if i not in (3, 40)]
    alone = {name: x[others].clone() if name in BY_TOKEN else x for name, x in given.items()}
    every, found, expected = (
        mean_gradients(x, rows) for x, rows in ((given, others), (broken, others), (alone, list(range(68))))
    )
    for name in ("gate", "up", "routing_weights", "low"):
        assert torch.equal(found[name][others], every[name][others]), name
    assert all(found[name][[3, 40]].isnan().all() for name in ("gate", "up"))
    for name in ("gate_B", "up_B", "down_A", "gate_scale", "up_scale"):
        assert relative_error(found[name], expected[name].double()) < 4e-3, name

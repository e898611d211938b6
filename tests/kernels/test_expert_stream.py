"""The forward of `expert_swiglu` as a stream over tiles of like tokens: values, padding, placing, what falls back."""

from __future__ import annotations

import pytest
import torch

from graphmoe_kernels import expert_swiglu
from graphmoe_kernels.experts.triton import launch_stream as stream
from graphmoe_kernels.experts.triton.sizes import Sizes, sizes
from graphmoe_kernels.testing import relative_error, within_budget
from tests import interpreter
from tests.kernels.expert_operands import cast, operands, packed, results
from tests.kernels.expert_operands import run as run_experts
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Given = dict[str, torch.Tensor]


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that a stream starts, as they come."""
    found: list[str] = []
    plain = stream.launch
    monkeypatch.setattr(stream, "launch", lambda k, *a, **o: (found.append(k.__name__), plain(k, *a, **o)))
    return found


STEPS = ["experts_count_tuples", "experts_place_tokens", "experts_stream", "experts_stream_sum"]
BACKWARD_STEPS = [
    *STEPS[:2],
    "experts_stream_backward_tokens",
    "experts_stream_backward_weights",
    "experts_stream_sum_tokens",
]


@torch.no_grad()
def run(given: Given, backend: str = "triton", **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    device = DEVICE if backend == "triton" else "cpu"
    here = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (given | settings).items()}
    return run_experts(**here, scale=1.5, backend=backend)


def assert_within_budget(given: Given, dtype: torch.dtype, **settings: object) -> None:
    """c and z against the fp64 oracle, beside the reference in ``dtype``."""
    given = cast(cast(given, dtype), torch.float64)
    exact, own = run(given, "reference", **settings), run(cast(given, dtype), "reference", **settings)
    found = run(cast(given, dtype), **settings)
    for name, a, b, plain in zip(("hidden", "low_down"), found, exact, own, strict=True):
        error, theirs = relative_error(a.cpu(), b), relative_error(plain, b)
        assert within_budget(error, theirs, dtype), f"{name}: {error:.2e}, reference {theirs:.2e}"


CASES = {
    "first round": {"tokens": 66, "experts": 3},
    "later round": {"tokens": 66, "experts": 3, "inner": 20, "width": 40},
    "whole tiles, three steps": {"tokens": 65, "experts": 2, "rank": 16, "width": 192, "inner": 16},
    "k = 1": {"tokens": 70, "experts": 4, "top_k": 1, "inner": 6},
    "k = 1, rank 20": {"tokens": 65, "experts": 2, "top_k": 1, "rank": 20, "width": 70},
    "n = 1, rank 1": {"tokens": 65, "experts": 1, "top_k": 1, "rank": 1},
    "n = 8": {"tokens": 450, "experts": 8, "rank": 2, "width": 16, "inner": 6},
    "scale vectors": {"tokens": 65, "experts": 2, "scales": True, "inner": 6, "width": 72},
    "scale vectors and biases": {"tokens": 65, "experts": 2, "scales": True, "biases": True},
    "biases, k = 1": {"tokens": 65, "experts": 2, "top_k": 1, "biases": True, "inner": 6},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_are_within_budget(case, launched):
    """Token counts, widths and ranks that fill no tile, and some that do; both numbers of slots."""
    assert_within_budget(operands(**case), torch.bfloat16)
    assert launched == STEPS


def test_fp16(launched):
    """The other half precision."""
    assert_within_budget(operands(tokens=65, experts=2, inner=6), torch.float16)
    assert launched == STEPS


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropout_draws_the_mask_of_the_other_backends(top_k, launched):
    """Two steps of a tile, so that both halves of its columns have the right numbers."""
    given = operands(tokens=65, experts=2, top_k=top_k, width=70, inner=6)
    assert_within_budget(given, torch.bfloat16, dropout=0.4, seed=torch.tensor([2**40 + 7]))
    assert launched == STEPS


@pytest.mark.parametrize("chosen", [[0, 1], [3, 1]])
def test_all_tokens_to_one_tuple(chosen, launched):
    """Five tuples of six are empty, and their tiles leave at once; the order of a token's slots does not matter."""
    given = operands(tokens=97, experts=4, inner=6)
    given["expert_ids"] = torch.tensor(chosen).expand(97, 2)
    assert_within_budget(given, torch.bfloat16)
    assert launched == STEPS


@pytest.mark.parametrize("activation", ["quick_gelu", "sigmoid", "gelu_tanh"])
def test_activations(activation):
    """On a GPU these divide approximately."""
    assert_within_budget(operands(tokens=65, experts=1, top_k=1), torch.bfloat16, activation=activation)


def gradients_within_budget(given: Given, dtype: torch.dtype, **settings: object) -> None:
    """c, z and every gradient against the fp64 oracle, beside the reference in ``dtype``."""
    given = cast(cast(given, dtype), torch.float64)
    exact, own = (results(cast(given, d), "reference", **settings) for d in (torch.float64, dtype))
    found = gradients(cast(given, dtype), **settings)
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
}


@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_gradients_are_within_budget(case, launched):
    """Tuples of several tiles, experts of several tuples, sizes that fill no tile."""
    gradients_within_budget(operands(**case), torch.bfloat16)
    assert launched == STEPS + BACKWARD_STEPS


def test_gradients_in_fp16(launched):
    """The other half precision."""
    gradients_within_budget(operands(tokens=100, experts=3, inner=6), torch.float16)
    assert launched == STEPS + BACKWARD_STEPS


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_with_dropout(top_k, launched):
    """Both kernels draw the forward's mask again, the one of columns by tokens too."""
    given = operands(tokens=70, experts=2, top_k=top_k, width=70, inner=6)
    gradients_within_budget(given, torch.bfloat16, dropout=0.4, seed=torch.tensor([2**40 + 7]))
    assert launched == STEPS + BACKWARD_STEPS


@pytest.mark.parametrize("activation", ["quick_gelu", "relu2", "gelu_tanh"])
def test_gradients_of_activations(activation):
    """One with a derivative of zero, and two that take more than silu's."""
    gradients_within_budget(operands(tokens=65, experts=1, top_k=1), torch.bfloat16, activation=activation)


@pytest.mark.parametrize("chosen", [[0, 1], [3, 1]])
def test_experts_that_nobody_chose_get_zero_gradients(chosen):
    """All tokens to one tuple of six: its experts' gradients are right, the others' exactly zero."""
    given = operands(tokens=97, experts=4, inner=6)
    given["expert_ids"] = torch.tensor(chosen).expand(97, 2)
    gradients_within_budget(given, torch.bfloat16)
    found = gradients(cast(given, torch.bfloat16))
    for name in ("gate_B", "up_B", "down_A"):
        assert not found[name][[e for e in range(4) if e not in chosen]].any()


def test_only_what_is_needed_is_launched(launched):
    """Where no expert's weights learn, the kernel of their gradients is left out."""
    here = packed({name: x.to(DEVICE) for name, x in cast(operands(tokens=65, experts=2), torch.bfloat16).items()})
    low = here.low.requires_grad_()
    sum(x.float().sum() for x in expert_swiglu(here, backend="triton")).backward()
    assert low.grad is not None
    assert launched == [*STEPS, *BACKWARD_STEPS[:3], BACKWARD_STEPS[4]]


def test_two_pieces_of_h_m(monkeypatch, launched):
    """Where H M^T would be larger than c it is made for half of the columns at a time: c is the same bit for bit."""
    given = cast(operands(tokens=65, experts=2, width=200, inner=6), torch.bfloat16)
    c, z = run(given)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 0)
    found = run(given)
    assert launched == [*STEPS, *STEPS[:3], *STEPS[2:]]
    assert torch.equal(found[0], c)
    torch.testing.assert_close(found[1], z, rtol=2e-2, atol=2e-2)


def test_gradients_in_two_pieces_of_h_m(monkeypatch, launched):
    """Each piece's H M^T is made once and read by both kernels; the second piece is narrower and fills no block."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 0)
    gradients_within_budget(operands(tokens=150, experts=3, width=200, inner=6), torch.bfloat16)
    pieces = BACKWARD_STEPS[2:4] * 2
    assert launched == [*STEPS[:3], *STEPS[2:], *BACKWARD_STEPS[:2], *pieces, BACKWARD_STEPS[4]]


@pytest.fixture(scope="module")
def plain() -> tuple[Given, Given]:
    """Operands, and their results and gradients: three tuples, two of two tiles."""
    torch.manual_seed(3)
    given = cast(operands(tokens=165, experts=3, inner=6, width=130), torch.bfloat16)
    return given, gradients(given)


def test_layout_does_not_matter(plain):
    """Views, id dtypes and an order of tokens, as models have them, give what plain operands give, bit for bit."""
    given, exact = plain
    gate, up = torch.cat([given["gate"], given["up"]], 1).chunk(2, 1)
    fold_gate, fold_up = torch.cat([given["fold_gate"], given["fold_up"]]).chunk(2)
    found = gradients(
        given
        | {"gate": gate, "up": up, "fold_gate": fold_gate, "fold_up": fold_up}
        | {"low_update": given["low_update"].repeat(1, 2)[:, : given["low"].shape[1]]}
        | {"state": given["state"].repeat(1, 2)[:, :6], "expert_ids": given["expert_ids"].to(torch.uint8)}
        | {"token_order": torch.arange(165, dtype=torch.int32).flip(0)}
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


@pytest.mark.parametrize("wrong", [5, -1, None], ids=["too large", "negative", "twice"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_id_that_is_no_expert_makes_its_token_nan(wrong, top_k):
    """No memory of others is read, nothing is clipped, and no other token moves."""
    if top_k == 1 and wrong is None:
        pytest.skip("one id cannot stand twice")
    given = cast(operands(tokens=65, experts=2 if top_k == 1 else 3, top_k=top_k, inner=6), torch.bfloat16)
    clean = run(given)
    given["expert_ids"][3, -1] = given["expert_ids"][3, 0] if wrong is None else wrong
    given["expert_ids"][40, 0] = 17
    found = run(given)
    assert found[0][[3, 40]].isnan().all()
    others = [i for i in range(65) if i not in (3, 40)]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])


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


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("tokens", [66, 700])
def test_tokens_are_placed_by_tuple_and_padded(tokens, top_k):
    """Every token once, in its own order within its tuple; every tile of one tuple, its first row a token's."""
    given = cast(operands(tokens=tokens, experts=6, top_k=top_k, rank=1, width=4), torch.bfloat16)
    given["expert_ids"][5] = 9  # no expert
    here = packed({name: t.to(DEVICE) for name, t in given.items()})
    placed = stream.place(here, sizes(here), 32)
    order = placed.tokens.cpu()
    keys = [tuple(sorted(row)) for row in given["expert_ids"].tolist()]
    seen: dict[tuple[int, ...], list[int]] = {}
    used = True
    for rows in order.view(-1, 32).tolist():
        live = [token for token in rows if token >= 0]
        assert rows == live + [-1] * (32 - len(live))
        assert used or not live, "a spare tile before one that is used"
        used = bool(live)
        if live:
            (key,) = {keys[token] for token in live}
            before = seen.setdefault(key, [])
            assert len(before) % 32 == 0, "a tuple's second tile after one that is not full"
            before += live
    assert all(tokens == sorted(tokens) for tokens in seen.values())
    assert sorted(token for tokens in seen.values() for token in tokens) == list(range(tokens))


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"tokens": 448}, False),  # 28 pairs
        ({"tokens": 64, "num_experts": 1, "slots": 1}, False),
        ({"tokens": 65, "num_experts": 1, "slots": 1}, True),
        ({"tokens": 10**6, "num_experts": 64}, False),
        ({"num_experts": 64, "slots": 1}, True),
        ({"slots": 3}, False),
        ({"rank": 0, "num_experts": 1, "slots": 1}, False),
        ({"rank": 17}, False),
        ({"rank": 32, "slots": 1}, True),
        ({"rank": 33, "slots": 1}, False),
    ],
)
def test_what_runs_as_a_stream(change, expected):
    """Llama-3-8B at 8192 tokens does; few tokens for the tuples, many experts, slots or ranks keep the other kernel."""
    size = Sizes(8192, 14336, 8, 16, 2)._replace(**change)
    assert stream.suits(size, torch.bfloat16) is expected
    assert not stream.suits(size, torch.float32)

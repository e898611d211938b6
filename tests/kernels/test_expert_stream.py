"""The forward of `expert_swiglu` as a stream over tiles of like tokens: values, padding, placing, what falls back.

Gradients, layouts and the order of programs are in `test_expert_stream_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from graphmoe_kernels.experts.triton import launch_stream as stream
from graphmoe_kernels.experts.triton import placing
from graphmoe_kernels.experts.triton.sizes import Sizes, sizes
from graphmoe_kernels.launching import recorded
from graphmoe_kernels.testing import relative_error, within_budget
from tests.kernels.expert_operands import cast, operands, packed
from tests.kernels.expert_operands import run as run_experts
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Given = dict[str, torch.Tensor]


@pytest.fixture
def launched() -> Iterator[Callable[[], list[str]]]:
    """Gives the names of the kernels that were launched so far, as they came."""
    with recorded() as launches:
        yield lambda: [each.name for each in launches]


STEPS = ["experts_count_tuples", "experts_place_tokens", "experts_stream", "experts_stream_sum"]


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
    assert launched() == STEPS


def test_fp16(launched):
    """The other half precision."""
    assert_within_budget(operands(tokens=65, experts=2, inner=6), torch.float16)
    assert launched() == STEPS


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropout_draws_the_mask_of_the_other_backends(top_k, launched):
    """Two steps of a tile, so that both halves of its columns have the right numbers."""
    given = operands(tokens=65, experts=2, top_k=top_k, width=70, inner=6)
    assert_within_budget(given, torch.bfloat16, dropout=0.4, seed=torch.tensor([2**40 + 7]))
    assert launched() == STEPS


@pytest.mark.parametrize("chosen", [[0, 1], [3, 1]])
def test_all_tokens_to_one_tuple(chosen, launched):
    """Five tuples of six are empty, and their tiles leave at once; the order of a token's slots does not matter."""
    given = operands(tokens=97, experts=4, inner=6)
    given["expert_ids"] = torch.tensor(chosen).expand(97, 2)
    assert_within_budget(given, torch.bfloat16)
    assert launched() == STEPS


@pytest.mark.parametrize("activation", ["quick_gelu", "sigmoid", "gelu_tanh"])
def test_activations(activation):
    """On a GPU these divide approximately."""
    assert_within_budget(operands(tokens=65, experts=1, top_k=1), torch.bfloat16, activation=activation)


def test_two_pieces_of_h_m(monkeypatch, launched):
    """Where H M^T would be larger than c it is made for half of the columns at a time: c is the same bit for bit."""
    given = cast(operands(tokens=65, experts=2, width=200, inner=6), torch.bfloat16)
    c, z = run(given)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 0)
    found = run(given)
    assert launched() == [*STEPS, *STEPS[:3], *STEPS[2:]]
    assert torch.equal(found[0], c)
    torch.testing.assert_close(found[1], z, rtol=2e-2, atol=2e-2)


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


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("tokens", [66, 700])
def test_tokens_are_placed_by_tuple_and_padded(tokens, top_k):
    """Every token once, in its own order within its tuple; every tile of one tuple, its first row a token's."""
    given = cast(operands(tokens=tokens, experts=6, top_k=top_k, rank=1, width=4), torch.bfloat16)
    given["expert_ids"][5] = 9  # no expert
    here = packed({name: t.to(DEVICE) for name, t in given.items()})
    placed = placing.place(here.expert_ids, here.routing_weights, sizes(here), 32)
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

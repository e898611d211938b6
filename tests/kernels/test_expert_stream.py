"""The forward of `expert_swiglu` as a stream over tiles of like tokens: values, padding, placing, what falls back.

Gradients, layouts and the order of programs are in `test_expert_stream_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from graphmoe_kernels.experts.triton import placing, stream_plan
from graphmoe_kernels.experts.triton.sizes import Sizes, Tiling, sizes, tiling
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


STEPS = ["experts_count_tuples", "experts_place_rows", "experts_stream", "experts_stream_sum"]


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


# Each of two slots has its own launches: from 32 tokens per expert on, where pairs do not share tiles.
APART = {
    "slots apart, n = 8": {"tokens": 257, "experts": 8, "rank": 2, "width": 40, "inner": 6},
    "slots apart, n = 4, rank 20": {"tokens": 130, "experts": 4, "rank": 20, "width": 70},
    "slots apart, scale vectors and biases": {
        "tokens": 96,
        "experts": 3,
        "rank": 17,
        "scales": True,
        "biases": True,
        "width": 72,
    },
}
# A slot of a token is a row: few tokens for their pairs, more than two slots, a high rank.
SLOTS = {
    "k = 2, n = 8": {"tokens": 66, "experts": 8, "rank": 2, "width": 40, "inner": 6},
    "k = 2, n = 16": {"tokens": 66, "experts": 16, "rank": 2, "width": 40},
    "k = 2, n = 64, fewer rows than experts' tiles": {"tokens": 70, "experts": 64, "rank": 1, "width": 40},
    "k = 4, n = 64": {"tokens": 66, "experts": 64, "top_k": 4, "rank": 2, "width": 20, "inner": 6},
    "k = 8, n = 8": {"tokens": 65, "experts": 8, "top_k": 8, "rank": 1, "width": 20},
    "k = 8, n = 256": {"tokens": 65, "experts": 256, "top_k": 8, "rank": 1, "width": 20},
    "k = 3, scale vectors and biases": {
        "tokens": 65,
        "experts": 5,
        "top_k": 3,
        "scales": True,
        "biases": True,
        "inner": 6,
        "width": 72,
    },
    "k = 2, rank 20": {"tokens": 65, "experts": 3, "rank": 20, "width": 70, "inner": 6},
    "k = 1, rank 68": {"tokens": 65, "experts": 2, "top_k": 1, "rank": 68, "width": 40},
    "rank 0": {"tokens": 65, "experts": 2, "rank": 0, "inner": 20, "width": 40},
}
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
    **SLOTS,
}


@pytest.mark.parametrize("case", APART.values(), ids=APART)
def test_values_of_slots_apart(case, launched):
    """The second launch adds to what the first has written."""
    assert_within_budget(operands(**case), torch.bfloat16)
    assert launched() == [*STEPS[:3], *STEPS[2:]]


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
    monkeypatch.setattr(stream_plan, "BUFFER_BYTES", 0)
    found = run(given)
    assert launched() == [*STEPS, *STEPS[:3], *STEPS[2:]]
    assert torch.equal(found[0], c)
    torch.testing.assert_close(found[1], z, rtol=2e-2, atol=2e-2)


BROKEN = {
    "k = 1": {"tokens": 65, "experts": 2, "top_k": 1},
    "pairs": {"tokens": 65, "experts": 3},
    "slots apart": {"tokens": 97, "experts": 3, "rank": 20},
}


@pytest.mark.parametrize("wrong", [5, -1, None], ids=["too large", "negative", "twice"])
@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_an_id_that_is_no_expert_makes_its_token_nan(wrong, case):
    """No memory of others is read, nothing is clipped, and no other token moves."""
    if case.get("top_k") == 1 and wrong is None:
        pytest.skip("one id cannot stand twice")
    given = cast(operands(**case, inner=6), torch.bfloat16)
    clean = run(given)
    given["expert_ids"][3, -1] = given["expert_ids"][3, 0] if wrong is None else wrong
    given["expert_ids"][40, 0] = 17
    found = run(given)
    assert found[0][[3, 40]].isnan().all()
    others = [i for i in range(case["tokens"]) if i not in (3, 40)]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])


PLACES = {
    "k = 1": (6, 1, Tiling(1, 1, 6)),
    "pairs": (6, 2, Tiling(2, 1, 15)),
    "slots, k = 2": (6, 2, Tiling(1, 2, 6)),
    "slots, k = 4, more experts than rows of a block": (300, 4, Tiling(1, 4, 300)),
    "slots apart": (6, 2, Tiling(1, 2, 6, 2)),
}


@pytest.mark.parametrize("experts, top_k, own", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("tokens", [66, 700])
def test_rows_are_placed_by_tuple_and_padded(tokens, experts, top_k, own, monkeypatch):
    """Every row once, in its own order within its tuple; every tile of one tuple, its first row there."""
    monkeypatch.setattr(placing, "MAX_BLOCKS", 4)  # so that programs have several chunks
    given = cast(operands(tokens=tokens, experts=experts, top_k=top_k, rank=1, width=4), torch.bfloat16)
    given["expert_ids"][5] = experts + 3  # no expert
    here = packed({name: t.to(DEVICE) for name, t in given.items()})
    placed = placing.place(here.expert_ids, here.routing_weights, sizes(here), own, 32)
    rows_experts = given["expert_ids"].view(-1, own.experts).tolist()
    keys = [(row % own.launches, *sorted(experts)) for row, experts in enumerate(rows_experts)]
    seen: dict[tuple[int, ...], list[int]] = {}
    used, ends = 0, [0] * own.launches
    tiles = placed.rows.cpu().view(-1, 32).tolist()
    for tile, rows in enumerate(tiles):
        live = [row for row in rows if row >= 0]
        assert rows == live + [-1] * (32 - len(live))
        if live:
            assert used == tile, "a spare tile before one that is used"
            used = tile + 1
            (key,) = {keys[row] for row in live}
            number, *chosen = key
            assert not any(ends[number + 1 :]), "a tile of a launch after one of the next"
            ends[number] = used
            expected = chosen if chosen[0] < experts else [experts] * own.experts
            assert placed.experts[tile].tolist() == expected
            before = seen.setdefault(key, [])
            assert len(before) % 32 == 0, "a tuple's second tile after one that is not full"
            before += live
            assert placed.places[torch.tensor(live)].tolist() == [tile * 32 + i for i in range(len(live))]
    assert placed.used.tolist() == ends
    assert all(rows == sorted(rows) for rows in seen.values())
    assert sorted(row for rows in seen.values() for row in rows) == list(range(tokens * own.rows))
    last = {key: max(i for i, rows in enumerate(tiles) if keys[rows[0]] == key and rows[0] >= 0) for key in seen}
    assert placed.ends[:used].tolist() == [last[keys[rows[0]]] + 1 for rows in tiles[:used]]


@pytest.mark.parametrize(
    "change, experts",
    [
        ({}, 2),
        ({"tokens": 448}, 1),  # 28 pairs
        ({"tokens": 449}, 2),
        ({"tokens": 65, "num_experts": 2}, 2),
        ({"tokens": 10**6, "num_experts": 64}, 1),
        ({"tokens": 2048, "num_experts": 64}, 1),  # 32 tokens per expert and slot
        ({"tokens": 2047, "num_experts": 64}, 1),
        ({"rank": 17}, 1),
        ({"slots": 1}, 1),
        ({"slots": 4}, 1),
    ],
)
def test_a_pair_of_experts_shares_a_tile_where_that_pays(change, experts):
    """Llama-3-8B's at 8192 tokens do; with few tokens for the pairs, many experts or high ranks a slot is a row."""
    size = Sizes(8192, 14336, 8, 16, 2)._replace(**change)
    found = tiling(size)
    assert found.experts == experts
    assert found.rows == size.slots // experts
    assert found.launches == (2 if found.rows == 2 and size.tokens >= 32 * size.num_experts else 1)

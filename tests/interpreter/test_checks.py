"""The interpreter's repairs and checks catch what they are there for.

Without these tests a check that no longer fires (another version of Triton, a renamed method) would go unnoticed, and
every kernel test would pass in an interpreter that forgives.
"""

import pytest
import torch

from graphmoe_kernels.backend import interpreting
from tests.interpreter import BoundsError, RaceError, checks, grid_order

pytest.importorskip("triton")
from tests.interpreter import broken_kernels as kernels

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not interpreting(), reason="the checks are those of the interpreter; kernels run on the GPU"),
]

PARTS, BLOCK = 6, 16


def doubled(x, **flags):
    """`kernels.double` of a vector that is no multiple of the block, in the middle of a larger tensor."""
    out = torch.zeros_like(x)
    kernels.double[(-(-len(x) // BLOCK),)](x, out, len(x), BLOCK=BLOCK, **flags)
    return out


def guarded(size):
    """A vector with memory of its own before and after it, so that a stray access harms no one."""
    return torch.randn(size + 2 * BLOCK)[BLOCK:-BLOCK]


def test_missing_mask_is_caught():
    x = guarded(20)
    torch.testing.assert_close(doubled(x, MASKED=True, SHIFT=0), 2 * x)
    with pytest.raises(BoundsError, match=r"load outside every tensor.*element 20 counted.*x_ptr, which has 20"):
        doubled(x, MASKED=False, SHIFT=0)


@pytest.mark.parametrize("shift", [1, -1])
def test_wrong_offset_is_caught_at_the_end_that_it_passes(shift):
    with pytest.raises(BoundsError, match="1 of"):
        doubled(guarded(32), MASKED=True, SHIFT=shift)


def test_stock_interpreter_forgives_a_wrong_offset():
    x = guarded(32)
    with checks(bounds=False):
        assert not torch.equal(doubled(x, MASKED=True, SHIFT=1), 2 * x)


def test_missing_other_poisons_a_sum():
    x, out = torch.randn(20), torch.zeros(1)
    kernels.total[(1,)](x, out, 20, OTHER=True, BLOCK=32)
    torch.testing.assert_close(out[0], x.sum())
    kernels.total[(1,)](x, out, 20, OTHER=False, BLOCK=32)
    assert out.isnan().all()


def test_stock_interpreter_hides_a_missing_other():
    x, out = torch.randn(20), torch.zeros(1)
    with checks(poison=False):
        kernels.total[(1,)](x, out, 20, OTHER=False, BLOCK=32)
    torch.testing.assert_close(out[0], x.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_poison_is_nan_in_every_float_dtype(dtype):
    out = torch.zeros(1, dtype=dtype)
    kernels.total[(1,)](torch.ones(20, dtype=dtype), out, 20, OTHER=False, BLOCK=32)
    assert out.isnan().all()


def test_two_programs_storing_one_address_race():
    out = torch.zeros(64)
    kernels.overlapping_stores[(4,)](out, STEP=16, BLOCK=16)
    assert out.eq(1).all()
    with pytest.raises(RaceError, match=r"program \(1, 0, 0\) stores 8 elements of out_ptr that program \(0, 0, 0\)"):
        kernels.overlapping_stores[(4,)](out, STEP=8, BLOCK=16)


def test_load_of_another_programs_store_races():
    with pytest.raises(RaceError, match="loads 1 elements"):
        kernels.running_sum[(4,)](torch.zeros(5))


def test_store_where_another_program_loaded_races():
    """The same race in the order in which the load comes first."""
    with grid_order("reverse"), pytest.raises(RaceError, match=r"stores 1 elements.*loaded"):
        kernels.running_sum[(4,)](torch.zeros(5))


def test_stock_interpreter_hides_a_race():
    out = torch.zeros(5)
    with checks(races=False):
        kernels.running_sum[(4,)](out)
        assert out.tolist() == [0, 1, 2, 3, 4]
        with grid_order("reverse"):
            kernels.running_sum[(4,)](out.zero_())
    assert out.tolist() == [0, 1, 1, 1, 1]


def test_load_of_the_programs_own_store_needs_a_barrier():
    x, scratch, out = torch.randn(BLOCK), torch.zeros(BLOCK), torch.zeros(BLOCK)
    kernels.mirrored[(1,)](x, scratch, out, BARRIER=True, BLOCK=BLOCK)
    torch.testing.assert_close(out, x.flip(0))
    with pytest.raises(RaceError, match=r"scratch_ptr that it stored with no tl.debug_barrier\(\)"):
        kernels.mirrored[(1,)](x, scratch, out, BARRIER=False, BLOCK=BLOCK)


def test_two_lanes_storing_different_values_to_one_address_race():
    with pytest.raises(RaceError, match="two lanes"):
        kernels.lanes_collide[(1,)](torch.zeros(1), BLOCK=BLOCK)


def reduced(barrier=True, atomic_first=False, sem="acq_rel"):
    """`kernels.last_arriver` of random rows, and what it should be."""
    x = torch.randn(PARTS, BLOCK)
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(BLOCK)
    kernels.last_arriver[(PARTS,)](
        x, torch.zeros_like(x), counter, out, barrier, atomic_first, sem, PARTS=PARTS, BLOCK=BLOCK
    )
    assert counter.item() == 0, "the last arriver leaves the counter as it found it"
    return out, 2 * x.sum(0)


@pytest.mark.parametrize("order", ["reverse", 0, 1])
def test_last_arriver_done_right_is_no_race(order):
    """Partial results that an atomic counter orders are legal, whoever comes last."""
    with grid_order(order):
        torch.testing.assert_close(*reduced())


@pytest.mark.parametrize(
    "fault",
    [{"atomic_first": True}, {"barrier": False}, {"sem": "relaxed"}],
    ids=["store late", "no barrier", "relaxed"],
)
def test_last_arriver_done_wrong_races(fault):
    """The partial result stored after the atomic, not waited for, or published by an atomic that orders nothing."""
    with pytest.raises(RaceError, match="loads 16 elements of partial_ptr"):
        reduced(**fault)


def test_stock_interpreter_hides_a_partial_result_that_no_one_waited_for():
    with checks(races=False):
        torch.testing.assert_close(*reduced(barrier=False))


def test_grid_order_is_the_order_of_the_programs():
    def arrivals():
        out = torch.zeros(PARTS, dtype=torch.int32)
        kernels.arrival_order[(PARTS,)](torch.zeros(1, dtype=torch.int32), out)
        return out.tolist()

    stock = list(range(PARTS))
    assert arrivals() == stock
    with grid_order("reverse"):
        assert arrivals() == stock[::-1]
    with grid_order(3):
        drawn = arrivals()
    assert drawn != stock
    assert sorted(drawn) == stock
    assert arrivals() == stock


def test_bfloat16_elementwise_is_that_of_torch():
    """Sums, quotients, comparisons and casts, rounded to nearest even as PyTorch does it."""
    x, y = torch.randn(2, 64).to(torch.bfloat16)
    wide = torch.randn(64)
    wide[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])  # two ties, to even
    outs = [torch.empty_like(x) for _ in range(4)]
    kernels.elementwise[(1,)](x, y, outs[0], outs[1], outs[2], wide, outs[3], BLOCK=64)
    expected = [x + y, (x.float() / y.float()).bfloat16(), wide.bfloat16(), torch.where(x > y, x, torch.maximum(-x, y))]
    for out, right in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_and_sum_are_those_of_torch(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    product, total = torch.empty(32, 32), torch.empty(32)
    kernels.matmul[(1,)](a, b, product, total, SIZE=32)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, a.float().sum(1), rtol=2 * torch.finfo(dtype).eps, atol=1e-2)

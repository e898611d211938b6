"""The order of tokens in which neighbours share experts."""

import pytest
import torch

from graphmoe_kernels import expert_order
from graphmoe_kernels.routing.triton import launch
from tests.kernels.routing_operands import DEVICE
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS


def sort_keys(experts):
    """The two smallest experts of each token as one number."""
    ascending = experts.long().sort(-1).values
    return ascending[:, 0] * 256 + (ascending[:, 1] if experts.shape[1] > 1 else 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens, experts, top_k", [(1, 4, 2), (130, 3, 1), (200, 8, 2), (200, 5, 5), (128, 256, 3)])
def test_expert_order_is_the_stable_sort_of_each_window(tokens, experts, top_k, dtype, monkeypatch):
    """Tiles of consecutive tokens share experts; several windows, one that is not full, and many equal keys."""
    monkeypatch.setattr(launch, "ORDER_WINDOW", 128)
    chosen = torch.rand(tokens, experts, device=DEVICE).topk(top_k).indices.to(dtype)
    windows = sort_keys(chosen).split(128)
    expected = [torch.argsort(keys, stable=True) + 128 * i for i, keys in enumerate(windows)]
    found = expert_order(chosen)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), torch.cat(expected))


def test_expert_order_of_no_tokens():
    """An empty batch has an empty order."""
    assert expert_order(torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)).shape == (0,)


@pytest.mark.parametrize(
    "experts, error, message",
    [
        (torch.zeros(3, 2), TypeError, "experts must be int64, int32, int16 or uint8, got torch.float32"),
        (torch.zeros(3, dtype=torch.int32), ValueError, r"experts must be \[tokens, top_k\], got \[3\]"),
        ([[0, 1]], TypeError, "experts must be a tensor, got list"),
        (torch.zeros(3, 2, dtype=torch.int32, device="meta"), ValueError, "experts is on meta, and backend='triton'"),
    ],
)
def test_expert_order_refusals(experts, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    with pytest.raises(error, match=message):
        expert_order(experts)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's ids are not read back")
@pytest.mark.parametrize("wrong", [-1, 256, 2**40])
def test_ids_that_no_expert_has_are_refused_where_they_are_read(wrong):
    """The order would be no permutation, and tokens be lost."""
    experts = torch.zeros(3, 2, dtype=torch.int64)
    experts[1, 1] = wrong
    with pytest.raises(ValueError, match=rf"experts must be in 0\.\.255, got .*{wrong}"):
        expert_order(experts)

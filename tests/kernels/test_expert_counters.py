"""Counters of the expert kernels: zeros that are kept, whom they are shared with, and when they are let go of."""

from __future__ import annotations

import threading

import pytest
import torch

from graphmoe_kernels.experts.triton import counters as kept
from graphmoe_kernels.experts.triton import launch
from tests.kernels.expert_operands import cast, operands, run
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    kept.forget(DEVICE)
    yield
    kept.forget(DEVICE)


def forward() -> tuple[torch.Tensor, torch.Tensor]:
    """A round whose tiles have several splits, with the same operands every time."""
    torch.manual_seed(3)
    given = {name: t.to(DEVICE) for name, t in cast(operands(tokens=40, width=200), torch.float32).items()}
    with torch.no_grad():
        return run(**given, backend="triton")


def test_they_are_zero_again_and_serve_the_next_launch():
    """One round after the other on the same counters gives the same bits."""
    first = forward()
    own = kept.counters(DEVICE, 3)
    assert not own.any()
    second = forward()
    assert kept.counters(DEVICE, 3) is own
    assert not own.any()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_more_than_there_are_makes_new_ones():
    """A launch of more tiles than any before does not write past the end."""
    few = kept.counters(DEVICE, 1)
    many = kept.counters(DEVICE, kept.KEPT + 1)
    assert len(few) == kept.KEPT
    assert len(many) == kept.KEPT + 1
    assert kept.counters(DEVICE, 1) is many


def test_threads_share_none():
    """Two threads launch at once: each counts its own programs."""
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(kept.counters(DEVICE, 1)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != kept.counters(DEVICE, 1).data_ptr()


def test_a_launch_that_fails_leaves_none_behind(monkeypatch):
    """Its programs may have counted already: the next launch must not go on from there."""
    expected = forward()
    plain = launch.launch

    def failing(kernel, grid, *args, **options):
        args[7].fill_(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch", failing)
    with pytest.raises(KeyboardInterrupt):
        forward()
    monkeypatch.setattr(launch, "launch", plain)
    for a, b in zip(forward(), expected, strict=True):
        assert torch.equal(a, b)


def test_under_a_mode_that_sees_every_operation_nothing_is_kept():
    """A fake tensor in the place of the counters would be there in the next real launch."""
    with torch._subclasses.FakeTensorMode():
        fake = kept.counters(DEVICE, 1)
    assert type(fake) is not torch.Tensor
    assert type(kept.counters(DEVICE, 1)) is torch.Tensor
    assert kept.counters(torch.device("meta"), 5).shape == (5,)


def test_captured_launches_get_counters_of_their_own(monkeypatch):
    """Graphs may be replayed beside each other and beside eager calls: no two launches in them share a counter."""
    monkeypatch.setattr(kept, "RESERVED", 8)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    reserve = kept._Reserve(DEVICE)
    monkeypatch.setitem(kept._reserves, DEVICE, reserve)
    taken = [kept._captured(DEVICE, number) for number in (3, 3, 3, 1)]
    inside = [reserve.zeros.data_ptr() <= t.data_ptr() < reserve.zeros.data_ptr() + 32 for t in taken]
    assert inside == [True, True, False, False], "used up: made in the graph, whose replays set them to zero"
    assert taken[1].data_ptr() == taken[0].data_ptr() + 12
    assert not any(t.any() for t in taken)


def test_a_capture_before_any_launch_makes_its_own(monkeypatch):
    """There is no reserve yet, and none may be made and waited for while a graph is captured."""
    monkeypatch.delitem(kept._reserves, DEVICE, raising=False)
    found = kept._captured(DEVICE, 3)
    assert found.shape == (3,)
    assert DEVICE not in kept._reserves

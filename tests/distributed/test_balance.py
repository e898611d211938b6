"""The collective of the global load-balance loss: which forwards take part, ranks that do other things, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from graphmoe_model.routing.loss import balance_loss
from graphmoe_model.routing.statistics import RoutingStatistics
from tests.distributed import balance_worker
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return launch(balance_worker.run_all, timeout=180)


def test_a_training_forward_takes_part_in_one_collective(ranks):
    """All layers and rounds together; nothing else communicates, so that one rank may do it alone."""
    once = ("with labels", "without labels", "the decoder alone", "scaled to 0")
    never = ("asking for the loss", "adapter disabled", "no gradients", "evaluation")
    expected = {**dict.fromkeys(once, 1), **dict.fromkeys(never, 0)}
    assert [rank["collectives"] for rank in ranks] == [expected] * 2


def test_one_rank_logs_and_evaluates_alone(ranks):
    """Neither hangs, and what rank 0 reads is the loss of all processes."""
    assert ranks[0]["one rank reads"] == pytest.approx(balance_worker.reading_of_one_process(), rel=1e-9)


def test_a_layer_that_one_rank_skips(ranks):
    """Its place in the collective stays: both ranks count it, by the tokens of the rank that ran it."""
    results = [rank["skipped by rank 1"] for rank in ranks]
    first, second = (own["statistics"] for own in results)
    assert [len(first), len(second)] == [2, 1]
    both = RoutingStatistics(*(a + b for a, b in zip(first[0], second[0], strict=True)))
    expected = 0.3 * (balance_loss(both) + balance_loss(first[1])) / 2
    for own in results:
        torch.testing.assert_close(own["loss"], expected)
        assert len(own["gradients"]) == 2
        assert all(gradient is not None and gradient.any() for gradient in own["gradients"].values())


def test_a_layer_that_no_rank_runs(ranks):
    """It does not count: the mean is over the layers that ran somewhere."""
    results = [rank["skipped by both"] for rank in ranks]
    first, second = (own["statistics"][0] for own in results)
    both = RoutingStatistics(*(a + b for a, b in zip(first, second, strict=True)))
    for own in results:
        torch.testing.assert_close(own["loss"], 0.3 * balance_loss(both))


def test_no_router_runs_anywhere(ranks):
    """A scaling of 0 leaves the base model: its loss, and no division by a number of routers that is 0."""
    for rank in ranks:
        scaled, plain = rank["scaled to zero"]
        assert scaled == plain


def test_join_is_refused(ranks):
    """A process without batches would never come to the collective; where DDP raises first, nothing is in the way."""
    for rank in ranks:
        assert re.match(r"router_aux_loss_scope='global' does not work inside of Distribut.*\.join\(\)", rank["join"])
        assert "pass throw_on_early_termination=True, or set router_aux_loss_scope='local'" in rank["join"]
        assert rank["join that throws"] == ""


def test_a_checkpoint_around_the_whole_model(ranks):
    """The hooks and their collective run again in the backward pass, on all ranks."""
    plain, checkpointed = ranks[0]["whole model checkpointed"]
    torch.testing.assert_close(checkpointed, plain)


def test_a_layer_of_its_own(ranks):
    """Without a model and its hooks, each forward of the layer takes part; the ranks have 5 and 11 tokens."""
    expected = balance_worker.layer_of_its_own(None)
    assert all(gradient.any() for gradient in expected.values())
    for rank in ranks:
        torch.testing.assert_close(rank["a layer of its own"], expected)

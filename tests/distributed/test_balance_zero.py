"""DeepSpeed averages gradients as DDP does: with the global load-balance loss two processes are one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed import balance_zero_worker
from tests.distributed.balance_zero_worker import start
from tests.distributed.ddp_worker import STEPS, all_items, joined, rank_batches
from tests.distributed.launch import launch
from tests.model.method_models import trained_parameters

pytestmark = pytest.mark.distributed

CASES = [("global", 1), ("global", 2), ("local", 2)]


def alone() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after two steps of SGD over the global batches in one process."""
    scenario, model = start("global")
    parameters = trained_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for step in range(STEPS):
        batch = joined([batch for rank in (0, 1) for batch in rank_batches(scenario, step, rank)])
        model(**batch, num_items_in_batch=all_items(scenario, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, {name: p.detach() for name, p in parameters.items()}


def test_two_processes_are_one():
    """ZeRO-1 and ZeRO-2, ragged ranks: the routers' steps are those of one process; with "local" they are not."""
    pytest.importorskip("deepspeed")
    ranks = launch(balance_zero_worker.run_all, CASES, timeout=200, environment={"DS_ACCELERATOR": "cpu"})
    before, expected = alone()
    off = [
        max(
            float((found[name] - expected[name]).norm() / (expected[name] - before[name]).norm())
            for name in expected
            if "router" in name.split(".")
        )
        for found in ranks[0]
    ]
    assert max(off[:2]) < 1e-4, off  # of a step, in fp32
    assert off[2] > 1e-2, off

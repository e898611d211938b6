"""DeepSpeed's data parallelism with the global load-balance loss: run by test_balance_zero.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn

from tests.distributed.ddp_worker import STEPS, Scenario, all_items, model_of, rank_batches
from tests.model.method_models import trained_parameters


def start(scope: str) -> tuple[Scenario, nn.Module]:
    """What trains, in fp32, which DeepSpeed takes; one way of computing rounds, whatever a rank's tokens are."""
    scenario = Scenario(options={"router_aux_loss_coef": 0.3, "router_aux_loss_scope": scope, "fold": "never"})
    return scenario, model_of(scenario).float()


def train(scope: str, stage: int) -> dict[str, Tensor]:
    """This rank's parameters after two steps of SGD under ZeRO."""
    import deepspeed

    scenario, model = start(scope)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
    }
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
    # gloo does: DeepSpeed would compile collectives of its own for CPUs
    with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        (batch,) = rank_batches(scenario, step, distributed.get_rank())
        loss = engine(**batch, num_items_in_batch=all_items(scenario, step)).loss * distributed.get_world_size()
        engine.backward(loss)
        engine.step()
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def run_all(cases: list[tuple[str, int]]) -> list[dict[str, Tensor]]:
    """Every case, in one pair of processes."""
    return [train(scope, stage) for scope, stage in cases]

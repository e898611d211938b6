"""Two processes against one: the global load-balance loss, and DDP's options, in fp64 on ragged batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import ddp_worker
from tests.distributed.ddp_worker import Result, Scenario, alone
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

BOUND = 1e-6  # the models are fp64, Transformers' loss and its weight by items are fp32
GLOBAL = {"router_aux_loss_coef": 0.3, "router_aux_loss_scope": "global"}
LOCAL = {"router_aux_loss_coef": 0.3, "router_aux_loss_scope": "local"}
SWITCH = {"router_aux_loss": "switch"}
MANY = {"num_experts": 32}  # some of them chosen by no token of a rank

# One process must take the same global micro-batches to the same place.
AS_ONE = {
    "mixlora": Scenario("mixlora", GLOBAL),
    "mixlora, switch": Scenario("mixlora", {**GLOBAL, **SWITCH}),
    "graphmoe-mixlora": Scenario("graphmoe-mixlora", GLOBAL),
    "graphmoe-mixdora, SGD": Scenario("graphmoe-mixdora", GLOBAL, optimizer="SGD"),
    "mola": Scenario("mola", GLOBAL),
    "graphmoe-moda": Scenario("graphmoe-moda", {**GLOBAL, **SWITCH}),
    "by hand": Scenario("graphmoe-mixlora", GLOBAL, loss="by hand"),
    "checkpointing": Scenario("graphmoe-mixlora", GLOBAL, checkpointing=True),
    "checkpointing, mola": Scenario("graphmoe-mola", GLOBAL, checkpointing=True, loss="by hand"),
    "accumulation": Scenario("graphmoe-mixlora", GLOBAL, accumulation=2),
    "accumulation by hand": Scenario("mixlora", GLOBAL, accumulation=2, loss="by hand"),
    "no padding": Scenario("graphmoe-mixlora", GLOBAL, full_rows=True),
    "experts that nobody chose": Scenario("graphmoe-mixlora", {**GLOBAL, **MANY}),
    "compiled": Scenario("mixlora", GLOBAL, compiled=True, full_rows=True, layers=1),
    "FSDP2": Scenario("graphmoe-mixlora", GLOBAL, sharded=True),
    "loramoe": Scenario("graphmoe-loramoe"),
    "lora": Scenario("lora"),
}
# The loss of each process's own tokens is another one; each of these is the one of AS_ONE but for the scope.
NOT_AS_ONE = {
    name: Scenario(**{**vars(AS_ONE[name]), "options": {**AS_ONE[name].options, **LOCAL}})
    for name in ("mixlora", "graphmoe-mixlora", "mola", "by hand", "checkpointing", "no padding")
}
# DDP's options change nothing: the default scope is accumulation of the ranks' micro-batches in one process.
ACCUMULATED = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "all three": {"find_unused_parameters": True, "static_graph": True, "gradient_as_bucket_view": True},
}
DDP = {name: Scenario("graphmoe-mixlora", {**LOCAL, **MANY}, ddp=options) for name, options in ACCUMULATED.items()}
DDP |= {
    f"{name}, checkpointing": Scenario("graphmoe-mixlora", {**LOCAL, **MANY}, ddp=ACCUMULATED[name], checkpointing=True)
    for name in ("plain", "all three")
}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Result]]:
    scenarios = {
        **{f"global: {name}": s for name, s in AS_ONE.items()},
        **{f"local: {name}": s for name, s in NOT_AS_ONE.items()},
        **{f"DDP: {name}": s for name, s in DDP.items()},
    }
    return launch(ddp_worker.run_all, scenarios, timeout=300)


def difference(found: Any, expected: Any) -> float:
    """The largest |a - b| / |b| of two collections of tensors, zeros compared with the largest of all."""
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(float(value.norm()) for value in expected.values())
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=floor)) for n in expected)


def differences(ranks: list[Result], expected: Result) -> dict[str, float]:
    """Of the loss (its mean over ranks, as DDP's gradients are), every step's gradients, and the parameters."""
    for own in ranks[1:]:
        assert difference(own.parameters, ranks[0].parameters) == 0, "the ranks have drifted apart"
    losses = [torch.stack(own).mean() for own in zip(*(rank.losses for rank in ranks), strict=True)]
    return {
        "loss": max(float((a - b).abs() / b.abs()) for a, b in zip(losses, expected.losses, strict=True)),
        "gradients": max(map(difference, ranks[0].gradients, expected.gradients)),
        "parameters": difference(ranks[0].parameters, expected.parameters),
    }


def routers(gradients: dict[str, Tensor]) -> list[Tensor]:
    return [gradient for name, gradient in gradients.items() if "router" in name.split(".")]


@pytest.mark.parametrize("name", AS_ONE)
def test_the_global_loss_is_that_of_one_process(ranks, name):
    """Loss, gradients and parameters of two steps: ranks with other numbers of rows, tokens and labels."""
    expected = alone(AS_ONE[name])
    found = differences([rank[f"global: {name}"] for rank in ranks], expected)
    assert max(found.values()) < BOUND, found
    assert all(gradient.any() for gradient in routers(expected.gradients[0]))


@pytest.mark.parametrize("name", NOT_AS_ONE)
def test_the_local_loss_is_not(ranks, name):
    """The comparison above can fail: with the default scope the same runs end elsewhere."""
    found = differences([rank[f"local: {name}"] for rank in ranks], alone(NOT_AS_ONE[name]))
    assert found["gradients"] > 1e-4, found
    assert found["loss"] > 1e-5, found


@pytest.mark.parametrize("name", DDP)
def test_ddp_is_accumulation_of_the_ranks_micro_batches(ranks, name):
    """With every option of DDP's that changes how gradients are found, and experts that nobody chose."""
    results = [rank[f"DDP: {name}"] for rank in ranks]
    assert all((counts == 0).any() for own in results for counts in own.counts.values())
    found = differences(results, alone(DDP[name], joined_batches=False))
    assert max(found.values()) < BOUND, found

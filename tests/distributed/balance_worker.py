"""What takes part in the collective of the global load-balance loss, and what does not: run by test_balance.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from graphmoe_model import FusedGraphMoEFFN, router_loss
from tests.distributed.ddp_worker import Scenario, joined, micro_batch, model_of
from tests.model.method_models import trained_parameters
from tests.model.method_oracles import small_ffn
from tests.model.router_losses import records

GLOBAL = {"router_aux_loss_coef": 0.3, "router_aux_loss_scope": "global"}


@contextlib.contextmanager
def counted() -> Iterator[mock.Mock]:
    """Count this package's collectives; DDP's own are not made by Python."""
    with mock.patch("torch.distributed.all_reduce", wraps=distributed.all_reduce) as calls:
        yield calls


def model(form: str = "graphmoe-mixlora", **options: Any) -> nn.Module:
    return model_of(Scenario(form, {**GLOBAL, **options}))


def batch() -> dict[str, Tensor]:
    return micro_batch(0, 0, distributed.get_rank())


def collectives() -> dict[str, int]:
    """How many there are in each kind of forward."""
    adapted, inputs = model(), batch()
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    found = {}

    def count(name: str, run: Any, **kwargs: Any) -> None:
        with counted() as calls:
            run(**kwargs)
        found[name] = calls.call_count

    def disabled(**kwargs: Any) -> None:
        with adapted.disable_adapter():
            adapted(**kwargs)

    count("with labels", adapted, **inputs)
    count("without labels", adapted, **unlabelled)
    count("asking for the loss", lambda: router_loss(adapted))
    count("the decoder alone", adapted.get_base_model().model, **{k: unlabelled[k] for k in ("input_ids",)})
    count("adapter disabled", disabled, **inputs)
    with rescale_adapter_scale(adapted, 0.0):
        count("scaled to 0", adapted, **inputs)
    with torch.no_grad():
        count("no gradients", adapted, **inputs)
        count("evaluation", adapted.eval(), **inputs)
    return found


def one_rank_reads() -> float:
    """Rank 0 logs, evaluates and generates while rank 1 goes on to the next step: nobody waits for anybody."""
    adapted, inputs = model(), batch()
    adapted(**inputs).loss.backward()
    reading = 0.0
    if distributed.get_rank() == 0:
        with torch.no_grad():
            reading = router_loss(adapted).item()
            adapted(**inputs)
            adapted.eval()(**inputs)
            adapted.generate(input_ids=inputs["input_ids"], max_new_tokens=2, do_sample=False)
        adapted.train()
    adapted(**inputs).loss.backward()
    return reading


def skipped_layer(skipping: list[int]) -> dict[str, Any]:
    """The ranks that are named leave the second decoder layer out."""
    adapted, inputs = model(), batch()
    if distributed.get_rank() in skipping:
        adapted.config.num_hidden_layers = 1
    forward = DistributedDataParallel(adapted, find_unused_parameters=True)
    forward(**inputs).loss.backward()
    with torch.no_grad():
        loss = router_loss(adapted)
    gradients = {name: p.grad for name, p in trained_parameters(adapted).items() if "router" in name}
    return {"loss": loss, "statistics": [record.statistics() for record in records(adapted)], "gradients": gradients}


def scaled_to_zero() -> list[float]:
    """Losses with and without the adapter, which is scaled away: no router ran on any process."""
    adapted, inputs = model(), batch()
    with rescale_adapter_scale(adapted, 0.0):
        scaled = adapted(**inputs).loss.item()
    with adapted.disable_adapter():
        return [scaled, adapted(**inputs).loss.item()]


def join(throw: bool) -> str:
    """Two steps inside of DDP's join(), whose error is returned; the ranks have equally many batches."""
    forward = DistributedDataParallel(model())
    try:
        with forward.join(throw_on_early_termination=throw):
            for _ in range(2):
                forward(**batch()).loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def averaged(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The mean of the ranks' gradients, as data parallelism makes it."""
    found = {}
    for name, parameter in parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        distributed.all_reduce(found[name])
        found[name] /= distributed.get_world_size()
    return found


def whole_model_checkpointed() -> list[dict[str, Tensor]]:
    """Gradients without and with a checkpoint around the model and its hooks, which run again in the backward pass."""
    results = []
    for checkpointing in (False, True):
        adapted, inputs = model(), batch()

        def run(adapted: nn.Module = adapted, inputs: dict[str, Tensor] = inputs) -> Tensor:
            return adapted(**inputs).loss

        loss = checkpoint(run, use_reentrant=False) if checkpointing else run()
        loss.backward()
        results.append(averaged(trained_parameters(adapted)))
    return results


def layer_of_its_own(rank: int | None) -> dict[str, Tensor]:
    """Gradients of a single layer's router loss, of a rank's 5 or 11 tokens, or of all of them in one process."""
    torch.manual_seed(3)
    layer: FusedGraphMoEFFN = small_ffn("graphmoe-mixlora", **GLOBAL)
    x = torch.randn(16, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layer(x if rank is None else (x[:5], x[5:])[rank])
    router_loss(layer).backward()
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad and "router" in name}
    return averaged(parameters) if rank is not None else {name: p.grad for name, p in parameters.items()}


def run_all() -> dict[str, Any]:
    """Everything above, in one pair of processes."""
    return {
        "collectives": collectives(),
        "one rank reads": one_rank_reads(),
        "skipped by rank 1": skipped_layer([1]),
        "skipped by both": skipped_layer([0, 1]),
        "scaled to zero": scaled_to_zero(),
        "join": join(throw=False),
        "join that throws": join(throw=True),
        "whole model checkpointed": whole_model_checkpointed(),
        "a layer of its own": layer_of_its_own(distributed.get_rank()),
    }


def reading_of_one_process() -> float:
    """What rank 0 read in `one_rank_reads`, by one process with both ranks' batches."""
    adapted = model()
    adapted(**joined([micro_batch(0, 0, rank) for rank in (0, 1)]))
    with torch.no_grad():
        return router_loss(adapted).item()

"""router_aux_loss_scope="global" without processes: the sums, their gradient, their places, and what is refused.

tests/distributed has the same at two processes, under DDP, FSDP2 and trainers.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from graphmoe_model import router_loss
from tests.model.checkpointing import checkpoint_activations
from tests.model.host_sync import no_host_sync
from tests.model.processes import over_processes
from tests.model.router_losses import IDS, LEFT_PADDED, ffn_layers, records
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model

ROWS = (slice(0, 3), slice(3, 4))  # of each process: 3 rows with 31 real tokens, 1 row with 5
KINDS = [
    {"router_aux_loss": "paper"},
    {"router_aux_loss": "switch"},
    {"method": "mola", "rounds": 1},
]


def scoped(**options: object) -> PeftModel:
    settings = {"router_aux_loss_coef": 0.5, "router_aux_loss_scope": "global", "rounds": 2, **options}
    return tiny_peft_model(init_lora_weights=False, **settings).double().train()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def mean(trees: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tree[name] for tree in trees]).mean(0) for name in trees[0]}


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_processes_with_other_numbers_of_tokens_are_one(options):
    """Every process has the value of one process with all rows; the mean of their gradients is its gradient."""
    model = scoped(**options)

    def run(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        model(input_ids=IDS[rows], attention_mask=LEFT_PADDED[rows])
        loss = router_loss(model)
        return loss.detach(), gradients(loss, model)

    results, collectives = over_processes([lambda rows=rows: run(rows) for rows in ROWS])
    loss, expected = run(slice(None))
    assert collectives == 1
    for value, _ in results:
        torch.testing.assert_close(value, loss)
    torch.testing.assert_close(mean([own for _, own in results]), expected)
    assert all(gradient.any() for name, gradient in expected.items() if "router" in name)


@pytest.mark.parametrize("kept", [[23, 9], [32, 0]], ids=["other numbers of labels", "no label on one process"])
def test_the_weight_is_that_of_all_processes(kept):
    """Under Trainer a process's share of the labels weights its loss; the router loss's gradient may not follow it."""
    model, items = scoped(), torch.tensor(sum(kept))

    def run(rows: slice, labels: Tensor) -> dict[str, Tensor]:
        inputs = {"input_ids": IDS[rows], "attention_mask": LEFT_PADDED[rows], "labels": labels}
        loss = model(**inputs, num_items_in_batch=items).loss
        return {"loss": loss.detach(), **gradients(loss, model)}

    counted = torch.zeros(4, 11, dtype=torch.bool)  # positions that are predicted
    counted[:3].view(-1)[: kept[0]] = True
    counted[3, : kept[1]] = True
    labels = IDS.clone()
    labels[:, 1:].masked_fill_(~counted, -100)
    results, _ = over_processes([lambda rows=rows: run(rows, labels[rows]) for rows in ROWS])
    expected = run(slice(None), labels)
    totals = {name: 2 * value for name, value in mean(results).items()}  # Trainer's factor for what is averaged
    torch.testing.assert_close(totals, expected, rtol=1e-5, atol=1e-8)


def test_a_process_whose_tokens_are_all_padding():
    """It adds nothing, and gets the others' loss."""
    model = scoped()

    def run(mask: Tensor) -> Tensor:
        model(input_ids=IDS, attention_mask=mask)
        return router_loss(model).detach()

    masks = [LEFT_PADDED, torch.zeros_like(LEFT_PADDED)]
    results, _ = over_processes([lambda mask=mask: run(mask) for mask in masks])
    assert results[0] == results[1]
    torch.testing.assert_close(results[0], run(LEFT_PADDED))


@pytest.mark.parametrize("scope, processes", [("local", 2), ("global", 1)])
def test_no_collective(scope, processes):
    """By default, and where there is one process: the loss is that of a model without a group, to the bit."""
    model = scoped(router_aux_loss_scope=scope)

    def loss() -> Tensor:
        return model(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS).loss.detach()

    results, collectives = over_processes([loss] * processes)
    assert collectives == 0
    assert torch.equal(results[0], loss())


def test_a_layer_that_runs_twice_in_a_forward():
    """Shared layers have a place for each run: two processes with the same rows are one process, by value."""
    model = scoped(layers_to_transform=[0])
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp

    def loss() -> Tensor:
        model(input_ids=IDS)
        assert len(records(model)) == 2
        return router_loss(model).detach()

    results, _ = over_processes([loss, loss])
    torch.testing.assert_close(results[0], loss())


def test_places_are_where_the_records_are():
    """What a layer says of its routers before it runs is what they record, in every method that has the loss."""
    for options in ({"rounds": 3}, {"method": "mola", "rounds": 2, "num_experts": [3, 5]}):
        model = scoped(**options)
        model(input_ids=IDS)
        for record in records(model):
            statistics = record.statistics()
            assert record.layer.router_shapes()[record.router] == tuple(statistics.tokens_per_expert.shape)
            assert tuple(statistics.probability_sums.shape) == tuple(statistics.tokens_per_expert.shape)
        routers = sum(len(layer.router_shapes()) for layer in model.modules() if hasattr(layer, "routing_context"))
        assert routers == len(records(model))


def test_the_sums_let_go_of_the_graph():
    """As the records do once the loss has it: what they kept would outlive a discarded loss."""
    model = scoped()

    def run() -> None:
        model(input_ids=IDS, labels=IDS)
        forward = ffn_layers(model)[0].routing_context.trained
        assert not any(own.probability_sums.requires_grad for own in forward.all_processes.statistics)

    over_processes([run, run])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_waits_for_a_gpu(checkpointing):
    """The vector is made and read on the device."""
    model = scoped()
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    items = torch.tensor(40)

    def run() -> None:
        with no_host_sync():
            inputs = {"input_ids": IDS, "attention_mask": LEFT_PADDED, "labels": IDS}
            model(**inputs, num_items_in_batch=items).loss.backward()

    over_processes([run, run])


def test_adapters_of_both_scopes_at_once_are_refused():
    """Two adapters active on different layers: a forward has one loss, of one scope."""
    model = scoped(layers_to_transform=[0])
    model.add_adapter(
        "other", tiny_config(router_aux_loss_coef=0.5, router_aux_loss_scope="local", layers_to_transform=[1])
    )
    ffn_layers(model)[1].set_adapter("other")  # the model's own set_adapter takes one name
    message = (
        r"active adapters 'other' \(router_aux_loss_scope='local'\) and 'default' \('global'\) differ in whose tokens "
        r".*give both the same router_aux_loss_scope"
    )
    with pytest.raises(ValueError, match=message):
        over_processes([lambda: model(input_ids=IDS)] * 2)


def test_the_scope_is_saved_and_loaded(tmp_path):
    """It is part of adapter_config.json, and counts in a model that was loaded."""
    scoped().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).train()
    assert loaded.peft_config["default"].router_aux_loss_scope == "global"
    _, collectives = over_processes([lambda: loaded(input_ids=IDS, labels=IDS)] * 2)
    assert collectives == 1

"""The router loss against Eq. 8 written out, value and gradient, with padding left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphmoe_kernels import topk_softmax_routing
from graphmoe_model import router_loss
from graphmoe_model.routing.loss import balance_loss
from graphmoe_model.routing.statistics import RoutingStatistics
from tests.model.router_losses import IDS, LEFT_PADDED, RIGHT_PADDED, ffn_layers, language_loss, records
from tests.model.tiny_models import tiny_peft_model, tokens


def literal_eq8(logits: Tensor, kept: Tensor, top_k: int, form: str) -> Tensor:
    """Eq. 8 word for word, token by token: logits [N, n], kept [N] bool."""
    n = logits.shape[1]
    chosen, probability, tokens_kept = [0] * n, [torch.zeros(())] * n, 0
    for row, keep in zip(logits, kept, strict=True):
        if not keep:
            continue
        tokens_kept += 1
        p = row.exp() / row.exp().sum()
        best = sorted(range(n), key=lambda i: -p[i].item())[:top_k]
        for i in range(n):
            chosen[i] += i in best
            if form == "switch" or i in best:
                probability[i] = probability[i] + p[i]
    return n * sum(chosen[i] / (top_k * tokens_kept) * probability[i] / tokens_kept for i in range(n))


# --- value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "switch"])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED, RIGHT_PADDED], ids=["unpadded", "left", "right"])
def test_loss_and_router_gradient_follow_eq8(form, mask):
    """outputs.loss grows by coef * Eq. 8, and the router's gradient by Eq. 8's, padding left out."""
    model = tiny_peft_model(rounds=1, num_experts=5, router_aux_loss=form, router_aux_loss_coef=0.5).train()
    layers = ffn_layers(model)
    inputs = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outputs = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    routers = [layer.lora_graphmoe["default"].router.weight for layer in layers]
    actual = torch.autograd.grad(outputs.loss, routers, retain_graph=True)

    kept = torch.ones(IDS.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()
    logits = [x.flatten(0, 1) @ router.T for x, router in zip(inputs, routers, strict=True)]
    expected = 0.5 * torch.stack([literal_eq8(row, kept, 2, form) for row in logits]).mean()
    plain = language_loss(model, input_ids=IDS, attention_mask=mask, labels=IDS)
    gradients = torch.autograd.grad(plain + expected, routers)

    torch.testing.assert_close(outputs.loss, plain + expected)
    for a, e in zip(actual, gradients, strict=True):
        assert e.abs().max() > 1e-4, "a gradient of zero would compare nothing"
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-7)


def test_loss_is_a_mean_over_rounds_and_layers():
    """More rounds and layers must not make the loss larger, or the coefficient would mean something else each time."""
    one, three = (tiny_peft_model(rounds=rounds).train() for rounds in (1, 3))
    for a, b in zip(ffn_layers(one), ffn_layers(three), strict=True):
        b.lora_graphmoe["default"].router.load_state_dict(a.lora_graphmoe["default"].router.state_dict())
    with torch.no_grad():
        one(input_ids=IDS)
        three(input_ids=IDS)  # a fresh adapter: every round routes alike
        losses = torch.stack([balance_loss(record.statistics()) for record in records(one)])
        torch.testing.assert_close(router_loss(one), 0.01 * losses.mean())
        torch.testing.assert_close(router_loss(three), router_loss(one))


@pytest.mark.parametrize("form", ["topk", "full"])
def test_balanced_routing_has_the_documented_value(form):
    """Balance is 1 for the switch form and the chosen experts' mass for the paper's; imbalance costs more."""

    def loss(logits: Tensor) -> float:
        routing = topk_softmax_routing(logits, 2, statistics=form)
        assert routing.tokens_per_expert is not None
        assert routing.probability_sums is not None
        return balance_loss(
            RoutingStatistics(routing.tokens_per_expert[None], routing.probability_sums[None], torch.tensor(8))
        ).item()

    row = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    balanced = loss(torch.stack([row.roll(i) for i in range(8)]))
    mass = row.softmax(0)[:2].sum().item()
    assert balanced == pytest.approx(1.0 if form == "full" else mass, rel=1e-6)
    assert loss(row.expand(8, 8)) == pytest.approx(8 / 2 * mass, rel=1e-6)


def test_padded_tokens_do_not_count():
    """What stands in padding must not move the loss: pad tokens route to a few experts and would fake an imbalance."""
    model = tiny_peft_model().train()
    other = torch.where(LEFT_PADDED.bool(), IDS, tokens(4, 12, seed=9))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=LEFT_PADDED)
        loss = router_loss(model)
        assert records(model)[0].statistics().num_tokens == LEFT_PADDED.sum()
        model(input_ids=other, attention_mask=LEFT_PADDED)
        torch.testing.assert_close(router_loss(model), loss)


def test_batch_of_padding_alone_gives_zero():
    """A shard of a batch can be padding throughout: a loss of 0 / 0 would poison every weight."""
    model = tiny_peft_model().train()
    model(input_ids=IDS, attention_mask=torch.zeros_like(IDS))
    assert router_loss(model).item() == 0.0


@pytest.mark.parametrize("mask", ["4-D", None])
def test_without_a_2d_mask_every_token_counts(mask):
    """Packed sequences come with position ids or a 4-D mask; all their tokens are real."""
    model = tiny_peft_model().train()
    causal = torch.ones(4, 1, 12, 12, dtype=torch.bool).tril()
    model(input_ids=IDS, attention_mask=causal if mask else None, position_ids=torch.arange(12).expand(4, -1) % 5)
    assert records(model)[0].statistics().num_tokens == IDS.numel()
    router_loss(model)

"""The load-balance loss: value and gradient by Eq. 8, where it is added and where it is not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig

from graphmoe_kernels import topk_softmax_routing
from graphmoe_model import FusedGraphMoEFFN, collect_routing, router_loss
from graphmoe_model.router_loss import balance_loss
from graphmoe_model.routing_record import RoutingRecord
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model, tokens

IDS = tokens(4, 12)
LEFT_PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(2), 0)
LEFT_PADDED[3, :7] = 0
RIGHT_PADDED = LEFT_PADDED.flip(1)


def ffn_layers(model: nn.Module) -> list[FusedGraphMoEFFN]:
    return [module for module in model.modules() if isinstance(module, FusedGraphMoEFFN)]


def language_loss(model: nn.Module, **inputs: Tensor) -> Tensor:
    """The loss without the router's: the same training forward, with the coefficients at zero."""
    configs = [layer.lora_graphmoe["default"].config for layer in ffn_layers(model)]
    coefficients = [config.router_aux_loss_coef for config in configs]
    try:
        for config in configs:
            config.router_aux_loss_coef = 0.0
        return model(**inputs).loss
    finally:
        for config, coefficient in zip(configs, coefficients, strict=True):
            config.router_aux_loss_coef = coefficient


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
        losses = torch.stack([balance_loss(layer.routing[""]) for layer in ffn_layers(one)])
        torch.testing.assert_close(router_loss(one), 0.01 * losses.mean())
        torch.testing.assert_close(router_loss(three), router_loss(one))


@pytest.mark.parametrize("form", ["topk", "full"])
def test_balanced_routing_has_the_documented_value(form):
    """Balance is 1 for the switch form and the chosen experts' mass for the paper's; imbalance costs more."""

    def loss(logits: Tensor) -> float:
        routing = topk_softmax_routing(logits, 2, statistics=form)
        assert routing.counts is not None
        assert routing.mass is not None
        return balance_loss(RoutingRecord(routing.counts[None], routing.mass[None], torch.tensor(8))).item()

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
        assert ffn_layers(model)[0].routing[""].tokens == LEFT_PADDED.sum()
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
    assert ffn_layers(model)[0].routing[""].tokens == IDS.numel()
    router_loss(model)


# --- where it is added -----------------------------------------------------------------------------------------------


def test_by_hand_without_labels_equals_with_labels():
    """The two documented loops must train alike."""
    model = tiny_peft_model().train()
    router = ffn_layers(model)[0].lora_graphmoe["default"].router.weight
    with_labels = model(input_ids=IDS, labels=IDS).loss
    (expected,) = torch.autograd.grad(with_labels, router)
    logits = model(input_ids=IDS).logits
    language = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss = language + router_loss(model)
    torch.testing.assert_close(loss, with_labels)
    torch.testing.assert_close(torch.autograd.grad(loss, router)[0], expected)


def test_adding_it_twice_is_refused():
    """With labels it is in outputs.loss; the reading under no_grad stays allowed, for logs."""
    model = tiny_peft_model().train()
    loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match=r"outputs\.loss contains the router loss already"):
        router_loss(model)
    with torch.no_grad():
        reading = router_loss(model)
        torch.testing.assert_close(loss - language_loss(model, input_ids=IDS, labels=IDS), reading, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", ["positional", "tuple"])
def test_every_form_of_call_gets_it(form):
    """Arguments by position and outputs as a tuple are two ways past a hook that looks for names only."""
    model = tiny_peft_model().train()
    expected = model(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS).loss
    if form == "tuple":
        loss = model(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS, return_dict=False)[0]
    else:
        loss = model.get_base_model()(IDS, LEFT_PADDED, None, None, None, IDS).loss
    torch.testing.assert_close(loss, expected)


def test_share_of_the_batch_weights_it():
    """num_items_in_batch: the micro-batches' router losses must add up to one, whatever their label counts."""
    model = tiny_peft_model().train()
    labels = IDS.clone()
    labels[:2] = -100
    items = torch.tensor(44)  # 4 * 11, of which this forward holds 22
    inputs = {"input_ids": IDS, "labels": labels, "num_items_in_batch": items}
    loss = model(**inputs).loss
    with torch.no_grad():
        reading = router_loss(model)
        torch.testing.assert_close(loss, language_loss(model, **inputs) + 0.5 * reading)


def test_evaluation_loss_is_the_language_loss():
    """Evaluation compares models: a training penalty in it would count balance as perplexity."""
    model = tiny_peft_model()
    plain = tiny_model()(input_ids=IDS, labels=IDS).loss  # a fresh adapter changes nothing
    torch.testing.assert_close(model.eval()(input_ids=IDS, labels=IDS).loss, plain)
    assert ffn_layers(model)[0].routing == {}


def test_coefficient_zero_computes_nothing():
    """0 is off: no statistics, no loss, and a hand-written sum still works."""
    model = tiny_peft_model(router_aux_loss_coef=0.0).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, tiny_model()(input_ids=IDS, labels=IDS).loss)
    assert ffn_layers(model)[0].routing == {}
    assert router_loss(model).item() == 0.0
    assert not hasattr(model.config, "router_aux_loss_coef")


def test_disabled_adapter_leaves_no_stale_loss():
    """The record of the forward before must not be added to a forward that routed nothing."""
    model = tiny_peft_model().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with model.disable_adapter():
        loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, tiny_model()(input_ids=IDS, labels=IDS).loss)


def test_skipped_layer_leaves_no_stale_loss():
    """Models that drop layers in training: the loss is that of the layers that ran."""
    model = tiny_peft_model().train()
    model(input_ids=IDS, labels=IDS)
    model.config.num_hidden_layers = 1  # Llama runs as many of its layers
    model(input_ids=IDS)
    ran, skipped = ffn_layers(model)
    assert skipped.routing == {}
    torch.testing.assert_close(router_loss(model), 0.01 * balance_loss(ran.routing[""]))


def test_model_loaded_by_transformers_has_it(tmp_path):
    """Transformers' own adapter loader drops the tuner object, so the loss must not depend on its forward."""
    saved = tiny_peft_model()
    saved.save_pretrained(tmp_path)
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path))
    inputs = {"input_ids": IDS, "attention_mask": LEFT_PADDED, "labels": IDS}
    torch.testing.assert_close(loaded.train()(**inputs).loss, saved.train()(**inputs).loss)


def test_second_adapter_is_used_when_active():
    """The coefficient is the active adapter's, and all layers stay in one context."""
    model = tiny_peft_model().train()
    model.add_adapter("other", tiny_config(router_aux_loss_coef=0.0))
    first = model(input_ids=IDS, labels=IDS).loss
    model.set_adapter("other")
    assert model(input_ids=IDS, labels=IDS).loss < first
    assert len({id(layer.routing_context) for layer in ffn_layers(model)}) == 1


def test_unload_leaves_the_base_model_clean():
    """A leftover hook or configuration field would make later trainers take the base for a mixture of experts."""
    base = tiny_model()
    fields = set(vars(base.config))
    model = get_peft_model(base, tiny_config())
    assert model.config.output_router_logits
    unloaded = model.unload()
    assert set(vars(unloaded.config)) == fields
    assert not unloaded._forward_hooks
    assert not unloaded._forward_pre_hooks


def test_copy_after_a_forward_has_its_own_hooks():
    """Reference models are made by deepcopy, also in mid-training; the copy must not write into the original."""
    model = tiny_peft_model().train()
    model(input_ids=IDS)
    router_loss(model)
    twin = copy.deepcopy(model)
    context, own = ffn_layers(twin)[0].routing_context, ffn_layers(model)[0].routing_context
    assert context is not own
    torch.testing.assert_close(twin(input_ids=IDS, labels=IDS).loss, model(input_ids=IDS, labels=IDS).loss)


def test_base_model_with_routers_of_its_own_is_refused():
    """Two router losses under one configuration field cannot be told apart."""
    config = AutoConfig.for_model("llama")
    kind = type("RoutedConfig", (type(config),), {"output_router_logits": False})
    model = tiny_model()
    model.config.__class__ = kind
    with pytest.raises(ValueError, match="router loss of its own"):
        get_peft_model(model, tiny_config())


# --- what would lose it ----------------------------------------------------------------------------------------------


def test_unused_loss_is_reported():
    """A training loop without labels that forgets the router loss is told, one that adds it is not."""
    model = tiny_peft_model().train()
    model(input_ids=IDS)
    with pytest.warns(UserWarning, match="got no labels"):
        model(input_ids=IDS)
    router_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, labels=IDS)


def checkpointed(use_reentrant: bool, model_type: str = "llama", **overrides: object) -> nn.Module:
    model = tiny_peft_model(model_type, init_lora_weights=False, lora_dropout=0.1, **overrides).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


@pytest.mark.parametrize("labels", [IDS, None], ids=["in outputs.loss", "by hand"])
def test_reentrant_checkpointing_is_refused(labels):
    """It runs the layers without a graph, so the router loss would silently have no gradient."""
    model = checkpointed(use_reentrant=True)

    def loss() -> Tensor:
        outputs = model(input_ids=IDS, labels=labels)
        return router_loss(model) if labels is None else outputs.loss

    with pytest.raises(RuntimeError, match=r"use_reentrant.: False"):
        loss()


def test_reentrant_checkpointing_works_without_the_loss():
    """The error names two ways out; this is the second."""
    model = checkpointed(use_reentrant=True, router_aux_loss_coef=0.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "router.weight" in n)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_checkpointing_changes_no_gradient_and_no_count(model_type):
    """The second forward sees the same padding, is not counted, and leaves no activations behind on the layer.

    In Llama it stops before the MLP is done, in Gemma 2 a norm behind the MLP makes it go on.
    """
    results = []
    plain = tiny_peft_model(model_type, init_lora_weights=False, lora_dropout=0.1).train()
    for model in (plain, checkpointed(use_reentrant=False, model_type=model_type)):
        torch.manual_seed(1)
        with collect_routing(model) as routing:
            model(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((gradients, routing.counts))
        assert not ffn_layers(model)[0].routing[""].mass.requires_grad
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-8)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_router_loss_needs_a_layer_and_a_training_forward():
    with pytest.raises(TypeError, match="no GraphMoE layer in this LlamaForCausalLM"):
        router_loss(tiny_model())
    model = tiny_peft_model()
    with pytest.raises(RuntimeError, match="training mode"):
        router_loss(model)
    model.eval()(input_ids=IDS)
    with pytest.raises(RuntimeError, match="training mode"):
        router_loss(model)


def test_single_layer_by_hand():
    """FusedGraphMoEFFN without PEFT: the layer's own record, all tokens counted."""
    layer = FusedGraphMoEFFN(tiny_model().model.layers[0].mlp, tiny_config()).train()
    x = torch.randn(2, 3, 32)
    layer(x)
    router_loss(layer).backward()
    assert layer.lora_graphmoe["default"].router.weight.grad.abs().max() > 0

"""Where the router loss is added to a model's loss, and what would lose it without a word."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from graphmoe_model import FusedGraphMoEFFN, collect_routing, router_loss
from graphmoe_model.routing.loss import balance_loss
from tests.model.attaching import adapted, attach, refuse
from tests.model.checkpointing import checkpoint_activations
from tests.model.router_losses import IDS, LEFT_PADDED, ffn_layers, language_loss, records
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model

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
    assert records(model) == []


def test_coefficient_zero_computes_nothing():
    """0 is off: no record, no loss, and a hand-written sum still works."""
    model = tiny_peft_model(router_aux_loss_coef=0.0).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, tiny_model()(input_ids=IDS, labels=IDS).loss)
    assert records(model) == []
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
    (ran,) = records(model)
    torch.testing.assert_close(router_loss(model), 0.01 * balance_loss(ran.statistics()))


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


def test_a_base_model_with_a_router_loss_of_its_own_is_refused():
    """Two router losses under one configuration field cannot be told apart; the error says how to do without one."""

    def base() -> nn.Module:
        sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return tiny_model("qwen3_moe", mlp_only_layers=[0], **sparse)

    refuse(base(), ValueError, "router loss of its own.*set router_aux_loss_coef=0", layers_to_transform=[0])
    ffns, _ = adapted(attach(base(), layers_to_transform=[0], router_aux_loss_coef=0.0))
    assert ffns == {"model.layers.0.mlp"}


# --- what would lose it ----------------------------------------------------------------------------------------------


def test_unused_loss_is_reported():
    """A training loop without labels that forgets the router loss is told, one that adds it is not."""
    model = tiny_peft_model().train()
    model(input_ids=IDS)
    with pytest.warns(UserWarning, match="got no labels"):
        model(input_ids=IDS)
    router_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=IDS, labels=IDS)


def checkpointed(use_reentrant: bool, model_type: str = "llama", **overrides: object) -> nn.Module:
    model = tiny_peft_model(model_type, init_lora_weights=False, lora_dropout=0.1, **overrides).train()
    model.enable_input_require_grads()
    checkpoint_activations(model, use_reentrant=use_reentrant)
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
        assert not any(logits.requires_grad for record in records(model) for logits in record.logits)
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

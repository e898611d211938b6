"""Activation checkpointing runs layers again in the backward pass: in another state it must raise, never differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from tests.model.checkpointing import checkpoint_activations, keep_activations
from tests.model.router_losses import IDS, LEFT_PADDED, ffn_layers, records
from tests.model.tiny_models import tiny_config, tiny_peft_model


def checkpointed(**options) -> PeftModel:
    """Two adapters of the same shapes, so that no shape betrays which of them ran."""
    model = tiny_peft_model(init_lora_weights=False, target_modules=["mlp"], **options).train()
    model.add_adapter("other", tiny_config(init_lora_weights=False, target_modules=["mlp"], **options))
    checkpoint_activations(model)
    model.enable_input_require_grads()
    return model


def activate_other(model: PeftModel) -> None:
    model.set_adapter("other")


def disable(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


CHANGES = [
    (activate_other, {}, r"ran with the adapter 'default' active, its backward pass with the adapter 'other' active"),
    (disable, {}, r"ran with the adapter 'default' active, its backward pass with adapters disabled"),
    (PeftModel.eval, {"lora_dropout": 0.5}, r"ran with dropout 0\.5, its backward pass with 0\.0.*model\.eval\(\)"),
]


@pytest.mark.parametrize("change, options, message", CHANGES, ids=["other adapter", "disabled", "dropout off"])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_backward_in_another_state_is_refused(
    change: Callable[[PeftModel], object], options: dict, message: str, coefficient: float
) -> None:
    """The gradients would be those of another computation: of the other adapter, and without a word."""
    model = checkpointed(router_aux_loss_coef=coefficient, **options)
    loss = model(input_ids=IDS, labels=IDS).loss
    change(model)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_backward_in_the_same_state_after_another_is_right() -> None:
    """What matters is the state when the layer runs again, not what happened in between."""
    model = checkpointed()
    gradients = []
    for disturb in (False, True):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        if disturb:
            activate_other(model)
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=IDS)
            model.set_adapter("default")
            model.eval().train()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_without_checkpointing_any_state_may_follow() -> None:
    """Nothing runs again then, so eval() between forward and backward is harmless, as with LoRA."""
    model = checkpointed(lora_dropout=0.5)
    keep_activations(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    model.eval()
    loss.backward()
    router = model.base_model.model.model.layers[0].mlp.lora_graphmoe["default"].router.weight
    assert router.grad.abs().max() > 0


def test_an_interrupted_forward_is_over() -> None:
    """Ctrl-C in a notebook calls no hook: the next call must not go on with the interrupted forward's padding."""
    model = tiny_peft_model().train()
    mlp = ffn_layers(model)[1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS)
    handle.remove()
    mlp(torch.randn(*IDS.shape, 32))
    (record,) = records(model)
    assert record.token_mask is None
    assert model(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS).loss.isfinite()
    assert len(records(model)) == 2
    assert records(model)[0].token_mask is not None

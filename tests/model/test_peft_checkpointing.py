"""Activation checkpointing recomputes the layers, and changes no gradient."""

import pytest
import torch
from peft import PeftModel

from tests.model.checkpointing import checkpoint_activations
from tests.model.tiny_models import tiny_peft_model, tokens


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Of every trainable parameter, from the same seed (for the dropout)."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_those_without_checkpointing(use_reentrant, fold, dropout):
    """Both kinds. Reentrant checkpointing cannot carry the router loss, which says so itself: it is off there."""
    coefficient = 0.0 if use_reentrant else 0.1
    model = tiny_peft_model(init_lora_weights=False, fold=fold, lora_dropout=dropout, router_aux_loss_coef=coefficient)
    expected = gradients(model)
    assert all(gradient.any() for gradient in expected.values())
    checkpoint_activations(model, use_reentrant=use_reentrant)
    model.enable_input_require_grads()
    actual = gradients(model)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name

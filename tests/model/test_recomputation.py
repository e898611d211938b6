"""Activation checkpointing runs layers again in the backward pass: in another state it must raise, never differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from tests.model.checkpointing import checkpoint_activations, keep_activations
from tests.model.method_models import adapted, decoder_layers
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


# --- random numbers: dropout that is drawn anew in the second run ----------------------------------------------------


def wrapped(form: str = "graphmoe-mixlora", *, preserve: bool, impl: CheckpointImpl, **options) -> PeftModel:
    """A model with dropout whose decoder layers are wrapped as Accelerate wraps them for FSDP."""
    torch.manual_seed(0)
    model = adapted(form, **{"lora_dropout": 0.5, "router_aux_loss_coef": 0.0, "init_lora_weights": False, **options})
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(decoder_layers(model)):
        layers[index] = checkpoint_wrapper(layer, impl, preserve_rng_state=preserve)
    model.enable_input_require_grads()
    return model.train()


def gradients(model: PeftModel, seed: int = 3) -> list[Tensor]:
    """Of the loss under the dropout masks of a seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


IMPLEMENTATIONS = pytest.mark.parametrize("impl", CheckpointImpl, ids=["reentrant", "non-reentrant"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("form", ["graphmoe-mixlora", "mola", "lora"])
def test_other_dropout_masks_in_the_second_run_are_refused(form: str, impl: CheckpointImpl) -> None:
    """The gradients would be those of other masks than the loss had: Accelerate's wrapper keeps no random state."""
    model = wrapped(form, preserve=False, impl=impl)
    with pytest.raises(RuntimeError, match=r"other dropout masks: .*_rng_state=False.* gradient_checkpointing=True"):
        gradients(model)


@IMPLEMENTATIONS
def test_a_wrapper_that_keeps_the_random_state_is_right(impl: CheckpointImpl) -> None:
    """Gradients with dropout are those without checkpointing, several forwards before one backward included."""
    model = wrapped(preserve=True, impl=impl)
    plain = wrapped(preserve=True, impl=impl)
    layers = plain.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = layer._checkpoint_wrapped_module
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-6, atol=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [{"lora_dropout": 0.0}, {}], ids=["no dropout", "evaluation"])
def test_without_random_numbers_nothing_has_to_be_kept(options: dict, impl: CheckpointImpl) -> None:
    model = wrapped(preserve=False, impl=impl, **options)
    if not options:
        model.eval()
    assert all(gradient.isfinite().all() for gradient in gradients(model))


def test_the_base_mlps_own_dropout_is_refused_too() -> None:
    """Seed-OSS drops after its down projection; without LoRA dropout the masks are still others."""
    model = tiny_peft_model("seed_oss", lora_dropout=0.0, router_aux_loss_coef=0.0)
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(list(layers)):
        layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="other dropout masks"):
        gradients(model.train())


def test_a_forward_without_checkpointing_beside_one_with_it_is_right() -> None:
    """Both in one backward pass: the first is not run again, so it is not compared with what is."""
    model = tiny_peft_model(lora_dropout=0.5, target_modules=["mlp"]).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    checkpoint_activations(model)
    model.enable_input_require_grads()
    (loss + model(input_ids=IDS, labels=IDS).loss).backward()

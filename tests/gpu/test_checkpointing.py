"""Checkpointed training on a CUDA device, where the backward pass runs in autograd's own thread."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.gpu.layers import MARKS
from tests.model.checkpointing import checkpoint_activations
from tests.model.router_losses import IDS, LEFT_PADDED, RIGHT_PADDED
from tests.model.tiny_models import tiny_peft_model

pytestmark = MARKS


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forwards_before_a_backward_keep_their_padding(backend: str) -> None:
    """Two padded forwards and a reference pass before one backward: the gradients are those without checkpointing."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny_peft_model(init_lora_weights=False, router_aux_loss_coef=0.3, backend=backend).cuda().train()
        if checkpointed:
            model.enable_input_require_grads()
            checkpoint_activations(model)
        ids, left, right = (tensor.cuda() for tensor in (IDS, LEFT_PADDED, RIGHT_PADDED))
        loss = model(input_ids=ids, attention_mask=left, labels=ids).loss
        loss = loss + model(input_ids=ids, attention_mask=right, labels=ids).loss
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preserve", [False, True])
def test_dropout_masks_of_the_second_run_are_those_of_the_first_or_refused(preserve: bool) -> None:
    """The generator's seed and offset tell, which the host knows: nothing waits for the device."""
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = tiny_peft_model(init_lora_weights=False, lora_dropout=0.5, router_aux_loss_coef=0.0).cuda().train()
        model.enable_input_require_grads()
        layers = model.get_base_model().model.layers
        for index, layer in enumerate(list(layers) if wrapped else []):
            layers[index] = checkpoint_wrapper(layer, preserve_rng_state=preserve)
        ids = IDS.cuda()
        torch.manual_seed(1)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if wrapped and not preserve:
            with pytest.raises(RuntimeError, match="other dropout masks"):
                loss.backward()
            return
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)

"""How many bytes the activations of a training step take at most: read off the model's own code, run without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface

from graphmoe_model.memory.live_bytes import LiveBytes


class Activations(NamedTuple):
    """Bytes of a step's activations. Most live at one of two moments: in the loss, or in the last layer's backward.

    Attributes:
        layer: what one layer leaves until its backward pass; with checkpointing its input and its router logits.
        in_loss: what lives beside the layers' at the most, before the last layer's backward: mostly logits.
        in_layer: what lives beside the layers' at the most, from the last layer's backward on: one layer's own.
    """

    layer: int
    in_loss: int
    in_layer: int


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Compute attention as fused kernels do: with neither a mask [tokens, tokens] nor keys repeated for their queries.

    On tensors without data Transformers' own would make both, as it does for a graph that is to be kept.
    """
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


FUSED_ATTENTION = "graphmoe_memory"
AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
AttentionMaskInterface.register(FUSED_ATTENTION, lambda *_, **__: None)


def step_activations(
    build: Callable[[int], nn.Module], tokens: int, checkpointing: bool, loss_tokens: int
) -> Activations:
    """Measure the activations of one sequence of this many ``tokens`` through ``build(number of layers)``, in bytes.

    The model's forward, loss and backward run twice, with two layers and with three, on tensors that have shapes and no
    memory; more layers add what the third did. A parameter's gradient counts until it is complete: where it goes then
    is for the caller to count.

    Args:
        build: makes the model with its adapter on the meta device, in the dtype that it computes in.
        tokens: of the sequence.
        checkpointing: whether each layer is run again in the backward pass.
        loss_tokens: of how many tokens there are logits and a loss, ``tokens`` at most.
    """
    two, three = (_peaks(build(layers), tokens, checkpointing, loss_tokens) for layers in (2, 3))
    layer = three[1] - two[1]
    return Activations(layer, *(peak - 2 * layer for peak in two))


def _peaks(model: Any, tokens: int, checkpointing: bool, loss_tokens: int) -> tuple[int, int]:
    """Measure the most bytes of activations before, and from, the last layer's backward; the model is on meta."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # where attention is not computed as one large matrix; still no memory
        _prepare(model, checkpointing)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        live, before = LiveBytes(model), []

        def watch_last_layer(_: nn.Module, __: Any, output: Any) -> None:
            def note(_: Tensor) -> None:
                before.append(live.peak)
                live.restart()

            output[0].register_hook(note)

        model.get_decoder().register_forward_hook(watch_last_layer)
        with live:
            model(input_ids=ids, use_cache=False, **_labels(ids, loss_tokens)).loss.backward()
        return before[0], live.peak


def _labels(ids: Tensor, loss_tokens: int) -> dict[str, Tensor]:
    """Labels on all tokens, or on some as `graphmoe_model.training.rows.LabelledLogits` gives them."""
    if loss_tokens == ids.shape[1]:
        return {"labels": ids}
    labels = ids[:, :loss_tokens]
    return {"labels": labels, "shift_labels": labels, "logits_to_keep": torch.arange(loss_tokens)}


def _prepare(model: Any, checkpointing: bool) -> None:
    """Put a model into the state in which Trainer trains it."""
    model.train()
    model.get_base_model().set_attn_implementation(FUSED_ATTENTION)
    if checkpointing:  # Transformers 5.24 calls it by another name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

"""Every kind of activation checkpointing: the gradients are those without it, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from graphmoe_model import FusedGraphMoEFFN, collect_routing, router_loss
from tests.model.checkpointing import checkpoint_activations
from tests.model.loops import (
    PAIR,
    assert_same_gradients,
    checkpointed,
    chunked_loss,
    gradients_of,
    loop_model,
    pair_gradients,
    pairwise_loss,
    policy_forward,
    score,
    separate_gradients,
)
from tests.model.method_models import decoder_layers

FORMS = ["graphmoe-mixlora", *(pytest.param(f, marks=pytest.mark.slow) for f in ("graphmoe-mola", "loramoe"))]
EVERY = pytest.mark.parametrize("form", FORMS)


def recompute(function: Callable, *args: Tensor, **kwargs: Tensor):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


# --- which layers are checkpointed, and what becomes of their inputs -------------------------------------------------


def every_layer(model: nn.Module) -> None:
    checkpointed(model)


def every_second_layer(model: nn.Module) -> None:
    checkpoint_activations(model, every_n_layers=2)
    model.enable_input_require_grads()


def every_mlp(model: nn.Module) -> None:
    """No decoder layer is run again: the MLP alone must know its forward."""
    for layer in model.modules():
        if isinstance(layer, FusedGraphMoEFFN):
            layer.forward = partial(recompute, layer.forward)
    model.enable_input_require_grads()


class AtOnce(nn.ModuleList):
    """Layers that a slice gives as one function, checkpointed as a whole."""

    def __getitem__(self, index):
        layers = super().__getitem__(index)
        if not isinstance(index, slice):
            return layers

        def run(hidden: Tensor, **kwargs: object) -> Tensor:
            for layer in layers:
                hidden = layer(hidden, **kwargs)
            return hidden

        return [lambda hidden, **kwargs: recompute(partial(run, **kwargs), hidden)]


def both_layers_at_once(model: nn.Module) -> None:
    """The second layer's input is another tensor when the two are run again."""
    model.get_base_model().model.layers.__class__ = AtOnce
    model.enable_input_require_grads()


def both_layers_and_each(model: nn.Module) -> None:
    """Checkpoints within a checkpoint."""
    every_layer(model)
    both_layers_at_once(model)


KINDS = [every_layer, every_second_layer, every_mlp, both_layers_at_once, both_layers_and_each]
HARDEST = [k if k in (every_mlp, both_layers_and_each) else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@EVERY
def test_two_forwards(form, kind):
    """Every kind, with two forwards in flight."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, pairwise_loss)
    kind(model)
    assert_same_gradients(pair_gradients(model), expected)


@pytest.mark.parametrize("kind", HARDEST, ids=lambda f: f.__name__)
@EVERY
def test_offloaded_activations(form, kind):
    """What checkpointing keeps comes back as a copy: an input cannot be known by being the same object."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, pairwise_loss)
    kind(model)
    with save_on_cpu():
        found = pair_gradients(model)
    assert_same_gradients(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@EVERY
def test_dropout(form, kind):
    """The second run draws the first one's numbers, whatever was drawn in between."""
    model = loop_model(form, lora_dropout=0.3)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return pair_gradients(model)

    expected = run()
    kind(model)
    assert_same_gradients(run(), expected)


@pytest.mark.parametrize(
    "kind", [both_layers_at_once, pytest.param(every_mlp, marks=pytest.mark.slow)], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("collecting", [False, True])
@pytest.mark.parametrize("left", ["eval", "train"])
@EVERY
def test_checkpointing_in_evaluation(form, collecting, left, kind):
    """A checkpoint of one's own also works in evaluation mode, with routing collected or not, left in either mode."""
    model = loop_model(form).eval()
    expected = separate_scores(model)
    kind(model)
    around: AbstractContextManager = collect_routing(model) if collecting else nullcontext()
    with around:
        first, second = (score(model(**inputs).logits, inputs) for inputs in PAIR)
    model.train(left == "train")
    pairwise_loss(first, second).backward()
    assert_same_gradients(gradients_of(model), expected)


def separate_scores(model: nn.Module) -> dict[str, Tensor]:
    """`separate_gradients` without a router loss, which evaluation does not have."""
    with torch.no_grad():
        leaves = [score(model(**inputs).logits, inputs).requires_grad_() for inputs in PAIR]
    upstream = torch.autograd.grad(pairwise_loss(*leaves), leaves)
    for inputs, gradient in zip(PAIR, upstream, strict=True):
        (score(model(**inputs).logits, inputs) * gradient).sum().backward()
    return gradients_of(model)


# --- the whole model under one checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers_too", [False, True])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "by hand"])
@EVERY
def test_whole_model_under_one_checkpoint(form, labels, layers_too):
    """Each of two forwards, router loss included, runs again in the backward pass."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, chunked_loss, labels)
    if layers_too:
        checkpointed(model)

    def forward(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        return policy_forward(model, inputs, labels)

    values, routers = zip(*(recompute(forward, **inputs) for inputs in PAIR), strict=True)
    (chunked_loss(*values) + sum(routers)).backward()
    assert_same_gradients(gradients_of(model), expected)


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mixlora", "loramoe"])
def test_compiled_layers(form):
    """torch.compile around each checkpointed decoder layer, two forwards in flight."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, pairwise_loss)
    checkpointed(model)
    for layer in decoder_layers(model):
        layer.compile(backend="aot_eager")
    assert_same_gradients(pair_gradients(model), expected)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "by hand"])
def test_reentrant_checkpointing_is_refused(labels, forwards):
    """It runs the layers without a graph: a router loss would have no gradient, and say nothing."""
    model = checkpointed(loop_model(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing.*'use_reentrant': False"):
        [policy_forward(model, inputs, labels) for inputs in PAIR[:forwards]]


@EVERY
def test_reentrant_checkpointing_without_a_router_loss(form):
    """Allowed with coefficient 0, also while routing is collected and with a reference pass in between."""
    model = loop_model(form, router_aux_loss_coef=0.0)
    with torch.no_grad():
        leaves = [score(model(**inputs).logits, inputs).requires_grad_() for inputs in PAIR]
    assert all(leaf.isfinite().all() for leaf in leaves)
    first, second = (score(model(**inputs).logits, inputs) for inputs in PAIR)
    pairwise_loss(first, second).backward()
    expected = gradients_of(model)
    checkpointed(model, use_reentrant=True)
    with collect_routing(model) as routing:
        first, second = (score(model(**inputs).logits, inputs) for inputs in PAIR)
    counted = {name: counts.clone() for name, counts in routing.counts.items()}
    with torch.no_grad(), model.disable_adapter():
        model(**PAIR[1])
    pairwise_loss(first, second).backward()
    assert_same_gradients(gradients_of(model), expected)
    assert all(torch.equal(routing.counts[name], counts) for name, counts in counted.items())
    assert router_loss(model).item() == 0.0

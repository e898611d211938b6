"""Whatever stands between a forward and its backward, checkpointed gradients are those of each forward on its own.

Checkpointing runs every layer again in the backward pass. That run must see its own forward's padding and mode, not
what the model did last: a reference pass, another batch, an evaluation, a `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from graphmoe_model import collect_routing
from tests.model.loops import (
    FORMS,
    Batch,
    assert_same_gradients,
    batch,
    checkpointed,
    chunked_loss,
    evaluation,
    forward_without_gradient,
    generation,
    gradients_of,
    loop_model,
    pairwise_loss,
    policy_forward,
    reference_pass,
    score,
    separate_gradients,
    sigmoid_loss,
)
from tests.model.method_models import config

# --- what a loop does to the model between its forwards and its backward ---------------------------------------------


def nothing(model: nn.Module, inputs: Batch) -> None:
    pass


@torch.no_grad()
def reference_adapter(model: nn.Module, inputs: Batch) -> Tensor:
    """DPO's, when an adapter is trained on: the copy of it that stays as it was."""
    model.set_adapter("other")
    scores = score(model(**inputs).logits, inputs)
    model.set_adapter("default")
    return scores


@torch.no_grad()
def kl_passes(model: nn.Module, inputs: Batch) -> Tensor:
    """KTO's: other completions through the policy and the base model, then the reference pass."""
    others = batch(77, "right", length=13)
    ours = score(model(**others).logits, others)
    with model.disable_adapter():
        theirs = score(model(**others).logits, others)
    return reference_pass(model, inputs) + (ours - theirs).mean()


@torch.no_grad()
def evaluation_without_return(model: nn.Module, inputs: Batch) -> None:
    """The backward then finds the model in evaluation mode."""
    model.eval()(**batch(78, "right", length=12))


def differentiable_evaluation(model: nn.Module, inputs: Batch) -> None:
    """Input gradients of an evaluation, as attribution methods take them."""
    model.eval()(**batch(78, None, length=12)).logits.sum()
    model.train()


def generation_in_training(model: nn.Module, inputs: Batch) -> None:
    model.generate(**inputs, max_new_tokens=3, do_sample=False)


def discarded_forward(model: nn.Module, inputs: Batch) -> None:
    """A training forward whose loss is thrown away, as after a NaN or an overflow."""
    other = batch(79, "right", length=10)
    loss = model(**other, labels=other["input_ids"]).loss
    assert loss.requires_grad


def collected_evaluation(model: nn.Module, inputs: Batch) -> None:
    with torch.no_grad(), collect_routing(model):
        model.eval()(**batch(80, None))
    model.train()


def changed_adapter(model: nn.Module, inputs: Batch) -> None:
    model.set_adapter("other")
    model.set_adapter("default")


BETWEEN = [
    nothing,
    reference_pass,
    reference_adapter,
    kl_passes,
    evaluation,
    evaluation_without_return,
    forward_without_gradient,
    differentiable_evaluation,
    generation,
    generation_in_training,
    discarded_forward,
    collected_evaluation,
    changed_adapter,
]

# --- which forwards, and what is made of them ------------------------------------------------------------------------


FORWARDS: dict[str, tuple[list[Batch], Callable[..., Tensor]]] = {
    "one": ([batch(1)], sigmoid_loss),
    "other padding": ([batch(1), batch(2, "right", length=11)], pairwise_loss),
    "padded, then not": ([batch(1), batch(2, None)], pairwise_loss),
    "not, then padded": ([batch(1, None), batch(2)], pairwise_loss),
    "three chunks": ([batch(1), batch(2, None, length=5), batch(3, "right", rows=2)], chunked_loss),
}


def compare(form: str, forwards: str, between: Callable[..., Tensor | None]) -> None:
    """Run the loop on a checkpointed model, and compare with every batch on its own, without checkpointing."""
    batches, loss = FORWARDS[forwards]
    model = loop_model(form)
    model.add_adapter("other", config(form))
    constant = between(model, batches[0])
    if constant is not None:
        loss = partial(loss, constant=constant)
    model.train().zero_grad()
    expected = separate_gradients(model, batches, loss)
    checkpointed(model)
    values, routers = zip(*(policy_forward(model, inputs) for inputs in batches), strict=True)
    found = between(model, batches[0])
    if constant is not None:
        assert found is not None
        torch.testing.assert_close(found, constant)
    (loss(*values) + sum(routers)).backward()
    assert_same_gradients(gradients_of(model), expected)


def slow_but(*default: object) -> Callable[[object], object]:
    return lambda value: value if value in default else pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("forwards", map(slow_but("one"), FORWARDS))
def test_between_forward_and_backward(forwards, between):
    """T = 3, one router a layer: whatever comes between, over one forward (by default) and over several."""
    compare("graphmoe-mixlora", forwards, between)


@pytest.mark.parametrize("form", map(slow_but("graphmoe-mixdora"), FORMS))
def test_two_forwards_one_backward(form):
    """Pairwise and contrastive losses: each forward keeps its own padding."""
    compare(form, "other padding", nothing)


@pytest.mark.slow
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_every_method(form, between):
    """With DoRA or not, T = 1 and 3, over padded and unpadded forwards, the router loss by hand."""
    compare(form, "three chunks", between)


@pytest.mark.slow
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", [form for form, options in FORMS.items() if options])
def test_router_loss_in_the_outputs(form, between):
    """As `test_every_method`, for those with a router loss, from ``outputs.loss``."""
    compare_labels(form, FORWARDS["three chunks"][0], between)


def compare_labels(form: str, batches: list[Batch], between: Callable[..., Tensor | None]) -> None:
    """As `compare`, with the router loss inside ``outputs.loss``."""
    model = loop_model(form)
    model.add_adapter("other", config(form))
    expected = separate_gradients(model, batches, chunked_loss, labels=True)
    checkpointed(model)
    losses = [policy_forward(model, inputs, labels=True)[0] for inputs in batches]
    between(model, batches[0])
    chunked_loss(*losses).backward()
    assert_same_gradients(gradients_of(model), expected)

"""Routing state belongs to its forward: orders, copies, threads, exceptions, reused tensors, collected routing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from graphmoe_model import collect_routing, router_loss
from tests.model.loops import (
    PAIR,
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
    one_gradients,
    pair_gradients,
    pairwise_loss,
    policy_forward,
    reference_pass,
    score,
    separate_gradients,
    sigmoid_loss,
)
from tests.model.method_models import config

FORMS = ["graphmoe-mixlora", *(pytest.param(f, marks=pytest.mark.slow) for f in ("graphmoe-mola", "loramoe"))]
EVERY = pytest.mark.parametrize("form", FORMS)
OTHER = batch(9, None, length=5)


# --- the order of backward passes ------------------------------------------------------------------------------------


def losses(model: nn.Module, batches: list[Batch]) -> Iterator[Tensor]:
    for inputs in batches:
        value, router = policy_forward(model, inputs)
        yield value.mean() + router


@pytest.mark.parametrize(
    "order", [(2, 0, 1), *(pytest.param(o, marks=pytest.mark.slow) for o in ((1, 0, 2), (0, 1, 2)))], ids=str
)
@EVERY
def test_backward_passes_in_any_order(form, order):
    """Several micro-batches' forwards, then their backwards."""
    batches = [*PAIR, OTHER]
    model = loop_model(form)
    expected = separate_gradients(model, batches, lambda *values: sum(value.mean() for value in values))
    made = list(losses(checkpointed(model), batches))
    for index in order:
        made[index].backward()
    assert_same_gradients(gradients_of(model), expected)


@EVERY
def test_interleaved_forwards_and_backwards(form):
    """As pipelines do: one forward, one backward, with one more forward in flight."""
    batches = [*PAIR, OTHER]
    model = loop_model(form)
    expected = separate_gradients(model, batches, lambda *values: sum(value.mean() for value in values))
    made = losses(checkpointed(model), batches)
    first, second = next(made), next(made)
    first.backward()
    third = next(made)
    third.backward()
    second.backward()
    assert_same_gradients(gradients_of(model), expected)


@EVERY
def test_two_backwards_of_one_graph(form):
    """retain_graph: the second recomputation comes after a reference pass."""
    model = loop_model(form)
    expected = {name: 2 * gradient for name, gradient in one_gradients(model).items()}
    value, router = policy_forward(checkpointed(model), PAIR[0])
    loss = sigmoid_loss(value) + router
    loss.backward(retain_graph=True)
    reference_pass(model, PAIR[1])
    loss.backward()
    assert_same_gradients(gradients_of(model), expected)


# --- whose router loss `router_loss` gives ---------------------------------------------------------------------------


@pytest.mark.parametrize("between", [reference_pass, evaluation, forward_without_gradient, generation])
@EVERY
def test_router_loss_is_the_policy_s(form, between):
    """Asked for after a reference pass, it is still that of the last forward that trains."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR[:1], sigmoid_loss)
    value = score(checkpointed(model)(**PAIR[0]).logits, PAIR[0])
    between(model, PAIR[1])
    (sigmoid_loss(value) + router_loss(model)).backward()
    assert_same_gradients(gradients_of(model), expected)


# --- the same tensors again ------------------------------------------------------------------------------------------


@EVERY
def test_one_tensor_of_ids_under_two_masks(form):
    """Two views of a batch: the ids are the same object, the padding is another."""
    batches = [PAIR[0], {**PAIR[0], "attention_mask": PAIR[0]["attention_mask"].flip(1)}]
    model = loop_model(form)
    expected = separate_gradients(model, batches, pairwise_loss)
    assert_same_gradients(pair_gradients(checkpointed(model), batches), expected)


@EVERY
def test_one_tensor_of_embeddings_under_two_masks(form):
    """inputs_embeds: what the first decoder layer gets is the same object in both forwards."""
    model = loop_model(form)
    ids, mask = PAIR[0]["input_ids"], PAIR[0]["attention_mask"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run() -> dict[str, Tensor]:
        values = []
        for attention_mask in (mask, mask.flip(1)):
            logits = model(inputs_embeds=embeddings, attention_mask=attention_mask).logits
            seen = {"input_ids": ids, "attention_mask": attention_mask}
            values.append((score(logits, seen), router_loss(model)))
        (first, router), (second, other) = values
        (pairwise_loss(first, second) + router + other).backward()
        return gradients_of(model)

    expected = separate_gradients(model, [PAIR[0], {**PAIR[0], "attention_mask": mask.flip(1)}], pairwise_loss)
    assert_same_gradients(run(), expected)
    checkpointed(model)
    assert_same_gradients(run(), expected)


@EVERY
def test_mask_written_in_place(form):
    """A static input buffer: the second batch's mask is written where the first one's was."""
    model = loop_model(form)
    first, second = PAIR[0]["attention_mask"], PAIR[0]["attention_mask"].flip(1)
    ids = PAIR[0]["input_ids"]
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (first, second)]
    expected = separate_gradients(model, batches, chunked_loss, labels=True)
    checkpointed(model)
    buffer = first.clone()
    values = []
    for mask in (first, second):
        buffer.copy_(mask)
        values.append(policy_forward(model, {"input_ids": ids, "attention_mask": buffer}, labels=True)[0])
    buffer.zero_()
    chunked_loss(*values).backward()
    assert_same_gradients(gradients_of(model), expected)


# --- collected routing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [None, 0.0], ids=["router loss", "coefficient 0"])
@EVERY
def test_collecting_left_before_the_backward(form, coefficient):
    """The block is around the forward only: the recomputation counts nothing and trains alike."""
    model = loop_model(form, **({} if coefficient is None else {"router_aux_loss_coef": coefficient}))
    inputs = PAIR[0]

    def run(collecting: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not collecting:
            return one_gradients(model, inputs), {}
        with collect_routing(model) as routing:
            value, router = policy_forward(model, inputs)
        counts = {name: found.clone() for name, found in routing.counts.items()}
        (sigmoid_loss(value) + router).backward()
        assert all(torch.equal(routing.counts[name], found) for name, found in counts.items())
        return gradients_of(model), counts

    (expected, _), (_, expected_counts) = run(False), run(True)
    checkpointed(model)
    found, counts = run(True)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    assert counts.keys() == expected_counts.keys()
    assert all(torch.equal(counts[name], expected_counts[name]) for name in counts)


@EVERY
def test_collecting_begun_before_the_backward(form):
    """No forward runs inside the block, so nothing is counted."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, pairwise_loss)
    (first, router), (second, other) = (policy_forward(checkpointed(model), inputs) for inputs in PAIR)
    with collect_routing(model) as routing:
        (pairwise_loss(first, second) + router + other).backward()
    assert routing.counts == {}
    assert_same_gradients(gradients_of(model), expected)


# --- another state at the backward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["other", None], ids=["another adapter", "adapters disabled"])
@EVERY
def test_another_adapter_at_the_backward_is_refused(form, state):
    """The recomputation would be the other adapter's: plain LoRA then trains on its gradients and says nothing."""
    model = loop_model(form)
    model.add_adapter("other", config(form, rounds=3 if form.startswith("graphmoe") else 1))
    expected = one_gradients(model.double())
    value, router = policy_forward(checkpointed(model), PAIR[0])
    loss = sigmoid_loss(value) + router
    now = "the adapter 'other' active" if state else "adapters disabled"
    message = f"the forward ran with the adapter 'default' active, its backward pass with {now}.*Call backward"
    if state:
        model.set_adapter("other")
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
    else:
        with model.disable_adapter(), pytest.raises(RuntimeError, match=message):
            loss.backward()
    model.set_adapter("default")
    model.zero_grad()
    assert_same_gradients(one_gradients(model), expected)


@EVERY
def test_dropout_turned_off_before_the_backward_is_refused(form):
    """model.eval() between forward and backward: the recomputation would drop nothing, the forward did."""
    model = checkpointed(loop_model(form, lora_dropout=0.3))
    value, router = policy_forward(model, PAIR[0])
    model.eval()
    with pytest.raises(RuntimeError, match=r"forward ran with dropout 0\.3, its backward pass with 0\.0"):
        (sigmoid_loss(value) + router).backward()

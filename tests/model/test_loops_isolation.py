"""Copies, threads, nested forwards and exceptions: no forward takes another one's routing state for its own."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphmoe_model import collect_routing, router_loss
from tests.model.loops import (
    PAIR,
    assert_same_gradients,
    checkpointed,
    evaluation,
    forward_without_gradient,
    gradients_of,
    loop_model,
    one_gradients,
    pair_gradients,
    pairwise_loss,
    policy_forward,
    separate_gradients,
    sigmoid_loss,
)
from tests.model.method_models import decoder_layers
from tests.model.tiny_models import tiny_model

FORMS = ["graphmoe-mixlora", *(pytest.param(f, marks=pytest.mark.slow) for f in ("graphmoe-mola", "loramoe"))]
EVERY = pytest.mark.parametrize("form", FORMS)


@contextmanager
def before_the_second_mlp(model: nn.Module, act: Callable[[], Any]) -> Iterator[None]:
    """``act`` once, in the midst of the next forward of the model."""
    waiting = [act]

    def hook(module: nn.Module, args: tuple) -> None:
        if waiting:
            waiting.pop()()

    handle = decoder_layers(model)[1].mlp.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def in_a_thread(act: Callable[[], Any]) -> None:
    """Run to the end in another thread; what it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


# --- copies, threads, exceptions -------------------------------------------------------------------------------------


@EVERY
def test_copies_are_apart(form):
    """A copy made between two forwards, used and trained, leaves the original's gradients alone, and has its own."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, pairwise_loss)
    first, router = policy_forward(checkpointed(model), PAIR[0])
    twin = copy.deepcopy(model)
    assert_same_gradients(pair_gradients(twin), expected)
    evaluation(twin, PAIR[1])
    second, other = policy_forward(model, PAIR[1])
    pair_gradients(twin)
    (pairwise_loss(first, second) + router + other).backward()
    assert_same_gradients(gradients_of(model), expected)


@pytest.mark.slow
@EVERY
def test_pickled_after_a_forward(form):
    """torch.save of a model in training."""
    model = loop_model(form)
    expected = one_gradients(model)
    model(**PAIR[1])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same_gradients(one_gradients(checkpointed(torch.load(file, weights_only=False))), expected)


@EVERY
def test_models_with_one_configuration_object(form):
    """A base model made from the adapted one's configuration is plain, before and after a step of the other."""
    model = loop_model(form)
    base = type(tiny_model())(model.get_base_model().config).double().train()
    expected = base(**PAIR[0], labels=PAIR[0]["input_ids"]).loss
    one_gradients(checkpointed(model))
    outputs = base(**PAIR[0], labels=PAIR[0]["input_ids"])
    torch.testing.assert_close(outputs.loss, expected)
    assert not hasattr(base.config, "output_router_logits")
    assert not hasattr(base.config, "router_aux_loss_coef")


def evaluate_in_a_thread(model: nn.Module) -> None:
    in_a_thread(lambda: forward_without_gradient(model, PAIR[1]))


@EVERY
def test_another_thread_between_forward_and_backward(form):
    """A server or a logger that runs the same model."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR[:1], sigmoid_loss)
    value, router = policy_forward(checkpointed(model), PAIR[0])
    evaluate_in_a_thread(model)
    (sigmoid_loss(value) + router).backward()
    assert_same_gradients(gradients_of(model), expected)


@EVERY
def test_another_thread_in_the_midst_of_a_forward(form):
    """Each thread has its own running forward."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR[:1], sigmoid_loss)
    checkpointed(model)
    with before_the_second_mlp(model, lambda: evaluate_in_a_thread(model)):
        value, router = policy_forward(model, PAIR[0])
    (sigmoid_loss(value) + router).backward()
    assert_same_gradients(gradients_of(model), expected)


@EVERY
def test_backward_in_another_thread(form):
    """As autograd's own device threads, and asynchronous trainers."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR, pairwise_loss)
    (first, router), (second, other) = (policy_forward(checkpointed(model), inputs) for inputs in PAIR)
    in_a_thread((pairwise_loss(first, second) + router + other).backward)
    assert_same_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("labels", [False, True], ids=["by hand", "labels"])
@EVERY
def test_forward_inside_a_forward(form, labels):
    """A hook that asks the same model: the outer forward keeps its padding and its records."""
    model = loop_model(form)
    expected = separate_gradients(model, PAIR[:1], sigmoid_loss, labels)
    checkpointed(model)
    with before_the_second_mlp(model, lambda: forward_without_gradient(model, PAIR[1])):
        value, router = policy_forward(model, PAIR[0], labels)
    (sigmoid_loss(value) + router).backward()
    assert_same_gradients(gradients_of(model), expected)


@EVERY
def test_exception_in_a_forward(form):
    """A forward that fails leaves no padding behind, for a layer called alone or for the next forward."""
    model = loop_model(form)
    layer = decoder_layers(model)[0].mlp
    x = torch.randn(*PAIR[0]["input_ids"].shape, 32, dtype=torch.float64)
    layer(x)
    alone = router_loss(layer).item()
    expected = separate_gradients(model, PAIR, pairwise_loss)
    first, router = policy_forward(checkpointed(model), PAIR[0])

    def fail() -> None:
        raise ZeroDivisionError

    with before_the_second_mlp(model, fail), pytest.raises(ZeroDivisionError):
        model(**PAIR[0])
    layer(x)
    assert router_loss(layer).item() == alone
    second, other = policy_forward(model, PAIR[1])
    (pairwise_loss(first, second) + router + other).backward()
    assert_same_gradients(gradients_of(model), expected)


@EVERY
def test_exception_in_a_recomputation(form):
    """A backward that fails leaves the model able to train."""
    model = loop_model(form)
    expected = one_gradients(model)
    value, router = policy_forward(checkpointed(model), PAIR[0])

    def fail() -> None:
        raise ZeroDivisionError

    with before_the_second_mlp(model, fail), pytest.raises(ZeroDivisionError):
        (sigmoid_loss(value) + router).backward()
    model.zero_grad()
    assert_same_gradients(one_gradients(model), expected)


@EVERY
def test_nothing_piles_up(form):
    """Forwards whose losses are used, discarded or never made keep no tensors beyond the last forward's."""
    model = checkpointed(loop_model(form))

    def steps() -> int:
        pair_gradients(model)
        model(**PAIR[0], labels=PAIR[0]["input_ids"])
        forward_without_gradient(model, PAIR[1])
        evaluation(model, PAIR[1])
        with collect_routing(model):
            policy_forward(model, PAIR[1])
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    gc.freeze()  # what was there before is not looked at: it is a million objects
    try:
        steps()
        first = steps()
        assert [steps() for _ in range(2)] == [first] * 2
    finally:
        gc.unfreeze()

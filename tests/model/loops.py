"""What the tests of training loops share: batches, checkpointing, and gradients from one forward and backward a batch.

The oracle never has two forwards in flight and never recomputes one: `separate_gradients` takes each batch through a
forward and a backward of its own, without checkpointing, and adds the gradients up by the chain rule. Whatever stands
between a loop's forwards and its backward, its gradients are these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from graphmoe_model import router_loss
from tests.model.checkpointing import checkpoint_activations
from tests.model.method_models import adapted, randomise, trained_parameters
from tests.model.tiny_models import tiny_model, tokens

Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]

BOUND = 1e-6  # of |g - g'| / |g'|, per parameter
# method, with DoRA or not, and T: every kind of router, folds and GRU
FORMS = {
    "mixlora": {"router_aux_loss_coef": 0.3},
    "graphmoe-mixlora": {"router_aux_loss_coef": 0.3},
    "graphmoe-mixdora": {"router_aux_loss_coef": 0.3, "router_aux_loss": "switch"},
    "mola": {"router_aux_loss_coef": 0.3},
    "graphmoe-mola": {"router_aux_loss_coef": 0.3},
    "loramoe": {},
    "graphmoe-doramoe": {},
    "lora": {},
    "graphmoe-lora": {},
}


def loop_model(form: str = "graphmoe-mixlora", *, seed: int = 0, **options: Any) -> PeftModel:
    """A tiny fp64 model in training whose adapter is away from its start and whose router loss weighs."""
    torch.manual_seed(seed)
    rounds = {"rounds": 3} if form.startswith("graphmoe") else {}
    base = tiny_model(use_cache=False)  # a cache would grow when a checkpoint of one's own runs a layer again
    model = adapted(form, base, **{**rounds, **FORMS[form], **options}).double()
    randomise(model)
    return model.train()


def checkpointed(model: nn.Module, **kwargs: Any) -> nn.Module:
    """The model with every decoder layer checkpointed, non-reentrant unless asked."""
    checkpoint_activations(model, **kwargs)
    model.enable_input_require_grads()
    return model


def batch(seed: int, padding: str | None = "left", rows: int = 3, length: int = 9) -> Batch:
    """Random tokens whose rows are padded by different lengths, drawn from the seed; ``None``: no mask at all."""
    ids = tokens(rows, length, seed=seed)
    if padding is None:
        return {"input_ids": ids}
    lengths = torch.randint(0, length - 2, (rows, 1), generator=torch.Generator().manual_seed(seed + 100))
    mask = (torch.arange(length) >= lengths).long()
    return {"input_ids": ids, "attention_mask": mask if padding == "left" else mask.flip(1)}


def score(logits: Tensor, inputs: Batch) -> Tensor:
    """[B], the mean log-probability of each row's next tokens, padding left out."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    kept = torch.ones_like(ids) if mask is None else mask
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    kept = (kept[:, 1:] * kept[:, :-1]).to(chosen.dtype)
    return (chosen * kept).sum(1) / kept.sum(1).clamp(min=1)


def sigmoid_loss(scores: Tensor, constant: Tensor | float = 0.0) -> Tensor:
    return -logsigmoid(2 * (scores - constant)).mean()


def pairwise_loss(first: Tensor, second: Tensor, constant: Tensor | float = 0.0) -> Tensor:
    return -logsigmoid(2 * (first - second) - constant).mean()


def chunked_loss(*chunks: Tensor, constant: Tensor | float = 0.0) -> Tensor:
    return torch.stack([chunk.mean() for chunk in chunks]).logsumexp(0) + 0 * torch.as_tensor(constant).mean()


def policy_forward(model: nn.Module, inputs: Batch, labels: bool = False) -> tuple[Tensor, Tensor]:
    """A training forward's value and its router loss: scores [B], or with labels ``outputs.loss``, which has both."""
    if labels:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        return loss, torch.zeros_like(loss)
    logits = model(**inputs).logits
    return score(logits, inputs), router_loss(model)


def gradients_of(model: nn.Module) -> Gradients:
    """Every trained parameter's gradient, zeros where it got none; the parameters' own are cleared."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    return found


def separate_gradients(
    model: nn.Module, batches: Sequence[Batch], loss: Callable[..., Tensor], labels: bool = False
) -> Gradients:
    """The gradients of ``loss(value of each batch) + the batches' router losses``, one batch at a time.

    The model must not be checkpointed and must draw no random numbers.
    """
    with torch.no_grad():
        values = [policy_forward(model, inputs, labels)[0] for inputs in batches]
    leaves = [value.requires_grad_() for value in values]
    upstream = torch.autograd.grad(loss(*leaves), leaves)
    for inputs, gradient in zip(batches, upstream, strict=True):
        value, router = policy_forward(model, inputs, labels)
        ((value * gradient).sum() + router).backward()
    return gradients_of(model)


def assert_same_gradients(found: Gradients, expected: Gradients, bound: float = BOUND) -> None:
    """Every parameter's within the bound, relative to its norm; a router's expected gradient of zero is an error."""
    assert found.keys() == expected.keys()
    floor = 1e-9 * max(gradient.norm() for gradient in expected.values())  # of what is zero but for rounding
    off = {}
    for name, gradient in expected.items():
        error = ((found[name] - gradient).norm() / gradient.norm().clamp(min=floor)).item()
        if not error <= bound:
            off[name] = f"{error:.1e}"
    worst = dict(sorted(off.items(), key=lambda item: -float(item[1]))[:3])
    assert not off, f"{len(off)} of {len(expected)} gradients are off, most of all {worst}"
    assert all(expected[name].any() for name in expected if "router" in name), "a gradient of zero compares nothing"


PAIR = [batch(1), batch(2, "right", length=11)]


def pair_gradients(model: nn.Module, batches: Sequence[Batch] = PAIR) -> Gradients:
    """Of `pairwise_loss` over two forwards in flight, with their router losses."""
    (first, router), (second, other) = (policy_forward(model, inputs) for inputs in batches)
    (pairwise_loss(first, second) + router + other).backward()
    return gradients_of(model)


def one_gradients(model: nn.Module, inputs: Batch | None = None) -> Gradients:
    """Of `sigmoid_loss` over one forward, with its router loss."""
    value, router = policy_forward(model, inputs or PAIR[0])
    (sigmoid_loss(value) + router).backward()
    return gradients_of(model)


# --- what else uses the model in the meantime -------------------------------------------------------------------------


@torch.no_grad()
def reference_pass(model: nn.Module, inputs: Batch) -> Tensor:
    """DPO's: the base model's scores, in training mode."""
    with model.disable_adapter():
        return score(model(**inputs).logits, inputs)


@torch.no_grad()
def forward_without_gradient(model: nn.Module, inputs: Batch) -> None:
    model(**batch(78, "right", length=12))


@torch.no_grad()
def evaluation(model: nn.Module, inputs: Batch) -> None:
    model.eval()(**batch(78, "right", length=12))
    model.train()


def generation(model: nn.Module, inputs: Batch) -> None:
    model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
    model.train()

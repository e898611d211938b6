"""Random operands of `expert_swiglu`, and its results and gradients by name."""

from __future__ import annotations

from typing import Any

import torch

from graphmoe_kernels import Dropout, ExpertOperands, GateUp, LowRankUpdate, expert_swiglu
from graphmoe_kernels.experts import pytorch_blocks, pytorch_few, pytorch_pairs, reference
from graphmoe_kernels.experts.dropout import DrawnMask

FLOATING = ["gate", "up", "low", "gate_B", "up_B", "down_A", "routing_weights"]
LATER_ROUND = ["state", "fold_gate", "fold_up", "low_update"]
SCALES = ["gate_scale", "up_scale"]
BIASES = ["gate_bias", "up_bias"]  # constants: they get no gradient
SETTINGS = {"scale": 1.5, "activation": "silu"}
# Which dimension of an operand is F, of those that have it.
F_DIMENSION = {"gate": 1, "up": 1, "gate_B": 1, "up_B": 1, "down_A": 2, "fold_gate": 0, "fold_up": 0}
F_DIMENSION |= {"gate_scale": 1, "up_scale": 1, "gate_bias": 0, "up_bias": 0}


def operands(
    tokens: int = 9,
    width: int = 21,
    experts: int = 5,
    rank: int = 3,
    top_k: int = 2,
    inner: int | None = None,
    scales: bool = False,
    biases: bool = False,
) -> dict[str, torch.Tensor]:
    """Random fp64 operands; ``inner`` is the GRU's width in a later round, None in the first."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    ids = [torch.randperm(experts)[:top_k] for _ in range(tokens)]
    found = {
        "gate": draw(tokens, width),
        "up": draw(tokens, width),
        "low": draw(tokens, 2 * experts * rank),
        "gate_B": draw(experts, width, rank),
        "up_B": draw(experts, width, rank),
        "down_A": draw(experts, rank, width) * width**-0.5,
        "routing_weights": torch.rand(tokens, top_k, dtype=torch.float64),
        "expert_ids": torch.stack(ids) if ids else torch.zeros(0, top_k, dtype=torch.long),
    }
    if inner is not None:
        found |= {
            "state": draw(tokens, inner),
            "fold_gate": draw(width, inner) * inner**-0.5,
            "fold_up": draw(width, inner) * inner**-0.5,
            "low_update": draw(tokens, 2 * experts * rank),
        }
    if scales:
        found |= {name: 1 + 0.3 * draw(experts, width) for name in SCALES}
    if biases:
        found |= {name: draw(width) for name in BIASES}
    return found


def cast(given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The floating operands in ``dtype``; routing weights in fp32 at least, as routing gives them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: t if not t.is_floating_point() else t.to(wide if name == "routing_weights" else dtype)
        for name, t in given.items()
    }


def packed(given: dict[str, Any]) -> ExpertOperands:
    """The operands by name as the operator takes them; ``dropout`` is a rate, with ``seed`` beside it."""

    def group(kind: Any, *names: str) -> Any:
        found = [given.get(name) for name in names]
        return None if all(x is None for x in found) else kind(*found)

    return ExpertOperands(
        GateUp(given["gate"], given["up"]),
        given["low"],
        GateUp(given["gate_B"], given["up_B"]),
        given["down_A"],
        given["routing_weights"],
        given["expert_ids"],
        low_update=given.get("low_update"),
        update=group(LowRankUpdate, "state", "fold_gate", "fold_up"),
        scales=group(GateUp, *SCALES),
        biases=group(GateUp, *BIASES),
        dropout=Dropout(given["dropout"], given.get("seed")) if given.get("dropout") else None,
    )


def run(backend: str = "auto", scale: float = 1.0, activation: str = "silu", **given: Any) -> tuple[Any, Any]:
    """`expert_swiglu` of operands by name."""
    return expert_swiglu(packed(given), scale=scale, activation=activation, backend=backend)


def upstream(found: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Fixed random gradients of hidden and low_down."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in found]


def results(given: dict[str, torch.Tensor], backend: str = "auto", **settings) -> dict[str, torch.Tensor]:
    """hidden, low_down and the gradient of every floating operand under fixed random upstream gradients, by name."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in given.items()
        if t.is_floating_point() and name not in BIASES
    }
    found = run(**(given | leaves), **(SETTINGS | settings), backend=backend)
    torch.autograd.backward(found, upstream(found))
    outputs = dict(zip(("hidden", "low_down"), (t.detach() for t in found), strict=True))
    return outputs | {name: t.grad for name, t in leaves.items()}


def weights_gradient(given: dict[str, torch.Tensor], order: torch.Tensor, **settings) -> torch.Tensor:
    """The reference's gradient of the routing weights, a sum over F whose columns stand in this order."""
    columns = {name: t.index_select(F_DIMENSION[name], order) for name, t in given.items() if name in F_DIMENSION}
    weights = given["routing_weights"].detach().clone().requires_grad_()
    found = run(**(given | columns | {"routing_weights": weights}), **(SETTINGS | settings), backend="reference")
    hidden, low_down = upstream(found)
    return torch.autograd.grad(found, weights, (hidden[:, order], low_down))[0]


# Of the PyTorch path: pairs sorted by expert, few pairs with matrices of their own, and slots stacked, as on a GPU.
PYTORCH_FORMS = ("sorted", "gathered", "stacked")


def take_form(form: str, monkeypatch: Any) -> None:
    """Let the PyTorch path take one of `PYTORCH_FORMS`, whatever the sizes and the device."""
    monkeypatch.setattr(pytorch_few, "MOST_PAIRS", 10**6 if form == "gathered" else 0)
    for module in (pytorch_blocks, pytorch_few, pytorch_pairs):
        monkeypatch.setattr(module, "on_host", lambda x: form != "stacked")


def same_mask_in_reference(form: str, monkeypatch: Any) -> None:
    """Let the reference take the dropout mask that the PyTorch path draws on a CPU; stacked slots take its own."""

    def drawn(seed: torch.Tensor, rate: float, experts: torch.Tensor, width: int) -> torch.Tensor:
        tokens, slots = experts.shape
        mask = DrawnMask(rate, seed).draw(torch.empty(tokens, width))
        return mask[:, None].expand(tokens, slots, width)

    if form != "stacked":
        monkeypatch.setattr(reference, "dropout_mask", drawn)

"""Random inputs of `route_tokens`, and its results and gradients by name."""

from __future__ import annotations

import torch

from graphmoe_kernels import route_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(tokens, width, experts, dtype=torch.float32, router_dtype=torch.float32, offset=True):
    """x, router and offset of logits that are neither flat nor peaked."""

    def draw(*shape, std, dtype):
        return (torch.randn(*shape, dtype=torch.float64) * std).to(DEVICE, dtype)

    return {
        "x": draw(tokens, width, std=1.0, dtype=dtype),
        "router": draw(experts, width, std=width**-0.5, dtype=router_dtype),
        "offset": draw(tokens, experts, std=1.0, dtype=torch.float32) if offset else None,
    }


def run(given, top_k, upstream=("logits", "routing_weights", "probability_sums"), dtype=None, seed=0, **settings):
    """What `route_tokens` gives, by name, with the inputs' gradients for random gradients of the ``upstream`` outputs.

    The gradients are drawn alike whatever the dtype and the backend; in ``dtype`` if it is given.
    """
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()
    }
    found = route_tokens(leaves["x"], leaves["router"], top_k, offset=leaves["offset"], **settings)
    generator = torch.Generator().manual_seed(seed)
    outputs = {name: t for name, t in found._asdict().items() if name in upstream and t is not None}
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs.values()]
    torch.autograd.backward(list(outputs.values()), grads)
    results = {name: t.detach() for name, t in found._asdict().items() if t is not None}
    return results | {f"d_{name}": t.grad for name, t in leaves.items() if t is not None}

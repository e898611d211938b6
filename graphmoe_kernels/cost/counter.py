"""The arithmetic of the running code, read by PyTorch's FLOP counter: what the model of it is checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graphmoe_kernels._ops import ops
from graphmoe_kernels.cost.model import fold_build, multiply_adds, prepare_build
from graphmoe_kernels.cost.sizes import Sizes
from graphmoe_kernels.experts import op
from graphmoe_kernels.rethinking.folded import rethink_folded
from graphmoe_kernels.rethinking.folding import FoldSettings, build_fold
from graphmoe_kernels.rethinking.literal import rethink_literal
from graphmoe_kernels.rethinking.weights import RethinkingSpec
from graphmoe_kernels.testing import make_layer


def count_flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of the matrix products (two per multiply-add) that ``run`` executes.

    `graphmoe_kernels.expert_swiglu` and `swiglu` are opaque operators to the counter, so they are executed once more
    under a counter of their own: what counts are the products that their implementations run, not a formula.

    Raises:
        ValueError: ``run`` uses the Triton kernels, whose products no counter sees.
    """
    with FlopCounterMode(display=False, custom_mapping=_OPERATORS) as counter:
        run()
    return counter.get_total_flops()


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula that wants the operator's tensors, not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _on_pytorch(implementation: Callable[..., object], backend_at: int) -> Callable[..., int]:
    """Make a formula that runs an operator's PyTorch ``implementation`` and counts that; see `_refuse` for others."""

    def formula(*args: Any, out_val: object) -> int:
        return count_flops(lambda: implementation(*args)) if args[backend_at] == "torch" else _refuse()

    return _raw(formula)


def _refuse(*_: object, **__: object) -> int:
    raise ValueError("FLOP are counted on the PyTorch path; Triton kernels hide theirs: run with backend='torch'")


@_raw
def _product_in_place(target: Tensor, a: Tensor, b: Tensor, **_: object) -> int:
    """Count target += a b: the counter knows ``addmm`` and not its in-place form."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_OPERATORS = {
    ops.expert_swiglu: _on_pytorch(op.run_experts_flat, -1),
    ops.expert_swiglu_backward: _on_pytorch(op.run_experts_backward_flat, -2),
    ops.swiglu: _on_pytorch(op.run_swiglu_flat, -1),
    ops.swiglu_backward: _on_pytorch(op.run_swiglu_backward_flat, -2),
    torch.ops.aten.addmm_: _product_in_place,
    # These are registered for Triton alone.
    **{
        getattr(ops, name): _refuse
        for name in ("route", "topk_softmax", "routing_backward", "gru_step", "gru_step_backward")
    },
}


class Reading(NamedTuple):
    """FLOP of one call of a piece of code at some sizes: as the model has them, and as counted."""

    code: str
    modelled: int
    counted: int

    @property
    def deviation(self) -> float:
        """Compute the model's deviation from the count, relative to the count."""
        return abs(self.modelled - self.counted) / self.counted


def count_layer(sizes: Sizes) -> list[Reading]:
    """Run both recurrences, and build the fold, at ``sizes`` on the CPU in fp32, and count.

    A layer of these sizes is made of random weights, so take small ones.
    """
    s = replace(sizes, dtype="fp32")
    spec = RethinkingSpec(s.rounds, s.top_k, scale=2.0)
    routers: Any = None if s.routers == "none" else s.routers
    shape = (s.hidden, s.intermediate, s.experts, s.rank, s.gru_width)
    weights = make_layer(*shape, routers=routers, dora=s.dora, dtype=torch.float32)
    layer = weights if s.rounds > 1 else weights._replace(gru=None)
    x = torch.randn(s.tokens, s.hidden, generator=torch.Generator().manual_seed(0))
    settings = FoldSettings(x.dtype, spec.scale, spec.candidate_input)
    literal, folded = (s.tokens * multiply_adds(form, s, "executed") for form in ("literal", "folded"))
    with torch.no_grad():
        fold = build_fold(weights, settings)
        found: dict[str, tuple[int, Callable[[], object]]] = {
            "rethink_literal": (literal + prepare_build(s), lambda: rethink_literal(x, layer, spec)),
            "rethink_folded": (folded, lambda: rethink_folded(x, layer, spec, fold=fold)),
            "build_fold": (sum(fold_build(s, "executed").values()), lambda: build_fold(weights, settings)),
        }
        return [Reading(code, 2 * products, count_flops(run)) for code, (products, run) in found.items()]

"""What a call of each provider needs at least: compulsory bytes and floating-point operations, from the cost model."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.preparation import Work
from benchmarks.roofline import work as kernel_work
from graphmoe_kernels.cost import Sizes, Term, fold_build, layer_terms, round_terms
from graphmoe_kernels.rethinking.folding import padded
from graphmoe_kernels.rethinking.policy import fold_break_even

# Products with frozen weights: their backward has the gradient of the input alone.
FROZEN = ("base gate, up", "base down")
KERNELS_OF = {
    "routing": ("route_forward", "route_backward"),
    "expert_swiglu": ("forward_kernel", "backward_tokens_kernel", "backward_weights_kernel"),
    "gru_step": ("gru_forward", "gru_backward"),
}


def layer_work(form: str, sizes: Sizes, training: bool) -> Work:
    """A whole layer's: ``form`` is one of the cost model's, or ``"lora"`` (the MLP with one LoRA on each projection).

    In training a product costs another one for the gradient of its input, and a third for that of its weight where
    that is trained; a fold is built anew, with a backward of its own. How many bytes a training step has to move
    depends on what it keeps for its backward, so they are not counted.
    """
    if form == "folded" and training and sizes.tokens < _break_even(sizes):
        form = "literal"
    terms = _terms(form, sizes)
    if not training:
        moved = sum(term.weights + sizes.tokens * (term.read + term.written) for term in terms)
        return Work(float(moved), 2.0 * sizes.tokens * sum(term.multiply_adds for term in terms))
    products = sum(term.multiply_adds * (2 if term.name in FROZEN else 3) for term in terms)
    build = 2 * sum(fold_build(sizes).values()) if form == "folded" and sizes.rounds > 1 else 0
    return Work(None, 2.0 * (sizes.tokens * products + build))


def _break_even(sizes: Sizes) -> float:
    return fold_break_even(sizes.hidden, sizes.intermediate, padded(sizes.gru_width), sizes.rounds)


def _terms(form: str, sizes: Sizes) -> list[Term]:
    if form != "lora":
        return layer_terms(form, sizes)
    D, F, r, e = sizes.hidden, sizes.intermediate, sizes.rank, sizes.element
    lora = [
        Term("LoRA A of gate, up", 2 * r * D, 2 * r * D * e, D * e, 2 * r * e),
        Term("LoRA B of gate, up", 2 * r * F, 2 * r * F * e, 2 * r * e),
        Term("LoRA A of down", r * F, r * F * e, F * e, r * e),
        Term("LoRA B of down", r * D, r * D * e, r * e),
    ]
    return [*layer_terms("dense", sizes), *lora]


def operator_work(group: str, sizes: Sizes, later: bool, training: bool) -> Work:
    """An operator's, whoever computes it: with the backward in training.

    Bytes are those of the kernels that compute it (inputs and outputs once); operations are the ones needed, where a
    kernel's own are rounded up to whole tiles.
    """
    kernels = KERNELS_OF[group] if training else KERNELS_OF[group][:1]
    moved = sum(kernel_work(kernel, sizes, later).bytes for kernel in kernels)
    names = {
        "routing": ("router update",) if later else ("router",),
        "expert_swiglu": ("fold update H M^T", "low-rank B (gate, up)", "down A"),
        "gru_step": ("GRU candidate, h and H",),
    }[group]
    terms = round_terms("folded", replace(sizes, rounds=3), 2 if later else 1)
    products = sum(term.multiply_adds for term in terms if term.name in names)
    return Work(moved, 2.0 * sizes.tokens * products * (3 if training else 1))

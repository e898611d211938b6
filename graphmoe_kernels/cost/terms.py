"""The terms of one round, in each form: where the multiply-adds and the bytes are.

Letters: N tokens, D hidden, F intermediate, n experts, k experts per token, r rank, G GRU width, T rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from graphmoe_kernels.cost.sizes import Sizes
from graphmoe_kernels.rethinking.weights import padded

FORMS = ("dense", "peers", "literal", "folded")
COUNTS = ("needed", "executed")


class Term(NamedTuple):
    """One product, or one piece of pointwise work that has to move bytes.

    Attributes:
        name: what it computes.
        multiply_adds: per token.
        weights: bytes of weights read, once for all tokens of a call.
        read, written: bytes of activations per token, each tensor once per term.
    """

    name: str
    multiply_adds: int = 0
    weights: int = 0
    read: int = 0
    written: int = 0


class _Widths(NamedTuple):
    """The sizes as one form and count of it has them; ``low`` is the width of a token's low-rank activations."""

    D: int
    F: int
    G: int
    k: int
    r: int
    low: int  # k*r, or n*r where all experts run as one product
    low_weights: int  # rows of A (columns of B) read for it: r times the experts that are read
    used: int  # experts that a round reads at most
    hidden_low: int  # k*r, or n*r where experts are mixed: what B of gate and up and A of down multiply
    both_low: int  # the same, but twice n*r where gate and up share one product with zeros for the other's part
    downs: int  # base down projections of a round
    e: int  # bytes of an element
    executed: bool  # the products as the code has them, zeros included


def _widths(form: str, sizes: Sizes, count: str) -> _Widths:
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; expected one of {', '.join(FORMS)}")
    if count not in COUNTS:
        raise ValueError(f"unknown count {count!r}; expected 'needed' or 'executed'")
    all_experts = count == "executed" and form in ("literal", "folded")
    width = padded(sizes.gru_width) if count == "executed" and form == "folded" else sizes.gru_width
    return _Widths(
        D=sizes.hidden,
        F=sizes.intermediate,
        G=width,
        k=sizes.top_k,
        r=sizes.rank,
        low=sizes.rank * (sizes.experts if all_experts else sizes.top_k),
        low_weights=sizes.rank * (sizes.experts if all_experts else sizes.used_experts),
        used=sizes.used_experts,
        hidden_low=sizes.rank * (sizes.experts if all_experts and sizes.mixed else sizes.top_k),
        both_low=sizes.rank * (2 * sizes.experts if all_experts and sizes.mixed else sizes.top_k),
        downs=sizes.down_products,
        e=sizes.element,
        executed=count == "executed",
    )


def round_terms(form: str, sizes: Sizes, t: int, count: str = "needed") -> list[Term]:
    """List the terms of round ``t`` of 1..T in ``form``; for ``"dense"`` its only round.

    Counted: products, and the bytes of an ideal execution in which each term reads its inputs once and writes its
    output once, nothing stays in a cache from one term to the next, and pointwise work rides on the product beside it.
    Not counted: pointwise arithmetic, softmax and top-k (n values per token).

    The GRU's first step has a zero state, so no recurrent products. The folded form never forms x_t (it would only with
    LoRA dropout active). The candidate reads the experts' output (``candidate_input="expert_output"``).

    Raises:
        ValueError: an unknown ``form`` or ``count``, or a round outside 1..T.
    """
    w = _widths(form, sizes, count)
    if not 1 <= t <= sizes.rounds:
        raise ValueError(f"round must lie in 1..{sizes.rounds}, got {t}")
    if form == "dense":
        return [_base_in(w), Term("SwiGLU", read=2 * w.F * w.e, written=w.F * w.e), _base_down(w)] if t == 1 else []
    make: dict[str, Callable[[Sizes, _Widths, int], list[Term]]] = {
        "peers": _peers_round,
        "literal": _literal_round,
        "folded": _folded_round,
    }
    return make[form](sizes, w, t)


def _base_in(w: _Widths) -> Term:
    return Term("base gate, up", 2 * w.F * w.D, 2 * w.F * w.D * w.e, w.D * w.e, 2 * w.F * w.e)


def _base_down(w: _Widths, times: int = 1) -> Term:
    product = Term("base down", w.D * w.F, w.D * w.F * w.e, w.F * w.e, w.D * w.e)
    return Term(product.name, *(times * part for part in product[1:]))


def _routers(sizes: Sizes, w: _Widths, inner: int, name: str) -> list[Term]:
    """List the routers that read x or H, of ``inner`` columns, and the down projection's own, which reads hidden."""
    n, wide = sizes.experts, sizes.router_element
    if sizes.routers == "none":
        return []

    def router(name: str, inner: int, times: int = 1) -> Term:
        return Term(name, times * n * inner, times * n * inner * wide, inner * sizes.element, times * n * wide)

    if not sizes.mixed:
        return [router(name, inner)]
    return [router(name, inner, times=2), router("router of down", w.F)]


def _down(sizes: Sizes, w: _Widths) -> list[Term]:
    """List the terms from hidden and low_down to y: the base down projection, with DoRA once per slot, and B."""
    terms = [_base_down(w, w.downs), _down_B(w)]
    if sizes.dora and sizes.mixed:
        terms.append(Term("mixture of DoRA's vectors", sizes.experts * w.D, 4 * sizes.experts * w.D))
    return terms


def _mixed_dora(sizes: Sizes, w: _Widths) -> list[Term]:
    """List DoRA's scaling of mixed experts: (1 + sum_i p_i (m_i - 1)) times the pre-activations and their update."""
    if not (sizes.dora and sizes.mixed):
        return []
    n, both = sizes.experts, 2 * w.F
    return [Term("mixture of DoRA's vectors", n * both, 4 * n * both, both * w.e, both * w.e)]


def _low_rank_A(w: _Widths) -> Term:
    return Term("low-rank A (gate, up)", 2 * w.low * w.D, 2 * w.low_weights * w.D * w.e, w.D * w.e, 2 * w.low * w.e)


def _experts(w: _Widths, updated: bool = False) -> list[Term]:
    """List the terms of one `graphmoe_kernels.expert_swiglu` but for the product with M, for chosen experts only.

    ``updated``: the low-rank activations are the sum of two tensors, the first round's and their update.
    """
    k_r, used = w.hidden_low, w.used * w.r
    return [
        Term("low-rank B (gate, up)", 2 * w.both_low * w.F, 2 * used * w.F * w.e, 2 * k_r * w.e * (1 + updated)),
        Term("SwiGLU, combine", read=2 * w.F * w.e * w.downs, written=w.F * w.e * w.downs),
        Term("down A", k_r * w.F, used * w.F * w.e, written=w.low * w.e),
    ]


def _down_B(w: _Widths) -> Term:
    return Term("down B", w.low * w.D, w.low_weights * w.D * w.e, w.low * w.e)


def _gru_recurrent(w: _Widths, t: int) -> Term:
    """Count the GRU's step: its products with the state (none while the state is zero) and the gates."""
    products = 0 if t == 1 else 3 * w.G * w.G
    state = 0 if t == 1 else w.G * w.e
    return Term("GRU recurrent", products, products * w.e, 3 * w.G * w.e + state, w.G * w.e)


def _join(w: _Widths, t: int) -> list[Term]:
    """List the terms from y_t to x_{t+1}: the GRU reads y, and x_{t+1} = x_t + W_g h is formed."""
    return [
        Term("GRU input", 3 * w.G * w.D, 3 * w.G * w.D * w.e, w.D * w.e, 3 * w.G * w.e),
        _gru_recurrent(w, t),
        Term("next x (W_g h)", w.D * w.G, w.D * w.G * w.e, (w.G + w.D) * w.e, w.D * w.e),
    ]


def _literal_round(sizes: Sizes, w: _Widths, t: int) -> list[Term]:
    terms = [*_routers(sizes, w, w.D, "router"), _base_in(w), _low_rank_A(w), *_mixed_dora(sizes, w), *_experts(w)]
    return [*terms, *_down(sizes, w), *(_join(w, t) if t < sizes.rounds else [])]


def _peers_round(sizes: Sizes, w: _Widths, t: int) -> list[Term]:
    """List a peer's round: every expert gathers its tokens, projects them down over the shared W_D, and is added."""
    k_r, used = w.k * w.r, w.used * w.r
    if sizes.mixed:  # an expert is a LoRA pair on each linear, not an MLP: nothing is projected down twice
        return _literal_round(sizes, w, t)
    terms = [
        *_routers(sizes, w, w.D, "router"),
        _base_in(w),
        Term("low-rank A (gate, up)", 2 * k_r * w.D, 2 * used * w.D * w.e, w.k * w.D * w.e, 2 * k_r * w.e),
        Term("low-rank B (gate, up)", 2 * k_r * w.F, 2 * used * w.F * w.e, 2 * k_r * w.e),
        Term("SwiGLU", read=2 * w.k * w.F * w.e, written=w.k * w.F * w.e),
        Term("base down", w.k * w.D * w.F, w.used * w.D * w.F * w.e, w.k * w.F * w.e, w.k * w.D * w.e),
        Term("down A", k_r * w.F, used * w.F * w.e, w.k * w.F * w.e, k_r * w.e),
        Term("down B", k_r * w.D, used * w.D * w.e, k_r * w.e),
        Term("combine", read=w.k * w.D * w.e, written=w.D * w.e),
    ]
    return terms + (_join(w, t) if t < sizes.rounds else [])


def _folded_round(sizes: Sizes, w: _Widths, t: int) -> list[Term]:
    if t == 1:
        terms = [*_routers(sizes, w, w.D, "router"), _base_in(w), _low_rank_A(w)]
    else:
        update = Term("fold update H M^T", 2 * w.F * w.G, 2 * w.F * w.G * w.e, w.G * w.e)
        # Every call of the operator computes it, and with DoRA on chosen experts there is one per slot.
        update = Term(update.name, *(w.downs * part for part in update[1:]))
        terms = [*_routers(sizes, w, w.G, "router update"), update]
    terms += [*_mixed_dora(sizes, w), *_experts(w, updated=t > 1)]
    if t == sizes.rounds:
        return [*terms, *_down(sizes, w)]
    if sizes.dora:  # its vectors stand between W_D and the GRU's weights: y is formed
        columns = Term("GRU input", 3 * w.G * w.D, 3 * w.G * w.D * w.e, w.D * w.e, 3 * w.G * w.e)
        reads = [*_down(sizes, w), columns]
    else:
        reads = [
            Term("GRU input Q c", 3 * w.G * w.F, 3 * w.G * w.F * w.e, w.F * w.e, 3 * w.G * w.e),
            Term("GRU input of z", 3 * w.G * w.low, 3 * w.G * w.low_weights * w.e, w.low * w.e),
        ]
    return [
        *terms,
        *reads,
        _folded_gru_step(w, first=t == 1),
        _reread(w, last=t == sizes.rounds - 1),
    ]


def _folded_gru_step(w: _Widths, first: bool) -> Term:
    """Count `graphmoe_kernels.gru_step`: the candidate's product with the state, the gates, and the sum of states H.

    It reads its input and, from the second step on, the recurrent gates, h and H; it writes h and H.
    """
    if first:
        return Term("GRU candidate, h and H", read=3 * w.G * w.e, written=2 * w.G * w.e)
    return Term("GRU candidate, h and H", w.G * w.G, w.G * w.G * w.e, (3 + 2 + 1 + 1) * w.G * w.e, 2 * w.G * w.e)


def _reread(w: _Widths, last: bool) -> Term:
    """Count the product after a GRU step: W_z and W_r read h, the A W_g of the experts read H.

    Needed are those two products, and after the ``last`` step the second alone. Executed is always one product of both
    side by side, with a matrix that is half zeros.
    """
    name = "A W_g of H, gates of h"
    if w.executed:
        inner, columns, rows = 2 * w.G, 2 * w.low + 2 * w.G, 2 * w.low_weights + 2 * w.G
        return Term(name, inner * columns, inner * rows * w.e, inner * w.e, columns * w.e)
    gates = 0 if last else 2 * w.G
    return Term(
        name,
        (2 * w.low + gates) * w.G,
        (2 * w.low_weights + gates) * w.G * w.e,
        (w.G if last else 2 * w.G) * w.e,
        (2 * w.low + gates) * w.e,
    )

"""The terms of one round, in each form: where the multiply-adds and the bytes are.

Letters: N tokens, D hidden, F intermediate, n experts, k experts per token, r rank, G GRU width, T rounds.
"""

from __future__ import annotations

from typing import NamedTuple

from graphmoe_kernels.cost.sizes import Sizes
from graphmoe_kernels.rethinking.weights import padded
from graphmoe_kernels.validation import check_choice

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
    check_choice("form", form, FORMS)
    check_choice("count", count, COUNTS)
    if not 1 <= t <= sizes.rounds:
        raise ValueError(f"round must lie in 1..{sizes.rounds}, got {t}")
    layer = _Layer(form, sizes, count)
    if form == "dense":
        return layer.dense() if t == 1 else []
    if form == "folded":
        return layer.folded(t)
    return layer.peers(t) if form == "peers" else layer.literal(t)


class _Layer:
    """A layer's sizes as one form and count of it has them, and its terms by them."""

    def __init__(self, form: str, sizes: Sizes, count: str) -> None:
        n, k, r = sizes.experts, sizes.top_k, sizes.rank
        self.executed = count == "executed"  # the products as the code has them, zeros included
        ours = self.executed and form in ("literal", "folded")  # all experts run as one product, the GRU is padded
        self.sizes, self.D, self.F, self.k, self.e = sizes, sizes.hidden, sizes.intermediate, k, sizes.element
        self.G = padded(sizes.gru_width) if ours else sizes.gru_width
        self.low = r * (n if ours else k)  # the width of a token's low-rank activations
        self.low_rows = r * (n if ours else sizes.used_experts)  # rows of A (columns of B) read for it
        self.used = r * sizes.used_experts  # the same of the experts that tokens chose
        zeros = ours and sizes.mixed
        self.hidden_low = r * (n if zeros else k)  # what B of gate and up and A of down multiply
        # Twice n*r where gate and up share one product, with zeros for the other's part.
        self.both_low = 2 * n * r if zeros else k * r

    def product(
        self,
        name: str,
        inner: int,
        outer: int,
        *,
        weights: int | None = None,
        read: int | None = None,
        written: int | None = None,
        times: int = 1,
    ) -> Term:
        """Count a product with a matrix [outer, inner], ``times`` over; what is given in its place is in elements."""
        product = inner * outer
        moved = (product if weights is None else weights, inner if read is None else read)
        bytes_ = (times * self.e * elements for elements in (*moved, outer if written is None else written))
        return Term(name, times * product, *bytes_)

    def pointwise(self, name: str, read: int, written: int) -> Term:
        return Term(name, read=read * self.e, written=written * self.e)

    def dense(self) -> list[Term]:
        return [self.base_in(), self.pointwise("SwiGLU", 2 * self.F, self.F), self.base_down()]

    def literal(self, t: int) -> list[Term]:
        first = [*self.routers(self.D, "router"), self.base_in(), self.low_rank_A()]
        return [*first, *self.experts(updated=False), *self.down(), *self.join(t)]

    def peers(self, t: int) -> list[Term]:
        """List a peer's round: each expert gathers its tokens, projects them down by the shared W_D, and is added."""
        if self.sizes.mixed:  # an expert is a LoRA pair on each linear, not an MLP: nothing is projected down twice
            return self.literal(t)
        D, F, k, low, used = self.D, self.F, self.k, self.low, self.used
        return [
            *self.routers(D, "router"),
            self.base_in(),
            self.product("low-rank A (gate, up)", D, 2 * low, weights=2 * used * D, read=k * D),
            self.product("low-rank B (gate, up)", 2 * low, F, weights=2 * used * F, written=0),
            self.pointwise("SwiGLU", 2 * k * F, k * F),
            self.product("base down", F, k * D, weights=self.sizes.used_experts * D * F, read=k * F),
            self.product("down A", F, low, weights=used * F, read=k * F),
            self.product("down B", low, D, weights=used * D, written=0),
            self.pointwise("combine", k * D, D),
            *self.join(t),
        ]

    def folded(self, t: int) -> list[Term]:
        D, F, G, last = self.D, self.F, self.G, t == self.sizes.rounds
        if t == 1:
            terms = [*self.routers(D, "router"), self.base_in(), self.low_rank_A()]
        else:
            # Every call of the operator computes the update, and with DoRA on chosen experts there is one per slot.
            update = self.product("fold update H M^T", G, 2 * F, written=0, times=self.sizes.down_products)
            terms = [*self.routers(G, "router update"), update]
        terms += self.experts(updated=t > 1)
        if last or self.sizes.dora:  # DoRA's vectors stand between W_D and the GRU's weights: y is formed
            terms += self.down()
        if last:
            return terms
        if self.sizes.dora:
            terms.append(self.product("GRU input", D, 3 * G))
        else:
            terms.append(self.product("GRU input Q c", F, 3 * G))
            terms.append(self.product("GRU input of z", self.low, 3 * G, weights=self.low_rows * 3 * G, written=0))
        # The step reads its input and, from the second on, the recurrent gates, h and H; it writes h and H.
        state = 0 if t == 1 else G
        step = self.product("GRU candidate, h and H", state, G, read=3 * G + 4 * state, written=2 * G)
        return [*terms, step, self.reread(before_last=t == self.sizes.rounds - 1)]

    def base_in(self) -> Term:
        return self.product("base gate, up", self.D, 2 * self.F)

    def base_down(self, times: int = 1) -> Term:
        return self.product("base down", self.F, self.D, times=times)

    def routers(self, inner: int, name: str) -> list[Term]:
        """List the routers that read x or H, of ``inner`` columns, and the down projection's own (it reads hidden)."""
        n, wide = self.sizes.experts, self.sizes.router_element

        def router(name: str, inner: int, times: int = 1) -> Term:
            return Term(name, times * n * inner, times * n * inner * wide, inner * self.e, times * n * wide)

        if self.sizes.routers == "none":
            return []
        if not self.sizes.mixed:
            return [router(name, inner)]
        return [router(name, inner, times=2), router("router of down", self.F)]

    def low_rank_A(self) -> Term:
        return self.product("low-rank A (gate, up)", self.D, 2 * self.low, weights=2 * self.low_rows * self.D)

    def experts(self, updated: bool) -> list[Term]:
        """List the terms of one `graphmoe_kernels.expert_swiglu` but for the product with M, for chosen experts only.

        ``updated``: the low-rank activations are the sum of two tensors, the first round's and their update.
        """
        F, low, used, downs = self.F, self.hidden_low, self.used, self.sizes.down_products
        read = 2 * low * (1 + updated)
        return [
            *self.mixed_vectors(2 * F, moved=2 * F * self.e),
            self.product("low-rank B (gate, up)", 2 * self.both_low, F, weights=2 * used * F, read=read, written=0),
            self.pointwise("SwiGLU, combine", 2 * F * downs, F * downs),
            self.product("down A", F, low, weights=used * F, read=0, written=self.low),
        ]

    def down(self) -> list[Term]:
        """List the terms from hidden and low_down to y: the base down projection, with DoRA once per slot, and B."""
        down_B = self.product("down B", self.low, self.D, weights=self.low_rows * self.D, written=0)
        return [self.base_down(self.sizes.down_products), down_B, *self.mixed_vectors(self.D)]

    def mixed_vectors(self, width: int, moved: int = 0) -> list[Term]:
        """List DoRA's scaling of mixed experts: (1 + sum_i p_i (m_i - 1)) times ``width`` columns; vectors in fp32."""
        if not (self.sizes.dora and self.sizes.mixed):
            return []
        vectors = self.sizes.experts * width
        return [Term("mixture of DoRA's vectors", vectors, 4 * vectors, moved, moved)]

    def join(self, t: int) -> list[Term]:
        """List the terms from y_t to x_{t+1}: the GRU reads y, and x_{t+1} = x_t + W_g h is formed."""
        if t == self.sizes.rounds:
            return []
        D, G = self.D, self.G
        state = 0 if t == 1 else G
        return [
            self.product("GRU input", D, 3 * G),
            self.product("GRU recurrent", state, 3 * G, read=3 * G + state, written=G),
            self.product("next x (W_g h)", G, D, read=G + D),
        ]

    def reread(self, before_last: bool) -> Term:
        """Count the product after a GRU step: W_z and W_r read h, the A W_g of the experts read H.

        Needed are those two products, and before the last round the second alone. Executed is always one product of
        both side by side, with a matrix that is half zeros.
        """
        G, low, rows = self.G, 2 * self.low, 2 * self.low_rows
        inner, gates, read = G, 2 * G, 2 * G
        if self.executed:
            inner = 2 * G
        elif before_last:
            gates, read = 0, G
        return self.product("A W_g of H, gates of h", inner, low + gates, weights=inner * (rows + gates), read=read)

"""How much memory a case takes: what does not fit is skipped and says so, before it takes the machine with it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import OPERATOR_GROUPS, Case, Contender
from benchmarks.sizes import VOCABULARY
from graphmoe_kernels.cost import Sizes, fold_bytes

# Tensors [N, F] that a provider holds at once: in inference, and a round in training, where they are kept for the
# backward (experts' rows of a peer are top-k times as many).
WIDE = {"inference": 12, "training": 20}
# Bytes an fp64 value.
EXACT = 8


class TooLarge(Exception):
    """A case does not fit in memory."""


def needed_bytes(case: Case) -> int:
    """An upper estimate: weights, their fp64 copies for the oracle, kept folds, the activations of the largest."""
    if case.mode in ("generate", "profile"):
        return _whole_model(case)
    layers = {(c.sizes.experts, c.sizes.rank): c.sizes for c in case.contenders}
    if case.group in (*OPERATOR_GROUPS, "check", "kernels", "tune"):
        alone = case.contenders[0]._replace(sizes=replace(case.contenders[0].sizes, rounds=1))
        return 3 * _activations(alone, case.mode) + 2 * sum(fold_bytes(case.contenders[0].sizes).values())
    first = case.contenders[0].sizes
    base = 3 * first.hidden * first.intermediate * (first.element + EXACT * len(layers))  # each has its own oracle
    adapters = sum(_adapter(s) * (s.element + EXACT) for s in layers.values())
    folds = sum(sum(fold_bytes(c.sizes, "executed").values()) for c in case.contenders if c.provider in FOLDING)
    inputs = 8 * first.tokens * first.hidden * first.element
    attention = 0
    if case.group == "decoder":
        m = case.model
        attention = first.element * 2 * m.hidden * m.head_dim * (m.heads + m.kv_heads)
        attention += first.element * 8 * (first.tokens + (case.context or 0)) * m.hidden
    return base + adapters + folds + inputs + attention + max(_activations(c, case.mode) for c in case.contenders)


FOLDING = ("triton", "torch")


def check_fits(case: Case, free: int | None) -> None:
    """Raises:
    TooLarge: the case needs more than is free, and how much.
    """
    needed = needed_bytes(case)
    if free is not None and needed > free:
        raise TooLarge(f"needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")


def _activations(contender: Contender, mode: str) -> int:
    s = contender.sizes
    one = s.tokens * s.intermediate * max(s.element, 4)  # some intermediates are fp32
    copies = s.top_k if contender.provider in ("peer_mixlora", "mixlora") else 1
    if mode != "training":
        return WIDE["inference"] * copies * one
    return WIDE["training"] * copies * s.rounds * one


def _adapter(s: Sizes) -> int:
    experts = 3 * s.experts * s.rank * (s.hidden + s.intermediate)
    return experts + s.experts * s.hidden + s.gru_width * (3 * (s.gru_width + s.hidden) + s.hidden)


def _whole_model(case: Case) -> int:
    s, m = case.contenders[0].sizes, case.model
    layers = case.layers
    base = 2 * VOCABULARY * m.hidden
    base += layers * m.hidden * (3 * m.intermediate + 2 * m.head_dim * (m.heads + m.kv_heads))
    adapters = layers * len(case.contenders) * _adapter(s)
    folds = layers * len(case.contenders) * sum(fold_bytes(s, "executed").values())
    return (base + adapters) * (s.element + EXACT) + folds

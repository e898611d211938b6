"""Sums over the terms: a layer's multiply-adds and bytes, and what the fold costs to build and to keep."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from graphmoe_kernels.cost.sizes import Sizes
from graphmoe_kernels.cost.terms import Term, round_terms
from graphmoe_kernels.rethinking.weights import padded


def layer_terms(form: str, sizes: Sizes, count: str = "needed") -> list[Term]:
    """List the terms of all rounds, equal names added up, in order of first appearance."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for t in range(1, sizes.rounds + 1):
        for name, *counts in round_terms(form, sizes, t, count):
            found.setdefault(name, []).append(tuple(counts))
    return [Term(name, *map(sum, zip(*counts, strict=True))) for name, counts in found.items()]


def multiply_adds(form: str, sizes: Sizes, count: str = "needed") -> int:
    """Count the multiply-adds per token through all rounds."""
    return sum(term.multiply_adds for term in layer_terms(form, sizes, count))


def further_round(form: str, sizes: Sizes, count: str = "needed") -> int:
    """Count the multiply-adds per token for each round after the second."""
    two, three = replace(sizes, rounds=2), replace(sizes, rounds=3)
    return multiply_adds(form, three, count) - multiply_adds(form, two, count)


class Traffic(NamedTuple):
    """Bytes read (weights and activations) and written by one call over all its tokens and rounds."""

    read: int
    written: int


def traffic(form: str, sizes: Sizes, count: str = "needed") -> Traffic:
    """Count the bytes of one call; see `round_terms` for what they assume.

    Weights are read again in every round that uses them: a layer's do not fit into a cache. At least as many tokens as
    experts are assumed to use all experts.
    """
    terms = layer_terms(form, sizes, count)
    read = sum(term.weights + sizes.tokens * term.read for term in terms)
    return Traffic(read, sizes.tokens * sum(term.written for term in terms))


def fold_build(sizes: Sizes, count: str = "needed") -> dict[str, int]:
    """Count the multiply-adds of building the fold once, by product. M and Q need almost all; the rest is a hundredth.

    With DoRA there is no Q, and the experts' norms come with it (`prepare_build`).
    """
    D, F, G = sizes.hidden, sizes.intermediate, _fold_width(sizes, count)
    low = sizes.experts * sizes.rank
    found = {
        "M = [W_G; W_U] W_g": 2 * F * D * G,
        "Q = W^y W_D": 0 if sizes.dora else 3 * G * D * F,
        "A W_g": 2 * low * D * G,
        "W^y B_D": 0 if sizes.dora else 3 * G * D * low,
        "R W_g": _input_routers(sizes) * D * G,
        "DoRA's norms": prepare_build(sizes),
    }
    return {name: value for name, value in found.items() if value}


def prepare_build(sizes: Sizes) -> int:
    """Count the multiply-adds of preparing the experts once: with DoRA the norms of W + s B A, by W A^T and A A^T."""
    if not sizes.dora:
        return 0
    D, F, n, r = sizes.hidden, sizes.intermediate, sizes.experts, sizes.rank
    linears = ((D, F), (D, F), (F, D))  # in and out
    return sum(n * r * (inner * outer + r * inner + r * outer) for inner, outer in linears)


def _input_routers(sizes: Sizes) -> int:
    """Count the rows of the routers that read x."""
    return {"layer": 1, "linear": 2, "none": 0}[sizes.routers] * sizes.experts


def fold_bytes(sizes: Sizes, count: str = "needed") -> dict[str, int]:
    """Count the bytes that a kept fold holds, by tensor. M and Q are most of it.

    ``executed`` also has what the code keeps at hand with it: the GRU's own matrices at their padded width, the zeros
    in the matrix that h and H are multiplied with, and the experts in the compute dtype, of mixed experts B of gate and
    up with zeros for each other's part, beside M once more. The experts are all that a layer of one round keeps.
    """
    F, G, e = sizes.intermediate, _fold_width(sizes, count), sizes.element
    low = sizes.experts * sizes.rank
    if sizes.dora:
        found = {"M": 2 * F * G * e, "W^y": 3 * G * sizes.hidden * e, "A W_g": 2 * low * G * e}
    else:
        found = {"M": 2 * F * G * e, "Q": 3 * G * F * e, "A W_g, W^y B_D": 5 * low * G * e}
    found["R W_g"] = _input_routers(sizes) * G * sizes.router_element
    if count == "executed":
        found["GRU, padded"] = (3 * G * G + G + sizes.hidden * G) * e
        found["zeros beside A W_g and the gates"] = (2 * low + 2 * G) * G * e
        vectors = sizes.experts * (2 * F + sizes.hidden) * max(4, e) if sizes.dora else 0
        zeros = 2 * low * F * e if sizes.mixed else 0
        found["experts"] = 3 * low * (sizes.hidden + F) * e + zeros + vectors
        if sizes.mixed and not sizes.dora:
            found["B beside M"] = 4 * low * F * e
    return found


def _fold_width(sizes: Sizes, count: str) -> int:
    return padded(sizes.gru_width) if count == "executed" else sizes.gru_width

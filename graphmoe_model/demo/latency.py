"""How long one layer takes for T rounds, computed literally and folded: the part of the demo about speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.ffn import FusedGraphMoEFFN

AGREEMENT = 1e-4  # of the two forms in fp32, relative to the norm of the output


class RoundLatency(NamedTuple):
    """Median milliseconds of one forward of a layer with this many rounds."""

    rounds: int
    literal_ms: float
    folded_ms: float


def measure_latency(
    hidden: int = 768,
    intermediate: int = 2304,
    tokens: int = 256,
    repeats: int = 7,
    max_rounds: int = 4,
    seed: int = 0,
) -> list[RoundLatency]:
    """Time the literal and the folded form of one fp32 layer on one CPU thread, in evaluation, T = 1..max_rounds.

    The layer has ``GraphMoEConfig``'s default sizes and random weights in every expert and in the GRU. All
    pairs of T and form run in turn, ``repeats`` times after a warm-up turn (which builds the folds), so that
    whatever else the machine does meets all of them alike. With T = 1 there is nothing to fold.

    Raises:
        ValueError: a size below 1.
        RuntimeError: the two forms disagree, so there is nothing to compare.
    """
    sizes = {"hidden": hidden, "intermediate": intermediate, "tokens": tokens}
    for name, value in {**sizes, "repeats": repeats, "max_rounds": max_rounds}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _one_thread():
        torch.manual_seed(seed)
        mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate))
        x = torch.randn(tokens, hidden)
        pairs = [_both_forms(mlp, rounds, seed) for rounds in range(1, max_rounds + 1)]
        for rounds, (literal, folded) in enumerate(pairs, start=1):
            _check_agreement(literal(x), folded(x), rounds)
        layers = [layer for pair in pairs for layer in pair]
        times: list[list[float]] = [[] for _ in layers]
        for turn in range(repeats + 1):
            for layer, taken in zip(layers, times, strict=True):
                start = time.perf_counter()
                layer(x)
                if turn > 0:
                    taken.append(1000 * (time.perf_counter() - start))
    medians = [median(taken) for taken in times]
    return [RoundLatency(t + 1, medians[2 * t], medians[2 * t + 1]) for t in range(max_rounds)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take many times longer, and say nothing about the forms."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _both_forms(mlp: LlamaMLP, rounds: int, seed: int) -> tuple[FusedGraphMoEFFN, FusedGraphMoEFFN]:
    """A literal and a folded layer around one MLP, with the same adapter weights."""
    layers = []
    for fold in ("never", "always"):
        torch.manual_seed(seed)
        layers.append(FusedGraphMoEFFN(mlp, GraphMoEConfig(rounds=rounds, init_lora_weights=False, fold=fold)).eval())
    return layers[0], layers[1]


def _check_agreement(literal: Tensor, folded: Tensor, rounds: int) -> None:
    error = float((literal - folded).norm() / literal.norm())
    if not error < AGREEMENT:  # also when it is nan
        raise RuntimeError(
            f"with {rounds} rounds the folded output differs from the literal one by {error:.1e} relative, expected "
            f"less than {AGREEMENT:.0e}; the times of different results cannot be compared"
        )

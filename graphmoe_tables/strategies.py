"""The ways to lay a training run over processes, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Sharding(StrEnum):
    """What is split over the processes, by whom."""

    none = "nothing"
    ddp = "nothing, but gradients are averaged in buckets of their own"
    fsdp2 = "all weights, gradients and optimizer state"
    zero2 = "gradients and optimizer state"
    zero3 = "all weights, gradients and optimizer state, by DeepSpeed"


@dataclass(frozen=True)
class Strategy:
    """One way to train.

    Attributes:
        sharding: over the processes.
        quantised: whether the linears of the base's decoder layers are in 4 bits.
    """

    sharding: Sharding
    quantised: bool = False

    @property
    def deepspeed(self) -> bool:
        """Whether gradients are in bf16, and copies of them and of the weights in fp32 beside the optimizer's state."""
        return self.sharding in (Sharding.zero2, Sharding.zero3)

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds a part of each weight, and gathers a layer's while it runs."""
        return self.sharding in (Sharding.fsdp2, Sharding.zero3)


STRATEGIES = {
    "single": Strategy(Sharding.none),
    "single-4bit": Strategy(Sharding.none, quantised=True),
    "ddp": Strategy(Sharding.ddp),
    "ddp-4bit": Strategy(Sharding.ddp, quantised=True),
    "fsdp2": Strategy(Sharding.fsdp2),
    "fsdp2-4bit": Strategy(Sharding.fsdp2, quantised=True),
    "zero2": Strategy(Sharding.zero2),
    "zero3": Strategy(Sharding.zero3),
}


def check_strategies(names: Iterable[str]) -> None:
    """Raise ``ValueError`` for a name that `STRATEGIES` does not have."""
    for name in names:
        if name not in STRATEGIES:
            raise ValueError(f"unknown strategy {name!r}; there are {', '.join(STRATEGIES)}")


def check_run(gpus: int, tokens: int, loss_tokens: int | None = None) -> None:
    """Raise ``ValueError`` for fewer than one GPU, or than two tokens on each (one has no next one to predict), or a
    loss on more tokens than there are, or on none."""
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {tokens}")
    if loss_tokens is not None and not 1 <= loss_tokens <= tokens:
        raise ValueError(
            f"loss_tokens are those of the {tokens} tokens that have a loss: from 1 to {tokens}, got {loss_tokens}"
        )

"""How a training run lays a model over its processes: what each of them holds, and in which dtype.

The figures are those of AdamW under bf16 mixed precision, as Trainer and the files in ``docs/configs`` set them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from graphmoe_model.memory.parameter_counts import ParameterCounts

BF16, FP32 = 2, 4
ADAM = 2 * FP32  # both moments of an element
# bitsandbytes' 4 bits with double quantisation: a byte for every 64 elements, and an fp32 for every 256 such bytes.
PACKED, CONSTANTS = 1 / 2, 1 / 64 + FP32 / (64 * 256)
# Elements, as docs/configs/zero2.json and zero3.json have them.
REDUCE_BUCKET = 50_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000


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

    def held(self, counts: ParameterCounts, gpus: int) -> dict[str, int]:
        """Bytes on each of the ``gpus`` that are there all the time, by what they are."""
        weights = gpus if self.shards_weights else 1
        optimizer = gpus if self.shards_weights or self.deepspeed else 1
        gradient, state = (BF16 + FP32, FP32 + ADAM) if self.deepspeed else (FP32, ADAM)
        # ZeRO-2 casts the model to bf16. Under ZeRO-3 the base is read as such, and the adapter stays as it was made.
        adapter = BF16 if self.sharding == Sharding.zero2 else FP32
        return {
            "base weights": self._base(counts, weights),
            "adapter weights": adapter * counts.adapter // weights,
            "gradients": gradient * counts.adapter // optimizer,
            "optimizer state": state * counts.adapter // optimizer,
            "buffers": self._buffers(counts),
        }

    def _base(self, counts: ParameterCounts, parts: int) -> int:
        split = self._linears(counts.linears) + BF16 * counts.others
        # The constants are no parameters, so nobody splits them.
        return int(split / parts + CONSTANTS * counts.linears * self.quantised)

    def _linears(self, elements: int) -> float:
        return (PACKED if self.quantised else BF16) * elements

    def _buffers(self, counts: ParameterCounts) -> int:
        """What gradients are averaged in."""
        if self.sharding == Sharding.ddp:
            return FP32 * counts.adapter
        return BF16 * REDUCE_BUCKET if self.deepspeed else 0

    def gathered_in_loss(self, counts: ParameterCounts) -> int:
        """Bytes of whole weights that a process has while the loss is computed."""
        if self.sharding == Sharding.fsdp2:  # the head, and the last layer's gathered for its backward: sent, unpacked
            return BF16 * counts.head + 2 * self._layer(counts)
        return self._live(counts)

    def gathered_in_layer(self, counts: ParameterCounts) -> int:
        """Bytes of whole weights that a process has while one layer runs."""
        dequantised = BF16 * counts.layer_mlp if self.quantised else 0  # a fold reads all of an MLP's
        if self.sharding == Sharding.fsdp2:  # the layer that runs, and the next one's: sent, unpacked
            return 3 * self._layer(counts) + dequantised
        return self._live(counts) + dequantised

    def _layer(self, counts: ParameterCounts) -> int:
        return int(self._linears(counts.layer_linears)) + BF16 * (counts.layer_others + counts.layer_adapter)

    def _live(self, counts: ParameterCounts) -> int:
        if self.sharding != Sharding.zero3:
            return 0
        layer = counts.layer_linears + counts.layer_others + counts.layer_adapter
        return BF16 * min(counts.base + counts.adapter, max(MAX_LIVE, layer) + PREFETCH_BUCKET)


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

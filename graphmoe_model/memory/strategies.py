"""How a training run lays a model over its processes: what each of them holds, and in which dtype.

The figures are those of AdamW under bf16 mixed precision, as Trainer and the files in ``docs/configs`` set them up.
"""

from __future__ import annotations

from graphmoe_model.memory.parameter_counts import ParameterCounts
from graphmoe_tables.strategies import Sharding, Strategy

BF16, FP32 = 2, 4
ADAM = 2 * FP32  # both moments of an element
# bitsandbytes' 4 bits with double quantisation: a byte for every 64 elements, and an fp32 for every 256 such bytes.
PACKED, CONSTANTS = 1 / 2, 1 / 64 + FP32 / (64 * 256)
# Elements, as docs/configs/zero2.json and zero3.json have them.
REDUCE_BUCKET = 50_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000


def held(strategy: Strategy, counts: ParameterCounts, gpus: int) -> dict[str, int]:
    """Compute the bytes on each of the ``gpus`` that are there all the time, by what they are."""
    weights = gpus if strategy.shards_weights else 1
    optimizer = gpus if strategy.shards_weights or strategy.deepspeed else 1
    gradient, state = (BF16 + FP32, FP32 + ADAM) if strategy.deepspeed else (FP32, ADAM)
    # ZeRO-2 casts the model to bf16. Under ZeRO-3 the base is read as such, and the adapter stays as it was made.
    adapter = BF16 if strategy.sharding == Sharding.zero2 else FP32
    return {
        "base weights": _base(strategy, counts, weights),
        "adapter weights": adapter * counts.adapter // weights,
        "gradients": gradient * counts.adapter // optimizer,
        "optimizer state": state * counts.adapter // optimizer,
        "buffers": _buffers(strategy, counts),
    }


def _base(strategy: Strategy, counts: ParameterCounts, parts: int) -> int:
    split = _linears(strategy, counts.linears) + BF16 * counts.others
    # The constants are no parameters, so nobody splits them.
    return int(split / parts + CONSTANTS * counts.linears * strategy.quantised)


def _linears(strategy: Strategy, elements: int) -> float:
    return (PACKED if strategy.quantised else BF16) * elements


def _buffers(strategy: Strategy, counts: ParameterCounts) -> int:
    """Compute the bytes of the buffers that gradients are averaged in."""
    if strategy.sharding == Sharding.ddp:
        return FP32 * counts.adapter
    return BF16 * REDUCE_BUCKET if strategy.deepspeed else 0


def gathered_in_loss(strategy: Strategy, counts: ParameterCounts) -> int:
    """Compute the bytes of whole weights that a process has while the loss is computed."""
    if strategy.sharding == Sharding.fsdp2:  # the head, and the last layer's gathered for its backward: sent, unpacked
        return BF16 * counts.head + 2 * _layer(strategy, counts)
    return _live(strategy, counts)


def gathered_in_layer(strategy: Strategy, counts: ParameterCounts) -> int:
    """Compute the bytes of whole weights that a process has while one layer runs."""
    dequantised = BF16 * counts.layer_mlp if strategy.quantised else 0  # a fold reads all of an MLP's
    if strategy.sharding == Sharding.fsdp2:  # the layer that runs, and the next one's: sent, unpacked
        return 3 * _layer(strategy, counts) + dequantised
    return _live(strategy, counts) + dequantised


def _layer(strategy: Strategy, counts: ParameterCounts) -> int:
    return int(_linears(strategy, counts.layer_linears)) + BF16 * (counts.layer_others + counts.layer_adapter)


def _live(strategy: Strategy, counts: ParameterCounts) -> int:
    if strategy.sharding != Sharding.zero3:
        return 0
    layer = counts.layer_linears + counts.layer_others + counts.layer_adapter
    return BF16 * min(counts.base + counts.adapter, max(MAX_LIVE, layer) + PREFETCH_BUCKET)

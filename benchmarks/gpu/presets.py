"""At which sizes the report runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphmoe_kernels.cost import Sizes


@dataclass(frozen=True)
class Preset:
    """A layer's sizes, and the token counts and limits' sizes of a run.

    Attributes:
        sizes: the layer; tokens and rounds are set case by case.
        test: the same compiled kernels on small tensors: what every kernel is checked on first.
        decode, prefill: token counts; main: the one of the targets.
        rounds: T, the most important first.
        many: how many experts a layer of many has.
        copy_bytes, matrix: what the limits are measured on.
        seconds: of timing a case.
    """

    sizes: Sizes
    test: Sizes
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    main: int
    rounds: tuple[int, ...]
    many: int
    copy_bytes: int
    matrix: tuple[int, int, int]
    seconds: float

    def at(self, tokens: int, rounds: int = 3, experts: int | None = None) -> Sizes:
        """The layer's sizes in one case."""
        return replace(self.sizes, tokens=tokens, rounds=rounds, experts=experts or self.sizes.experts)


PRESETS = {
    "llama-3-8b": Preset(
        sizes=Sizes(4096, 14336, 409, dtype="bf16"),
        test=Sizes(256, 336, 32, tokens=96, dtype="bf16"),
        decode=(1, 16, 64),
        prefill=(512, 2048, 8192),
        main=8192,
        rounds=(3, 1, 2),
        many=64,
        copy_bytes=2 * 2**30,
        matrix=(8192, 14336, 4096),
        seconds=0.4,
    ),
    # For the code path alone, in Triton's interpreter, which has no bf16.
    "tiny": Preset(
        sizes=Sizes(32, 32, 5, experts=3, rank=4, dtype="fp32"),
        test=Sizes(32, 32, 5, experts=3, rank=4, tokens=5, dtype="fp32"),
        decode=(1,),
        prefill=(3,),
        main=3,
        rounds=(2, 1),
        many=4,
        copy_bytes=2**16,
        matrix=(32, 32, 32),
        seconds=0.0,
    ),
}

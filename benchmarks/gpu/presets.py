"""At which sizes the report runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import PLANS, Plan
from benchmarks.limits import LIMIT_SIZES
from benchmarks.sizes import MODELS, Model
from graphmoe_kernels.cost import Sizes


@dataclass(frozen=True)
class Preset:
    """What a run takes its steps from.

    Attributes:
        model: whose layers are timed.
        dtype: of everything.
        plan: the token counts of the cases.
        test: the same compiled kernels on small tensors: what every kernel is checked on first.
        many: how many experts a layer of many has.
        copy_bytes, matrix: what the limits are measured on.
        seconds: of timing a case.
    """

    model: Model
    dtype: str
    plan: Plan
    test: Sizes
    many: int
    copy_bytes: int
    matrix: tuple[int, int, int]
    seconds: float

    def at(self, tokens: int, rounds: int = 3, experts: int | None = None) -> Sizes:
        """The layer's sizes in one case."""
        return self.model.sizes(tokens, rounds, self.dtype, experts=experts)


PRESETS = {
    "llama-3-8b": Preset(
        model=MODELS["llama-3-8b"],
        dtype="bf16",
        plan=PLANS["cuda"],
        test=Sizes(256, 336, 32, tokens=96, dtype="bf16"),
        many=64,
        copy_bytes=LIMIT_SIZES["cuda"][0],
        matrix=LIMIT_SIZES["cuda"][1],
        seconds=0.5,
    ),
    # For the code path alone, in Triton's interpreter, which has no bf16.
    "tiny": Preset(
        model=Model("tiny", 32, 32, heads=2, kv_heads=1, head_dim=16, experts=3, rank=4),
        dtype="fp32",
        plan=Plan((1,), (4,), batch=2, context=3, whole_layers=1, prompt=3, new_tokens=2, profiled=(4,)),
        test=Sizes(32, 32, 5, experts=3, rank=4, tokens=5, dtype="fp32"),
        many=4,
        copy_bytes=2**16,
        matrix=(32, 32, 32),
        seconds=0.0,
    ),
}

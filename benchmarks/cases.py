"""A case: contenders that are timed in turns with each other, so that their ratios mean something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.sizes import Model
from graphmoe_kernels.cost import Sizes

GROUPS = {
    "check": "every operator's kernels against fp64, without a time",
    "routing": "router product, top-k softmax",
    "expert_swiglu": "one round of the experts",
    "gru_step": "one step of the GRU",
    "kernels": "every Triton kernel alone, without its launch (on a GPU)",
    "layer": "a whole layer: inference, and a training step with its peak memory",
    "step": "a training step as users train: with dropout and r = 8, at T = 1 and T = 3, folded and literal",
    "rounds": "the layer at T = 1..5: what each further round costs",
    "decoder": "a whole decoder layer: prefill, and decode with a cache",
    "model": "tokens a second of generate, on a small whole model",
    "profile": "where the time of that model goes: attention, MLP, experts, routing, GRU",
    "host": "CPU time of a layer's call and of generate, at sizes where it is all that there is",
    "methods": "a layer of every method of the paper, at T = 1 and T = 3",
    "scaling": "time against tokens, experts, rank and top-k",
    "tune": "configurations of the kernels; it rewrites the files of those that win",
}
# Long, and of interest to few: run when they are asked for.
NOT_BY_DEFAULT = ("step", "methods", "scaling", "tune")
OPERATOR_GROUPS = ("routing", "expert_swiglu", "gru_step")
AXES = {"rounds": "T={}", "tokens": "{} tokens", "experts": "n={}", "rank": "r={}", "top_k": "k={}"}


class Contender(NamedTuple):
    """A provider at some sizes, by its name in its case."""

    provider: str
    sizes: Sizes
    label: str


class Case(NamedTuple):
    """Contenders that are timed in turns with each other."""

    group: str  # a name of `GROUPS`
    model: Model
    # "inference" or "training" (forward and backward); of a decoder layer "prefill" or "decode"; of a model "generate"
    # or "profile"; of the host's time also "launches stubbed".
    mode: str
    contenders: tuple[Contender, ...]
    axis: str | None = None  # the field of the sizes in which its contenders differ, or "method"
    graph: bool = False  # as a replayed CUDA graph, those of its contenders that one can hold
    operator: str = ""  # of checks and kernels
    later: bool | None = None  # of an operator: whether it is called as in a round after the first
    batch: int = 1  # sequences among which the tokens are divided (decoder)
    context: int | None = None  # tokens in the cache before the call (decoder, model)
    layers: int = 1  # of a whole model, and
    new_tokens: int = 1  # made by `generate`
    lengths: tuple[int, ...] = ()  # of profiled sequences
    dropout: float = 0.0  # on the input of every A of the layer's adapter while it is timed
    note: str = ""  # what distinguishes it from a case that is otherwise alike

    @property
    def name(self) -> str:
        """Unique in a table."""
        s, axis = self.sizes, self.axis
        parts = [self.group, *([self.operator] if self.operator else []), self.model.name, self.mode]
        if self.later is not None:
            parts.append("later round" if self.later else "first round")
        if self.context is not None:
            parts.append(f"context {self.context}")
        fields = ("tokens",) if self.group in OPERATOR_GROUPS else ("tokens", "rounds", "experts")
        if axis == "method":
            fields = ("tokens",)
        parts += [AXES[field].format(getattr(s, field)) for field in fields if field != axis]
        parts += [f"by {axis}"] if axis else []
        return ", ".join([*parts, s.dtype, *([self.note] if self.note else [])])

    @property
    def sizes(self) -> Sizes:
        """Of its first contender."""
        return self.contenders[0].sizes

    def keep(self, providers: Sequence[str]) -> Case:
        """The case with those of its contenders whose provider is among ``providers``."""
        return self._replace(contenders=tuple(c for c in self.contenders if c.provider in providers))

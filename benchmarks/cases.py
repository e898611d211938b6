"""The table of cases: what is timed side by side, at which sizes, by which providers.

A case is a set of contenders that are timed in turns with each other, so that their ratios mean something. `table` is
the whole list for a model's sizes on a kind of device; `pytest benchmarks` and the GPU report both take theirs from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.document import WITHOUT_ROUNDS
from benchmarks.sizes import METHODS, Model, method_of
from graphmoe_kernels.cost import Sizes

GROUPS = {
    "routing": "router product, top-k softmax",
    "expert_swiglu": "one round of the experts",
    "gru_step": "one step of the GRU",
    "layer": "a whole layer: inference, and a training step with its peak memory",
    "rounds": "the layer at T = 1..5: what each further round costs",
    "decoder": "a whole decoder layer: prefill, and decode with a cache",
    "model": "tokens a second of generate, on a small whole model",
    "profile": "where the time of that model goes: attention, MLP, experts, routing, GRU",
    "methods": "a layer of every method of the paper, at T = 1 and T = 3",
    "scaling": "time against tokens, experts, rank and top-k",
}
# Long, and of interest to few: run when they are asked for.
NOT_BY_DEFAULT = ("methods", "scaling")
OPERATORS = ("routing", "expert_swiglu", "gru_step")
MAX_ROUNDS = 5
AXES = {"rounds": "T={}", "tokens": "{} tokens", "experts": "n={}", "rank": "r={}", "top_k": "k={}"}


class Contender(NamedTuple):
    """A provider at some sizes; ``axis`` is the field of the sizes in which the contenders of its case differ, or
    ``"method"``, for which several of them stand."""

    provider: str
    sizes: Sizes
    axis: str | None = None

    @property
    def label(self) -> str:
        """Its name in its case."""
        if self.axis is None or (self.provider in WITHOUT_ROUNDS and self.axis in ("rounds", "method")):
            return self.provider
        if self.axis == "method":
            return f"{self.provider}, {method_of(self.sizes)}"
        return f"{self.provider}, {AXES[self.axis].format(getattr(self.sizes, self.axis))}"


class Case(NamedTuple):
    """Contenders that are timed in turns with each other.

    Attributes:
        group: a name of `GROUPS`.
        model: whose sizes they have.
        mode: ``"inference"`` or ``"training"`` (forward and backward); of a decoder layer ``"prefill"`` or
            ``"decode"``; of a model ``"generate"``.
        contenders: who is timed.
        graph: as a replayed CUDA graph, those of its contenders that one can hold.
        later: of an operator: whether it is called as in a round after the first.
        batch: sequences among which the tokens are divided (decoder).
        context: tokens in the cache before the call (decoder, model).
        note: what distinguishes it from a case that is otherwise alike.
    """

    group: str
    model: Model
    mode: str
    contenders: tuple[Contender, ...]
    graph: bool = False
    later: bool | None = None
    batch: int = 1
    context: int | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """Unique in a table."""
        s, axis = self.contenders[0].sizes, self.contenders[0].axis
        parts = [self.group, self.model.name, self.mode]
        if self.later is not None:
            parts.append("later round" if self.later else "first round")
        if self.context is not None:
            parts.append(f"context {self.context}")
        fields = ("tokens",) if self.group in OPERATORS else ("tokens", "rounds", "experts")
        if axis == "method":
            fields = ("tokens",)
        parts += [AXES[field].format(getattr(s, field)) for field in fields if field != axis]
        parts += [f"by {axis}"] if axis else []
        return ", ".join([*parts, s.dtype, *([self.note] if self.note else [])])

    def keep(self, providers: Sequence[str]) -> Case:
        """The case with those of its contenders whose provider is among ``providers``."""
        return self._replace(contenders=tuple(c for c in self.contenders if c.provider in providers))


class Plan(NamedTuple):
    """At which token counts a table is made.

    Attributes:
        decode, prefill: of the layer, ascending; the last of ``prefill`` is the main one.
        routing: further ones for the routing alone.
        batch, context: of the decoder layer's prefill and decode.
        decoder: of training steps, of the decoder layer's prefill and of the rounds, where it is not the main one.
        training_rounds: T of the training steps whose memory is compared.
        whole_layers, prompt, new_tokens: of the whole model that generates.
        profiled: sequences whose forward that model is profiled in.
    """

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    routing: tuple[int, ...] = ()
    batch: int = 1
    context: int = 2048
    decoder: int | None = None
    training_rounds: tuple[int, ...] = (1, 2, 3, 4, 5)
    whole_layers: int = 4
    prompt: int = 128
    new_tokens: int = 64
    profiled: tuple[int, ...] = (512, 2048)

    @property
    def main(self) -> int:
        return self.prefill[-1]

    @property
    def shorter(self) -> int:
        """What cases of many contenders or of a backward have."""
        return self.decoder or self.main

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.decode, *self.prefill)


PLANS = {
    "cuda": Plan(decode=(1, 16, 64), prefill=(512, 2048, 8192), routing=(16384,), batch=16),
    "cpu": Plan(
        decode=(1,),
        prefill=(64, 128),
        context=512,
        decoder=64,
        training_rounds=(1, 3),
        whole_layers=1,
        prompt=32,
        new_tokens=4,
        profiled=(32, 128),
    ),
}
DTYPES = {"cuda": "bf16", "cpu": "fp32"}
SCALING = {"experts": (8, 16, 32, 64), "rank": (4, 8, 16, 32, 64), "top_k": (1, 2, 4, 8)}


def table(model: Model, kind: str, dtype: str, plan: Plan) -> Iterator[Case]:
    """Every case of a model's sizes on ``"cuda"`` or ``"cpu"``, group by group."""
    make, seen = _Maker(model, kind, dtype, plan), set()
    for case in (
        *make.operators(),
        *make.layers(),
        *make.rounds(),
        *make.decoders(),
        make.generation(),
        *make.methods(),
        *make.scaling(),
    ):
        if case.name not in seen:  # with one token count, the largest is the smallest too
            seen.add(case.name)
            yield case


class _Maker:
    def __init__(self, model: Model, kind: str, dtype: str, plan: Plan) -> None:
        self.model, self.kind, self.dtype, self.plan = model, kind, dtype, plan
        self.ours = ("triton", "torch") if kind == "cuda" else ("torch",)

    def sizes(self, tokens: int, rounds: int = 3) -> Sizes:
        return self.model.sizes(tokens, rounds, self.dtype)

    def case(self, group: str, mode: str, providers: Sequence[str], sizes: Sizes, **details: object) -> Case:
        """Providers side by side at the same sizes."""
        contenders = tuple(Contender(name, sizes) for name in providers)
        return Case(group, self.model, mode, contenders, **details)  # type: ignore[arg-type]

    def along(self, axis: str, values: Sequence[int], providers: Sequence[str], sizes: Sizes) -> tuple[Contender, ...]:
        """Every provider at every value of a field of the sizes."""
        along: list[dict[str, Any]] = [{axis: value} for value in values]
        found = [Contender(p, replace(sizes, **value), axis) for p in providers for value in along]
        return tuple(c for i, c in enumerate(found) if c.label not in {other.label for other in found[:i]})

    def in_graph(self, tokens: int) -> bool:
        return self.kind == "cuda" and tokens <= max(PLANS["cuda"].decode)

    def operators(self) -> Iterator[Case]:
        for group in OPERATORS:
            for tokens in (*self.plan.tokens, *(self.plan.routing if group == "routing" else ())):
                for later in (False, True):
                    yield self.case(
                        group, "inference", self.ours, self.sizes(tokens), graph=self.kind == "cuda", later=later
                    )
            yield self.case(group, "training", self.ours, self.sizes(self.plan.main), later=True)

    def layers(self) -> Iterator[Case]:
        main, alone = self.plan.main, ("dense", "liger", "peft_lora")
        for tokens in reversed(self.plan.tokens):
            for rounds in (3, 1):
                providers = [*self.ours, "literal", *alone]
                if tokens in (main, self.plan.decode[0]):
                    providers += ["peer_mixlora", "mixlora"]
                graph = self.in_graph(tokens)
                yield self.case("layer", "inference", providers, self.sizes(tokens, rounds), graph=graph)
        compiled = (self.ours[0], "literal_compiled")
        yield self.case("layer", "inference", compiled, self.sizes(main), note="against torch.compile")
        for rounds in (3, 1):
            providers = [*self.ours, "literal", *alone, "peer_mixlora", "mixlora"]
            yield self.case("layer", "training", providers, self.sizes(self.plan.shorter, rounds))
        if self.kind == "cuda":  # on a CPU, compiling the backward takes longer than all the rest
            yield self.case("layer", "training", compiled, self.sizes(main), note="against torch.compile")

    def rounds(self) -> Iterator[Case]:
        short, one = self.plan.shorter, self.plan.decode[0]
        for mode, tokens in (("inference", short), ("training", short), ("inference", one)):
            ours = self.plan.training_rounds if mode == "training" else range(1, MAX_ROUNDS + 1)
            theirs = [rounds for rounds in ours if rounds % 2]  # a straight line all the same
            found = self.along("rounds", (1,), ("dense",), self.sizes(tokens))
            found += self.along("rounds", ours, self.ours[:1], self.sizes(tokens))
            found += self.along("rounds", theirs, ("literal",), self.sizes(tokens))
            graph = mode == "inference" and self.in_graph(tokens)
            yield Case("rounds", self.model, mode, found, graph=graph)

    def decoders(self) -> Iterator[Case]:
        for mode, tokens in (("prefill", self.plan.shorter), ("decode", 1)):
            ours = self.along("rounds", range(1, MAX_ROUNDS + 1), (self.ours[0],), self.sizes(tokens))
            others = self.along("rounds", (3,), ("dense", "peft_lora", "literal"), self.sizes(tokens))
            yield Case(
                "decoder",
                self.model,
                mode,
                (*ours, *others),
                graph=self.in_graph(tokens),
                batch=self.plan.batch if mode == "prefill" else 1,
                context=self.plan.context if mode == "decode" else None,
            )

    def generation(self) -> Case:
        ours = self.along("rounds", (1, 3), (self.ours[0],), self.sizes(1))
        others = self.along("rounds", (3,), ("dense", "peft_lora", "literal"), self.sizes(1))
        return Case("model", self.model, "generate", (*ours, *others), context=self.plan.prompt)

    def methods(self) -> Iterator[Case]:
        """Every method beside the MLP alone; where there is a second round, folded and literal."""
        one, short = self.plan.decode[0], self.plan.shorter
        for mode, tokens in (("inference", self.plan.main), ("inference", one), ("training", short)):
            found = [Contender("dense", self.sizes(tokens, 1), "method")]
            for changes in METHODS.values():
                for dora in (False, True):
                    sizes = replace(self.sizes(tokens, 1), **changes, dora=dora)
                    found.append(Contender(self.ours[0], sizes, "method"))
                    if sizes.routers != "none":
                        three = replace(sizes, rounds=3)
                        found += [Contender(name, three, "method") for name in (self.ours[0], "literal")]
            yield Case("methods", self.model, mode, tuple(found), graph=mode == "inference" and self.in_graph(tokens))

    def scaling(self) -> Iterator[Case]:
        main = self.plan.main
        for tokens in (main, self.plan.decode[0]):
            for axis, values in SCALING.items():
                values = tuple(value for value in values if axis != "top_k" or value <= self.model.experts)
                found = self.along(axis, values, (self.ours[0],), self.sizes(tokens))
                yield Case("scaling", self.model, "inference", found, graph=self.in_graph(tokens))
        found = self.along("tokens", self.plan.prefill, (self.ours[0],), self.sizes(main))
        yield Case("scaling", self.model, "inference", found)

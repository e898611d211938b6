"""The table of cases: what is timed side by side, at which sizes, by which providers, and what matters most.

`table` is the whole list for a model's sizes on a kind of device, and the only one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.cases import AXES, OPERATOR_GROUPS, Case, Contender
from benchmarks.document import WITHOUT_ROUNDS
from benchmarks.operators import OPERATORS
from benchmarks.sizes import METHODS, TINY, Model
from benchmarks.tuning import cells
from graphmoe_kernels.cost import Sizes
from graphmoe_tables.methods import METHODS as KNOWN_METHODS

MAX_ROUNDS = 5
# A layer so small that a call is host time; as many heads as make a whole model of it.
HOST = Model("host", 64, 128, heads=4, kv_heads=4, head_dim=16)
HOST_TRITON = Model("host-triton", 256, 352, heads=4, kv_heads=4, head_dim=64)
HOST_LAYERS, HOST_NEW_TOKENS = 8, 16


class Plan(NamedTuple):
    """At which token counts a table is made."""

    decode: tuple[int, ...]  # of the layer, ascending
    prefill: tuple[int, ...]  # the last one is the main one
    captured: int = 2048  # up to how many tokens inference is timed as a CUDA graph
    routing: tuple[int, ...] = ()  # further token counts for the routing alone
    batch: int = 1  # of the decoder layer's prefill
    context: int = 2048  # of its decode
    decoder: int | None = None  # of training steps, the decoder's prefill and the rounds, where it is not the main one
    step: int | None = None  # of training steps with dropout, where it is not the main one
    training_rounds: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the training steps whose memory is compared
    whole_layers: int = 4  # of the whole model that generates
    prompt: int = 128
    new_tokens: int = 64
    profiled: tuple[int, ...] = (512, 2048)  # sequences whose forward that model is profiled in
    many: int = 64  # experts of a layer with many, for the kernels alone

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
    "cpu": Plan((1,), (64, 128), context=512, decoder=64, step=992, training_rounds=(1, 3))._replace(
        whole_layers=1, prompt=32, new_tokens=4, profiled=(32, 128)
    ),
}
DTYPES = {"cuda": "bf16", "cpu": "fp32"}
SCALING = {"experts": (8, 16, 32, 64), "rank": (4, 8, 16, 32, 64), "top_k": (1, 2, 4, 8)}
# The same compiled kernels on small tensors: what every kernel is checked on first.
CHECKED = Sizes(256, 336, 32, tokens=96)
TINY_CHECKED = Sizes(32, 32, 5, experts=3, rank=4, tokens=5)
# That of the package's defaults.
STEP_DROPOUT = 0.05
COMPILED, EAGER = "against torch.compile", "eager"
# Seconds of trying and timing one kernel's configurations.
TUNING = 90.0
# The order of a run whose time is limited: how many seconds a case may take, and its name. First what is right, then
# the layer at the sizes of the targets, then everything else.
ORDER = (
    (15, "check, *, {dtype}"),
    (30, "layer, *, inference, {main} tokens, T=3, *, {dtype}"),
    (25, "layer, *, inference, {first} tokens, T=3, *, {dtype}"),
    (25, "layer, *, inference, {second} tokens, T=3, *, {dtype}"),
    (50, "layer, *, training, {shorter} tokens, T=3, *, {dtype}"),
    (20, "decoder, *"),
    (10, "routing, *, {first} tokens, *"),
    (10, "routing, *, {routing} tokens, *"),
    (10, "routing, *, {main} tokens, *"),
    (20, "layer, *, inference, {main} tokens, T=1, *, {dtype}"),
    (20, "layer, *, inference, {first} tokens, T=1, *, {dtype}"),
    (70, "layer, *, inference, {main} tokens, T=3, *, {compiled}"),
    (90, "layer, *, training, {main} tokens, T=3, *, {compiled}"),
    (12, "kernels, *, {main} tokens, T=3, n={experts}, {dtype}"),
    (12, "kernels, *, {first} tokens, T=3, n={experts}, {dtype}"),
    (15, "layer, *, inference, *, T=3, *"),
    (30, "layer, *, training, *"),
    (60, "rounds, *"),
    (30, "model, *"),
    (60, "profile, *"),
    (20, "host, *"),
    (15, "expert_swiglu, *, {first} tokens, *"),
    (15, "expert_swiglu, *, {main} tokens, *"),
    (15, "gru_step, *, {first} tokens, *"),
    (15, "gru_step, *, {main} tokens, *"),
    (40, "methods, *"),
    (20, "scaling, *"),
    (TUNING + 20, "tune, *"),
    (15, "*"),
)


def rank(case: Case, plan: Plan, dtype: str) -> tuple[int, float]:
    """The case's place in the order of importance, and how many seconds it may take."""
    names = {"main": plan.main, "shorter": plan.shorter, "first": plan.decode[0], "second": plan.decode[:2][-1]}
    names |= {"routing": max(plan.routing, default=0), "experts": case.model.experts}
    patterns = [(seconds, each.format(dtype=dtype, compiled=COMPILED, **names)) for seconds, each in ORDER]
    return next((i, seconds) for i, (seconds, each) in enumerate(patterns) if fnmatchcase(case.name, each))


def table(model: Model, kind: str, dtype: str, plan: Plan) -> Iterator[Case]:
    """Every case of a model's sizes on ``"cuda"`` or ``"cpu"``, group by group."""
    make, seen = _Maker(model, kind, dtype, plan), set()
    groups = (make.checks, make.operators, make.layers, make.steps, make.rounds, make.decoders, make.models, make.host)
    for group in (*groups, make.methods, make.scaling, make.kernels, make.tuning):
        for case in group():
            if case.name not in seen:  # with one token count, the largest is the smallest too
                seen.add(case.name)
                yield case


class _Maker:
    def __init__(self, model: Model, kind: str, dtype: str, plan: Plan) -> None:
        self.model, self.kind, self.dtype, self.plan = model, kind, dtype, plan
        self.ours = ("triton", "torch") if kind == "cuda" else ("torch",)

    def sizes(self, tokens: int, rounds: int = 3) -> Sizes:
        return self.model.sizes(tokens, rounds, self.dtype)

    def case(self, group: str, mode: str, providers: Sequence[str], sizes: Sizes, **details: Any) -> Case:
        """Providers side by side at the same sizes."""
        return Case(group, self.model, mode, tuple(Contender(name, sizes, name) for name in providers), **details)

    def along(self, axis: str, values: Sequence[int], providers: Sequence[str], sizes: Sizes) -> tuple[Contender, ...]:
        """Every provider at every value of a field of the sizes; one without rounds once."""
        found: dict[str, Contender] = {}
        for provider in providers:
            for value in values:
                alone = axis == "rounds" and provider in WITHOUT_ROUNDS
                label = provider if alone else f"{provider}, {AXES[axis].format(value)}"
                along: dict[str, Any] = {axis: value}
                found.setdefault(label, Contender(provider, replace(sizes, **along), label))
        return tuple(found.values())

    def in_graph(self, tokens: int) -> bool:
        return self.kind == "cuda" and tokens <= self.plan.captured

    def checks(self) -> Iterator[Case]:
        small = TINY_CHECKED if self.model == TINY else CHECKED
        # The dtypes that are not asked for come last: `rank` sees to it.
        for dtype in dict.fromkeys((self.dtype, *(("bf16", "fp16", "fp32") if self.kind == "cuda" else ()))):
            for operator in OPERATORS:
                sizes = replace(small, dtype=dtype)
                yield self.case("check", "training", ("triton",), sizes, operator=operator.name, later=operator.later)

    def kernels(self) -> Iterator[Case]:
        sizes = [self.sizes(tokens) for tokens in self.plan.tokens]
        sizes += [replace(self.sizes(t), experts=self.plan.many) for t in (self.plan.main, self.plan.decode[0])]
        for each in sizes:
            for operator in OPERATORS:
                if each.experts == self.model.experts or operator.name != "gru":
                    details = {"operator": operator.name, "later": operator.later}
                    yield self.case("kernels", "training", ("triton",), each, graph=True, **details)

    def tuning(self) -> Iterator[Case]:
        for cell in cells():
            yield self.case("tune", "training", ("triton",), self.sizes(1), graph=True, operator=cell.name)

    def operators(self) -> Iterator[Case]:
        for group in OPERATOR_GROUPS:
            for tokens in (*self.plan.tokens, *(self.plan.routing if group == "routing" else ())):
                for later in (False, True):
                    details = {"graph": self.kind == "cuda", "later": later}
                    yield self.case(group, "inference", self.ours, self.sizes(tokens), **details)
            yield self.case(group, "training", self.ours, self.sizes(self.plan.main), later=True)

    def layers(self) -> Iterator[Case]:
        main, alone, peers = self.plan.main, ("dense", "liger", "peft_lora"), ("peer_mixlora",)
        everyone = (*self.ours, "literal", *alone)
        for tokens in reversed(self.plan.tokens):
            graph = self.in_graph(tokens)
            both = graph and tokens > max(self.plan.decode)  # prefill in a graph, and as it is called without one
            for rounds in (3, 1):
                providers = (*everyone, *(peers if tokens in (main, self.plan.decode[0]) else ()))
                yield self.case("layer", "inference", providers, self.sizes(tokens, rounds), graph=graph)
                if both:
                    yield self.case("layer", "inference", providers, self.sizes(tokens, rounds), note=EAGER)
        compiled = (self.ours[0], "literal_compiled")
        yield self.case("layer", "inference", compiled, self.sizes(main), note=COMPILED)
        for rounds in (3, 1):
            yield self.case("layer", "training", (*everyone, *peers), self.sizes(self.plan.shorter, rounds))
        if self.kind == "cuda":  # on a CPU, compiling the backward takes longer than all the rest
            yield self.case("layer", "training", compiled, self.sizes(main), note=COMPILED)

    def steps(self) -> Iterator[Case]:
        sizes = self.model.sizes(self.plan.step or self.plan.main, 3, self.dtype, rank=min(8, self.model.rank))
        found = self.along("rounds", (1,), ("dense",), sizes) + self.along("rounds", (1, 3), self.ours[:1], sizes)
        found += self.along("rounds", (3,), ("literal",), sizes)
        yield Case("step", self.model, "training", found, "rounds", dropout=STEP_DROPOUT)

    def rounds(self) -> Iterator[Case]:
        short, one = self.plan.shorter, self.plan.decode[0]
        for mode, tokens in (("inference", short), ("training", short), ("inference", one)):
            ours = self.plan.training_rounds if mode == "training" else range(1, MAX_ROUNDS + 1)
            theirs = [rounds for rounds in ours if rounds % 2]  # a straight line all the same
            found = self.along("rounds", (1,), ("dense",), self.sizes(tokens))
            found += self.along("rounds", ours, self.ours[:1], self.sizes(tokens))
            found += self.along("rounds", theirs, ("literal",), self.sizes(tokens))
            yield Case("rounds", self.model, mode, found, "rounds", graph=mode == "inference" and self.in_graph(tokens))

    def decoders(self) -> Iterator[Case]:
        for mode, tokens in (("prefill", self.plan.shorter), ("decode", 1)):
            ours = self.along("rounds", range(1, MAX_ROUNDS + 1), (self.ours[0],), self.sizes(tokens))
            others = self.along("rounds", (3,), ("dense", "peft_lora", "literal"), self.sizes(tokens))
            batch, context = (self.plan.batch, None) if mode == "prefill" else (1, self.plan.context)
            graph = self.in_graph(tokens)
            yield Case(
                "decoder", self.model, mode, (*ours, *others), "rounds", graph=graph, batch=batch, context=context
            )

    def models(self) -> Iterator[Case]:
        plan, one = self.plan, self.sizes(1)
        ours = self.along("rounds", (1, 3), (self.ours[0],), one)
        others = self.along("rounds", (3,), ("dense", "peft_lora", "literal"), one)
        whole = {"layers": plan.whole_layers, "new_tokens": plan.new_tokens, "context": plan.prompt}
        yield Case("model", self.model, "generate", (*ours, *others), "rounds", **whole)  # type: ignore[arg-type]
        plain = self.along("rounds", (1,), ("dense", "peft_lora"), one)
        yield Case(
            "profile", self.model, "profile", (*plain, *ours), "rounds", layers=plan.whole_layers, lengths=plan.profiled
        )

    def host(self) -> Iterator[Case]:
        one = HOST.sizes(1, 3, "fp32")
        dense, ours = self.along("rounds", (1,), ("dense",), one), self.along("rounds", (1, 3), ("torch",), one)
        yield Case("host", HOST, "inference", (*dense, *ours), "rounds")
        others = self.along("rounds", (1,), ("dense", "peft_lora"), one)
        whole = {"layers": HOST_LAYERS, "new_tokens": HOST_NEW_TOKENS, "context": 8}
        yield Case("host", HOST, "generate", (*others, *ours), "rounds", **whole)  # type: ignore[arg-type]
        half = HOST_TRITON.sizes(1, 3, "bf16")
        stubbed = self.along("rounds", (1, 3), ("triton_bound", "triton_unlaunched"), half)
        dense = self.along("rounds", (1,), ("dense",), half)
        yield Case("host", HOST_TRITON, "launches stubbed", (*dense, *stubbed), "rounds")
        for model, contenders in ((HOST, ours), (HOST_TRITON, stubbed[:2])):
            yield Case("host", model, "profile", contenders, "rounds")

    def methods(self) -> Iterator[Case]:
        """Every method beside the MLP alone; where there is a second round, folded and literal."""
        one, short = self.plan.decode[0], self.plan.shorter
        for mode, tokens in (("inference", self.plan.main), ("inference", one), ("training", short)):
            found = [Contender("dense", self.sizes(tokens, 1), "dense")]
            for name, dora in itertools.product(METHODS, (False, True)):
                one_round = replace(self.sizes(tokens, 1), **METHODS[name], dora=dora)
                runs = [(self.ours[0], 1), *((p, 3) for p in (self.ours[0], "literal") if one_round.routers != "none")]
                for provider, rounds in runs:
                    label = f"{provider}, {KNOWN_METHODS[name].name(dora, rounds)}"
                    found.append(Contender(provider, replace(one_round, rounds=rounds), label))
            graph = mode == "inference" and self.in_graph(tokens)
            yield Case("methods", self.model, mode, tuple(found), "method", graph=graph)

    def scaling(self) -> Iterator[Case]:
        main = self.plan.main
        for tokens in (main, self.plan.decode[0]):
            for axis, values in SCALING.items():
                values = tuple(value for value in values if axis != "top_k" or value <= self.model.experts)
                found = self.along(axis, values, (self.ours[0],), self.sizes(tokens))
                yield Case("scaling", self.model, "inference", found, axis, graph=self.in_graph(tokens))
        found = self.along("tokens", self.plan.prefill, (self.ours[0],), self.sizes(main))
        yield Case("scaling", self.model, "inference", found, "tokens")

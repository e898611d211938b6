"""The targets of the kernels' design on one H200, beside what a run measured: ratios of medians in that run."""

from __future__ import annotations

from typing import Any, NamedTuple

MISSING = "not measured"
COMPILED = "literal compiled"
GRAPH = "decode in a graph"


class Ratio(NamedTuple):
    """One provider's figure over another's in a case; ``at_most`` or, where more is better, ``at_least``."""

    what: str
    mode: str
    tokens: int
    rounds: int
    over: str
    under: str
    at_most: float | None = None
    at_least: float | None = None
    figure: str = "median"

    def met(self, ratio: float) -> bool:
        """Whether a measured ratio keeps the target."""
        return ratio <= self.at_most if self.at_most is not None else ratio >= (self.at_least or 0.0)

    @property
    def wanted(self) -> str:
        """The target as text."""
        return f"<= {self.at_most}" if self.at_most is not None else f">= {self.at_least}"


RATIOS = (
    Ratio("prefill over the dense MLP", "inference", 8192, 3, "fused", "dense", at_most=1.6),
    Ratio(
        "prefill, times faster than the compiled literal loop", "inference", 8192, 3, COMPILED, "fused", at_least=2.0
    ),
    Ratio("prefill, times faster than a peer's layer", "inference", 8192, 3, "peer", "fused", at_least=6.0),
    Ratio("decode of 1 token over the dense MLP", GRAPH, 1, 3, "fused", "dense", at_most=1.7),
    Ratio("decode of 16 tokens over the dense MLP", GRAPH, 16, 3, "fused", "dense", at_most=1.7),
    Ratio(
        "training, times faster than the compiled literal loop", "training", 8192, 3, COMPILED, "fused", at_least=1.7
    ),
    Ratio(
        "training memory over the compiled literal loop's",
        "training",
        8192,
        3,
        "fused",
        COMPILED,
        at_most=0.4,
        figure="peak",
    ),
    Ratio("one round in prefill over the dense MLP", "inference", 8192, 1, "fused", "dense", at_most=1.15),
)
GRU_SHARE = 0.03
ROUTING_TIMES = 4.0


def target_rows(content: dict[str, Any]) -> list[list[str]]:
    """What, measured, target, verdict; nothing for a run at other sizes."""
    if content["conditions"].get("sizes") != "llama-3-8b":
        return []
    rows = [_row(ratio, content) for ratio in RATIOS]
    return [*rows, _gru(content), _routing(content)]


def _row(ratio: Ratio, content: dict[str, Any]) -> list[str]:
    over, under = (_figure(content, ratio, provider) for provider in (ratio.over, ratio.under))
    if over is None or under is None:
        return [f"{ratio.what}, T={ratio.rounds}", MISSING, ratio.wanted, "-"]
    found = over / under
    return [f"{ratio.what}, T={ratio.rounds}", f"{found:.2f}", ratio.wanted, "met" if ratio.met(found) else "missed"]


def _figure(content: dict[str, Any], ratio: Ratio, provider: str) -> float | None:
    """Of the step in which both were timed, in turns with each other, if there is one; else None."""
    key = (ratio.mode, ratio.tokens, ratio.rounds, 8)
    rows = [r for r in content["layers"] if (r["mode"], r["tokens"], r["rounds"], r["experts"]) == key]
    for step in {row["step"] for row in rows}:
        of_step = {row["provider"]: row for row in rows if row["step"] == step}
        if {ratio.over, ratio.under} <= of_step.keys():
            row = of_step[provider]
            return row["peak bytes"] if ratio.figure == "peak" else row["seconds"]["median"]
    return None


def _kernel(content: dict[str, Any], **wanted: Any) -> float | None:
    for row in content["kernels"]:
        if all(row.get(name) == value for name, value in wanted.items()) and row["experts"] == 8:
            return row["seconds"]["median"]
    return None


def _gru(content: dict[str, Any]) -> list[str]:
    steps = [_kernel(content, kernel="gru_forward", tokens=8192, round=name) for name in ("first", "later")]
    layer = next(
        (
            row["seconds"]["median"]
            for row in content["layers"]
            if (row["mode"], row["tokens"], row["rounds"], row["provider"]) == ("inference", 8192, 3, "fused")
        ),
        None,
    )
    what, wanted = "share of the GRU kernel in prefill, T=3", f"<= {GRU_SHARE:.0%}"
    if layer is None or steps[0] is None or steps[1] is None:
        return [what, MISSING, wanted, "-"]
    share = (steps[0] + steps[1]) / layer
    return [what, f"{share:.1%}", wanted, "met" if share <= GRU_SHARE else "missed"]


def _routing(content: dict[str, Any]) -> list[str]:
    """At one token and at the most that were run, the smaller ratio."""
    what, wanted, found = "routing, times faster than PyTorch, 1 and 8192 tokens", f">= {ROUTING_TIMES}", []
    for tokens in (1, 8192):
        of = {"operator": "routing", "kernel": "operator forward", "tokens": tokens, "round": "first"}
        torch, triton = (_kernel(content, **of, backend=backend) for backend in ("torch", "triton"))
        if torch is None or triton is None:
            return [what, MISSING, wanted, "-"]
        found.append(torch / triton)
    verdict = "met" if min(found) >= ROUTING_TIMES else "missed"
    return [what, " and ".join(f"{each:.1f}" for each in found), wanted, verdict]

"""The tables that a run of `pytest benchmarks` ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.tables import seconds
from graphmoe_kernels.cost.report import table

# Whose time the others are compared with: the first of these that a case has, else its first contender.
YARDSTICKS = ("dense", "torch, T=1", "triton, T=1")
BUSY = 0.25
NOTE = (
    "every contender kept the error budget against fp64; those of a case were timed in turns; 'over' is how many times "
    "as long as the case's yardstick (1.00) it took, by the median over the turns; the range is that of "
    "all turns; peak MB is what a call holds beyond what is kept (in inference the fold is kept)"
)
PARTS = {
    "attention": "attention",
    "mlp": "base MLP",
    "experts": "experts",
    "routing": "routing",
    "gru": "GRU",
    "other": "other",
}
# Below this share of the limit a layer's time is the calling of its operations.
IDLE = 0.1
OVERHEAD = (
    "Some layers reach less than a tenth of the limit: their time is that of calling many small operations, not of the "
    "arithmetic that folding saves, and they say nothing about large ones."
)
HEADER = ("", "median", "quartiles", "turns", "over", "range", "peak MB", "of the limit")


def summary(content: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    """Conditions and limits, a table a case, and what was not timed."""
    c, limits = content["conditions"], content["limits"]
    device = c["device"]["name"] + "".join(f", {n} {v}" for n, v in c["device"].items() if n not in ("kind", "name"))
    lines = [
        f"{device}; torch {c['versions']['torch']}, commit {c['commit'][:10]}, {c['date']}",
        f"limits measured: copy {limits['copy bytes a second'] / 1e9:,.1f} GB/s, "
        f"{limits['matrix dtype']} matrix product {limits['matrix operations a second'] / 1e9:,.1f} GFLOP/s",
        NOTE,
        "",
    ]
    cases: dict[str, list[Any]] = {}
    for row in content["rows"]:
        cases.setdefault(row["case"], []).append(row)
    alone = {case: rows[0] for case, rows in cases.items() if len(rows) == 1}
    if alone:  # with nobody to compare with, a table of its own would be a heading and a line
        lines += [
            table(("alone", *HEADER[1:]), (_row(f"{case}: {row['label']}", row, None) for case, row in alone.items())),
            "",
        ]
    for case, rows in cases.items():
        if case not in alone:
            lines += [table((case, *HEADER[1:]), _rows(rows)), ""]
    if content["profiles"]:
        lines += [table(("share of a forward", *PARTS.values()), _shares(content["profiles"])), ""]
    if any(row["share"] is not None and row["share"] < IDLE and row["group"] == "layer" for row in content["rows"]):
        lines += [OVERHEAD, ""]
    failed = [check for check in content["checks"] if not check["passed"]]
    skipped = {name: step["note"] for name, step in content["steps"].items() if step["state"] == "skipped"}
    lines += [f"not timed: {check['label']} in {check['case']}: {check['fault']}" for check in failed]
    lines += [f"skipped: {name}: {note}" for name, note in skipped.items()]
    lines += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    load, cores = c["host"]["load average"], c["host"]["cores"]
    if load is not None and cores and load > BUSY * cores:
        lines.append(f"the machine was busy before the run (load average {load}): trust the ratios more than the times")
    return "\n".join(lines)


def _shares(profiles: list[dict[str, Any]]) -> Iterator[list[str]]:
    for profile in profiles:
        whole = sum(profile["seconds"].values())
        name = f"  {profile['model']}, {profile['phase']}, {profile['tokens']} tokens: {profile['adapter']}"
        yield [name, *(f"{profile['seconds'][part] / whole:.1%}" for part in PARTS)]


def _rows(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    labels = [row["label"] for row in rows]
    yardstick = next((name for name in YARDSTICKS if name in labels), labels[0])
    for row in rows:
        yield _row(row["label"], row, row["ratios"].get(yardstick))


def _row(name: str, row: dict[str, Any], ratio: dict[str, Any] | None) -> list[str]:
    time = row["seconds"]
    low, high = (seconds(q) for q in time["quartiles"])
    rate = "" if row["tokens a second"] is None else f" ({row['tokens a second']:,.1f} tokens/s)"
    return [
        f"  {name}{rate}{', in a graph' if row['graph'] else ''}",
        seconds(time["median"]),
        f"{low} .. {high}",
        str(time["turns"]),
        "1.00" if ratio is None else f"{ratio['median']:.2f}",
        "" if ratio is None else "{:.2f} .. {:.2f}".format(*ratio["range"]),
        "-" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e6:,.1f}",
        "-" if row["share"] is None else f"{row['share']:.1%}",
    ]

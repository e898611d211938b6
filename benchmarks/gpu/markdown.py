"""The result file as a page: conditions, limits, checks, the layer, the kernels, what was left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.targets import target_rows
from benchmarks.predictions import dense_parts, layer_parts, predict, total
from benchmarks.predictions_page import markdown_table
from benchmarks.roofline import KERNELS
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import SKINNY_TOKENS

# Predictions are for this device and these sizes alone.
PREDICTED_DEVICE = "H200"
OWN = "plain computation's own"
LLAMA = {"hidden": 4096, "intermediate": 14336, "gru_width": 409}


def markdown(content: dict[str, Any]) -> str:
    """The whole page."""
    lines = ["# GPU report", "", *_conditions(content)]
    lines += _limits(content["limits"]) if content["limits"] else ["No limit was measured.", ""]
    lines += [
        *_targets(content),
        *_checks(content["checks"]),
        *_layers(content),
        *_kernels(content),
        *_steps(content["steps"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _conditions(content: dict[str, Any]) -> list[str]:
    c = content["conditions"]
    if not c:
        return ["The run ended before it could say where it ran.", ""]
    device = ", ".join(f"{name} {value}" for name, value in c["device"].items())
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    lines = [f"- Device: {device}", f"- Versions: {versions}", f"- Commit: {c['commit']}", f"- Date: {c['date']}"]
    lines.append(f"- Sizes: {c['sizes']}")
    if c["device"]["kind"] != "cuda":
        lines.append("- **Not a GPU: these figures show that the code runs, and nothing else.**")
    return [*lines, ""]


def _limits(limits: dict[str, Any]) -> list[str]:
    m, n, k = limits["matrix size"]
    return [
        f"Limits measured in this run: copy of {limits['copy bytes'] / 1e9:.2f} GB "
        f"{limits['copy bytes a second'] / 1e12:.3g} TB/s (read and written), bf16 product {m} x {n} x {k} "
        f"{limits['matrix operations a second'] / 1e12:.4g} TFLOP/s, copy inside the L2 cache "
        f"{limits['L2 copy bytes a second'] / 1e12:.3g} TB/s. Assumed: "
        + ", ".join(f"{name} {value:.3g}" for name, value in limits["assumed"].items())
        + ".",
        "",
    ]


def _targets(content: dict[str, Any]) -> list[str]:
    rows = target_rows(content)
    if not rows:
        return []
    return ["## Targets", "", *markdown_table(("what", "measured", "target", ""), rows), ""]


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    failed = [check for check in checks if not check["passed"]]
    lines = ["## Checks", "", f"{len(checks) - len(failed)} of {len(checks)} passed; what failed was not timed.", ""]
    rows = [[c["what"], str(c["tokens"]), str(c.get("experts", "-")), c["dtype"], c["fault"]] for c in failed]
    if rows:
        lines += [*markdown_table(("failed", "tokens", "experts", "dtype", "why"), rows), ""]
    rows = [
        [
            c["what"],
            str(c["tokens"]),
            str(c.get("experts", "-")),
            c["dtype"],
            f"{c['largest error']:.1e}",
            f"{c[OWN]:.1e}",
        ]
        for c in checks
        if c["passed"]
    ]
    if rows:
        header = ("passed", "tokens", "experts", "dtype", "largest error", OWN)
        lines += [*markdown_table(header, rows), ""]
    return lines


def _seconds(seconds: dict[str, Any]) -> list[str]:
    low, high = seconds["quartiles"]
    return [f"{1e6 * seconds['median']:,.1f}", f"{1e6 * low:,.1f} - {1e6 * high:,.1f}", str(seconds["turns"])]


def _predictable(content: dict[str, Any]) -> bool:
    c = content["conditions"]
    return bool(c) and PREDICTED_DEVICE in c["device"]["name"] and c["sizes"] == "llama-3-8b"


def _sizes(row: dict[str, Any], rounds: int = 3) -> Sizes:
    return Sizes(**LLAMA, experts=row["experts"], tokens=row["tokens"], rounds=rounds, dtype=row["dtype"])


def _groups(rows: list[dict[str, Any]]) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Rows of one case together, in order of first appearance; a case may have been timed more than once."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["mode"], row["rounds"], row["experts"], row["tokens"], row["step"])
        found.setdefault(key, []).append(row)
    return found.items()


def _layers(content: dict[str, Any]) -> list[str]:
    if not content["layers"]:
        return []
    rows = []
    for (mode, rounds, experts, tokens, _), group in _groups(content["layers"]):
        dense = next((row["seconds"]["median"] for row in group if row["provider"] == "dense"), None)
        for row in group:
            median, peak = row["seconds"]["median"], row["peak bytes"]
            rows.append(
                [
                    f"{mode}, T={rounds}, n={experts}, {tokens} tokens: {row['provider']}",
                    *_seconds(row["seconds"]),
                    "-" if dense is None else f"{median / dense:.2f}",
                    "-" if peak is None else f"{peak / 1e6:,.0f}",
                    _layer_prediction(content, row),
                ]
            )
    header = ("layer", "median us", "quartiles us", "turns", "over dense", "peak MB", "measured / predicted")
    return ["## The whole layer", "", *markdown_table(header, rows), ""]


def _layer_prediction(content: dict[str, Any], row: dict[str, Any]) -> str:
    parts = {"fused": layer_parts, "dense": dense_parts}.get(row["provider"])
    if parts is None or row["mode"] == "training" or not _predictable(content):
        return "-"
    return f"{row['seconds']['median'] / total(parts(_sizes(row, row['rounds']))):.2f}"


def _kernels(content: dict[str, Any]) -> list[str]:
    if not content["kernels"]:
        return []
    rows = []
    for row in content["kernels"]:
        name = row["kernel"] if row["kernel"] in KERNELS else f"{row['operator']} forward, {row.get('backend', '')}"
        name += f", {row['round']} round, n={row['experts']}, {row['tokens']} tokens"
        if row["operator"] == "experts" and row["kernel"] in KERNELS and row["tokens"] > SKINNY_TOKENS:
            name += ", in order" if row["ordered"] else ", not in order"
        rows.append([name, *_seconds(row["seconds"]), *_shares(content, row), "" if row["cold"] else "warm L2"])
    header = (
        "kernel",
        "median us",
        "quartiles us",
        "turns",
        "MB",
        "GFLOP",
        "limit",
        "share",
        "measured / predicted",
        "",
    )
    note = (
        "Each kernel alone, many launches in a CUDA graph, operands rotating so that together they exceed the L2 cache "
        '("warm L2" where they do not by half). The share is that of the binding limit: its time over the median.'
    )
    return ["## Kernels", "", note, "", *markdown_table(header, rows), ""]


def _shares(content: dict[str, Any], row: dict[str, Any]) -> list[str]:
    if "limits" not in row:
        return ["-"] * 5
    limit = max(row["limits"], key=lambda name: row["limits"][name])
    found = [
        f"{row['work']['bytes'] / 1e6:,.1f}",
        f"{row['work']['operations'] / 1e9:,.2f}",
        limit,
        f"{row['limits'][limit] / row['seconds']['median']:.0%}",
    ]
    if not _predictable(content):
        return [*found, "-"]
    expected = predict(row["kernel"], _sizes(row), row["round"] == "later", row["ordered"])
    return [*found, f"{row['seconds']['median'] / expected.seconds:.2f}"]


def _steps(steps: dict[str, dict[str, Any]]) -> list[str]:
    left = [(name, step) for name, step in steps.items() if step["state"] != "done"]
    lines = ["## Steps", "", f"{len(steps) - len(left)} of {len(steps)} done.", ""]
    if left:
        rows = [[name, step["state"], step.get("note", "")] for name, step in left]
        lines += [*markdown_table(("not done", "state", "why"), rows), ""]
    return lines

"""The predictions of PREDICTIONS.md, made before any of the kernels had run, beside what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.units import seconds

PAGE = Path(__file__).with_name("PREDICTIONS.md")
# "| experts forward, later round | 8192 | ... | 849.7 | L2 |", and "| decode in a graph, 1 token, T=3 | 139.9 | ...".
KERNEL = re.compile(r"^\| ([\w ]+), (first|later) round \| (\d+) \|.*\| ([\d,.]+) \| (\w+) \|$", re.MULTILINE)
LAYER = re.compile(r"^\| (?:prefill|decode in a graph), (\d+) tokens?, T=(\d) \| ([\d,.]+) \|", re.MULTILINE)
# The sizes that are predicted.
MODEL, EXPERTS, DTYPE = "llama-3-8b", 8, "bf16"


def predicted() -> dict[tuple[Any, ...], tuple[float, str]]:
    """Seconds and the limit that sets them, by (kernel, round, tokens), and of the whole layer by (tokens, rounds)."""
    text = PAGE.read_text(encoding="utf-8")
    kernels = {
        (kernel.replace(" ", "_"), name, int(tokens)): (1e-6 * float(time.replace(",", "")), limit)
        for kernel, name, tokens, time, limit in KERNEL.findall(text)
    }
    layers = {
        (int(tokens), int(rounds)): (1e-6 * float(time.replace(",", "")), "sum of its launches")
        for tokens, rounds, time in LAYER.findall(text)
    }
    return kernels | layers


def beside(content: dict[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """A GPU result's kernels and layers beside their predictions; no lines where none of them is predicted."""
    lines = []
    known = predicted() if content["conditions"]["device"]["kind"] == "cuda" else {}
    found: list[tuple[tuple[Any, ...], str, Any]] = [
        (
            (row["kernel"], row["round"], row["tokens"]),
            f"{row['kernel']}, {row['round']} round, {row['tokens']:,} tokens",
            row,
        )
        for row in content["kernels"]
        if (row["experts"], row.get("dtype")) == (EXPERTS, DTYPE) and "config" not in row
    ]
    found += [
        ((row["sizes"]["tokens"], row["sizes"]["rounds"]), row["case"], row)
        for row in content["rows"]
        if tuple(row[key] for key in ("group", "mode", "model", "provider")) == ("layer", "inference", MODEL, "triton")
        and (row["sizes"]["experts"], row["sizes"]["dtype"]) == (EXPERTS, DTYPE)
    ]
    for key, what, row in found:
        if key in known:
            time, limit = known[key]
            measured = row["seconds"]["median"]
            lines.append([what, seconds(time), limit, seconds(measured), f"{measured / time:.2f}"])
    return ("", "predicted", "limit", "measured", "measured / predicted"), lines

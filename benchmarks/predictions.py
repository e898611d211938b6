"""Predictions of kernels and layers, and a GPU's result beside them.

`python -m benchmarks.predictions --write` makes their page anew from the kernels, their configurations and the readings
of their code; without it, the page is printed. PREDICTIONS.md is an older one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.units import seconds

PAGE = Path(__file__).with_name("PREDICTIONS-2026-11-26.md")
# All launches of a kernel in a round: "| experts_stream, later round | 8192 | 8 | 2 | 470.5 | loads |". A layer:
# "| H100, inference, 8192 tokens, T=3, n=8 | 6,574.7 |".
KERNEL = re.compile(
    r"^\| (\w+), (first|later) round \| (\d+) \| (\d+) \| (\d+) \| ([\d,.]+) \| (\w+) \|$", re.MULTILINE
)
LAYER = re.compile(r"^\| (\w+), (\w+), (\d+) tokens?, T=(\d), n=(\d+) \| ([\d,.]+) \|", re.MULTILINE)
# The sizes that are predicted.
MODEL, DTYPE, DEVICES = "llama-3-8b", "bf16", ("H100", "H200", "A100")


def predicted() -> dict[tuple[Any, ...], tuple[float, str]]:
    """Seconds and the limit that sets them: of all launches of an H100's kernels in a round by (kernel, round, tokens,
    experts), of layers by (device, mode, tokens, rounds, experts)."""
    text = PAGE.read_text(encoding="utf-8")
    found: dict[tuple[Any, ...], tuple[float, str]] = {}
    for kernel, name, tokens, experts, _, time, limit in KERNEL.findall(text):
        found[kernel, name, int(tokens), int(experts)] = 1e-6 * float(time.replace(",", "")), limit
    for device, mode, *numbers, time in LAYER.findall(text):
        found[device, mode, *map(int, numbers)] = 1e-6 * float(time.replace(",", "")), "sum of what it starts"
    return found


def beside(content: dict[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """A GPU result's kernels and layers beside their predictions; no lines where none of them is predicted."""
    lines, device = [], content["conditions"]["device"]
    known = predicted() if device["kind"] == "cuda" else {}
    name = next((name for name in DEVICES if name in device.get("name", "")), None)
    found: list[tuple[tuple[Any, ...], str, Any]] = [
        (
            (row["kernel"], row["round"], row["tokens"], row["experts"]),
            f"{row['kernel']}, {row['round']} round, {row['tokens']:,} tokens, n={row['experts']}",
            row,
        )
        for row in content["kernels"]
        if row.get("dtype") == DTYPE and "config" not in row
    ]
    found += [
        ((name, row["mode"], *(row["sizes"][key] for key in ("tokens", "rounds", "experts"))), row["case"], row)
        for row in content["rows"]
        if tuple(row[key] for key in ("group", "model", "provider")) == ("layer", MODEL, "triton")
        and row["sizes"]["dtype"] == DTYPE
    ]
    for key, what, row in found:
        if key in known:
            time, limit = known[key]
            measured = row["seconds"]["median"]
            lines.append([what, seconds(time), limit, seconds(measured), f"{measured / time:.2f}"])
    return ("", "predicted", "limit", "measured", "measured / predicted"), lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it to its file."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions", description="What kernels and layers should take, by their code."
    )
    p.add_argument("--write", action="store_true", help=f"write the page to {PAGE.name} in place of printing it")
    write = p.parse_args(arguments).write
    # Their imports and readings take seconds, which `beside` does without.
    from benchmarks.forecast_page import H100, page
    from benchmarks.forecast_rounds import section

    text = f"{page().rstrip()}\n\n{section(H100)}"
    if write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()

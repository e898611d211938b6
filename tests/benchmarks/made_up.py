"""Result documents for the tests of the report: rows of the schema with the figures that a test wants."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.document import SCHEMA, Source

SIZES = {"hidden": 4096, "intermediate": 14336, "gru_width": 409, "experts": 8, "top_k": 2, "rank": 16}
H200 = {"kind": "cuda", "name": "NVIDIA H200", "multiprocessors": 132}
LIMITS = {"copy bytes a second": 4e12, "matrix operations a second": 8e14, "matrix dtype": "bf16"}
CPU = {"kind": "cpu", "name": "AMD EPYC (AVX2)", "threads": 2}


def times(median):
    return {"median": median, "quartiles": [0.99 * median, 1.01 * median], "best": 0.98 * median, "turns": 9}


def row(provider, median, *, rounds=3, tokens=8192, dtype="bf16", **changes):
    """A row of the layer in prefill; ``changes`` replace its other keys."""
    return {
        "case": f"layer, {tokens} tokens, {rounds}",
        "group": "layer",
        "model": "llama-3-8b",
        "mode": "inference",
        "graph": False,
        "round": None,
        "provider": provider,
        "sizes": {**SIZES, "rounds": rounds, "tokens": tokens, "dtype": dtype},
        "context": None,
        "seconds": times(median),
        "peak bytes": None,
        "work": None,
        "limit": None,
        "share": None,
        "ratios": {},
        "label": f"{provider}, T={rounds}",
        **changes,
    }


def in_turns(*rows):
    """The rows as of one case, each with its ratio to every other: those of the medians, 1% to either side."""
    for each in rows:
        each["case"] = rows[0]["case"]
    for each in rows:
        for other in rows:
            if other is not each:
                ratio = each["seconds"]["median"] / other["seconds"]["median"]
                each["ratios"][other["label"]] = {"median": ratio, "range": [0.99 * ratio, 1.01 * ratio]}
    return list(rows)


def gru_kernel(name, median, **changes):
    found = {"operator": "gru", "kernel": "gru_forward", "round": name, "tokens": 8192, "experts": 8, "dtype": "bf16"}
    return {**found, "seconds": times(median), "cold": True, **changes}


def document(rows=(), device=None, **changes):
    """A whole result; ``changes`` replace its other keys."""
    device = H200 if device is None else device
    return {
        "schema": SCHEMA,
        "conditions": {
            "device": device,
            "host": {"cores": 2, "load average": 0.1},
            "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1"},
            "commit": "0123456789" * 4,
            "date": "2026-11-30T10:00:00+00:00",
        },
        "limits": {},
        "steps": {},
        "checks": [],
        "rows": list(rows),
        "kernels": [],
        "profiles": [],
        **changes,
    }


def source(content, name="made-up.json"):
    return Source(Path(name), content)


def saved(folder, content, name="made-up.json"):
    path = folder / name
    path.write_text(json.dumps(content))
    return path

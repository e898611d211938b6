"""Device, versions, commit, date: what a figure must never be without."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata, util
from typing import Any

from benchmarks.devices import Device
from graphmoe_model.checkout import checked_out_commit

PACKAGES = ("torch", "triton", "transformers", "peft", "liger_kernel")


def conditions(device: Device, commit: str | None = None) -> dict[str, Any]:
    """As the result document has them; ``commit`` where there is no checkout to ask."""
    return {
        "device": {"kind": device.kind, **device.describe()},
        "host": {
            "cores": os.cpu_count(),
            "load average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "graphmoe": _version("graphmoe_kernels", "graphmoe"),
        },
        "commit": commit or os.environ.get("GRAPHMOE_COMMIT") or checked_out_commit() or "unknown",
        "date": now(),
    }


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def file_name(found: dict[str, Any]) -> str:
    """``<device>-<date>-<commit>.json`` of some conditions."""
    return f"{found['device']['kind']}-{found['date'][:19].replace(':', '')}-{found['commit'][:10]}.json"


def _version(module: str, distribution: str | None = None) -> str:
    if util.find_spec(module) is None:
        return "missing"
    try:
        return metadata.version(distribution or module.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "not installed"  # it runs from its checkout

"""Device, versions, commit, date: what a figure must never be without."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

from benchmarks.devices import Device

ROOT = Path(__file__).resolve().parent.parent
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
        "commit": commit or os.environ.get("GRAPHMOE_COMMIT") or checked_out_commit(),
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


def checked_out_commit() -> str:
    """The checked-out commit, with ``+`` if the tree differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

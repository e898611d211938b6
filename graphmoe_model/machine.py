"""The machine that a command runs on, as results name it."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch


def chosen_device(name: str) -> torch.device:
    """Return the device that ``--device`` names, ``"auto"``, ``"cpu"`` or ``"cuda"``: auto is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the kind of a device and its model, such as ``"cuda (NVIDIA H100 80GB HBM3)"``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    cpuinfo = Path("/proc/cpuinfo")  # Linux: Python's platform knows the architecture alone
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({names[0] if names else platform.processor() or platform.machine()})"


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

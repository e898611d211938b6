"""The built form of a kernel that is Python alone: what kernel-builder makes of it, and the `kernels` package loads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Backends, and the architectures that a backend's kernels run on; JSON of build.toml and of metadata.json alike.
# 8.0+PTX is this, or any newer: Triton compiles for the GPU at hand.
ARCHITECTURES: dict[str, tuple[str, ...] | None] = {"cpu": None, "cuda": ("8.0+PTX",), "rocm": ("gfx942",)}

OPS = '''"""The namespace of this build's operators, as the module that kernel-builder generates here names it."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name):
    """Return the name by which `torch.library` registers the operator ``op_name``."""
    return "{namespace}::" + op_name
'''


def unique_id(sources: Mapping[str, str]) -> str:
    """Return ten hexadecimal digits of the sources: kernels that differ have namespaces that differ."""
    found = hashlib.sha256()
    for name, text in sorted(sources.items()):
        found.update(f"{name}\0{len(text)}\0{text}".encode())
    return found.hexdigest()[:10]


def write_variants(build: Path, sources: Mapping[str, str], name: str, settings: Mapping[str, Any]) -> None:
    """Write ``build/torch-<backend>`` for each of `ARCHITECTURES`: the sources, their `_ops` and their metadata.

    Args:
        build: the folder to write into.
        sources: as `integrations.kernels_hub.sources.collect_sources` gives them.
        name: of the kernel, with dashes.
        settings: what else goes into the metadata: version, license, upstream.
    """
    for backend, architectures in ARCHITECTURES.items():
        namespace = f"_{name.replace('-', '_')}_{backend}_{unique_id(sources)}"
        files = {**sources, "_ops.py": OPS.format(namespace=namespace)}
        info = {"type": backend} if architectures is None else {"type": backend, "archs": list(architectures)}
        metadata = {
            "name": name,
            "id": namespace,
            **settings,
            "python-depends": [],
            "kernel-depends": [],
            "backend": info,
            "digest": {"algorithm": "sha256", "files": {path: _digest(text) for path, text in sorted(files.items())}},
        }
        variant = build / f"torch-{backend}"
        write_files(variant, {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"})


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts to their paths in a folder, and make the folders that these need."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())  # what the digest is of, on every system


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

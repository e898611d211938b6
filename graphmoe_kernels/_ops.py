"""The namespace of `torch.ops` that holds the operators: this module alone names it.

What it offers has the names that Hugging Face's kernel-builder gives it: it puts a module of its own in the place of
this one, in which every build of a kernel has another namespace, so that one process can load two.
"""

from __future__ import annotations

from typing import Any

import torch

ops: Any = torch.ops.graphmoe


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the name by which `torch.library` registers the operator ``op_name``."""
    return f"graphmoe::{op_name}"

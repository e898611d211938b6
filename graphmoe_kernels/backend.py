"""Which implementation of an operator runs.

``"auto"`` is the PyTorch implementation on every device, for as long as this package holds no Triton kernels; an
explicit backend that cannot run is an error that says why, never another path. ``"reference"`` runs the plain
definition of each operator: slow, in any float dtype, the oracle of the tests.
"""

from __future__ import annotations

BACKENDS = ("auto", "torch", "reference")


def resolve_backend(backend: str) -> str:
    """``"torch"`` or ``"reference"`` for a requested ``backend``; ``ValueError`` names what there is otherwise."""
    if backend == "auto":
        return "torch"
    if backend in BACKENDS:
        return backend
    if backend == "triton":
        raise ValueError(
            "backend='triton': this version of graphmoe_kernels has no Triton kernels yet; "
            "use backend='auto' or backend='torch'"
        )
    raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")

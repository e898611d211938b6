"""What a forward finds beside its arguments: layers by name, and how long the sequences of the batch are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class ForwardContext:
    no_compile_layers: dict[str, Any]
    lengths: list[int]


_current: ForwardContext | None = None


def get_forward_context() -> ForwardContext:
    assert _current is not None, "a forward outside of set_forward_context"
    return _current


@contextmanager
def set_forward_context(lengths: list[int], vllm_config: Any) -> Iterator[None]:
    global _current
    before, _current = _current, ForwardContext(vllm_config.compilation_config.static_forward_context, lengths)
    try:
        yield
    finally:
        _current = before

"""Values and errors as messages show them."""

from __future__ import annotations

from collections.abc import Sequence


def as_written(value: object) -> str:
    """Write a field's value for a message; PEFT makes lists of names sets, which print in any order."""
    return repr(sorted(value) if isinstance(value, set) else value)


def shortened(value: object, most: int = 60) -> str:
    """Write a value for a message, with the end of a long one left out."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def some(items: Sequence[str], most: int = 8) -> str:
    """List the first items for a message, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def first_line(error: Exception) -> str:
    """Return what an error says first; Transformers and PEFT go on for paragraphs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

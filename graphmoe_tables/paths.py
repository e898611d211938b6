"""What messages say of paths."""

from __future__ import annotations

from pathlib import Path


def looked_for(path: str | Path) -> str:
    """Say where a path that is not absolute was looked for, as a recipe or an adapter may name it from another folder;
    nothing of one that is."""
    if Path(path).is_absolute():
        return ""
    return f": it was looked for as {Path(path).absolute()}; run from the folder that the name is meant from"

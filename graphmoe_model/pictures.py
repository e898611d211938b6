"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

DPI = 200
UNDATED = {"CreationDate": None}  # the same picture is the same bytes


def write_picture(figure: Figure, path: Path) -> list[str]:
    """Write a figure as PNG for a screen and as PDF for a paper, and return the two files' names.

    Args:
        figure: as it is drawn, in the style that is set.
        path: of the PNG; the PDF lies beside it.
    """
    figure.savefig(path, format="png", dpi=DPI)
    vector = path.with_suffix(".pdf")
    figure.savefig(vector, format="pdf", metadata=UNDATED)
    return [path.name, vector.name]

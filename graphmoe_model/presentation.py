"""How reports look: one Markdown table and one style of plots, for profiles, the demo and the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INK, MUTED, PALE = "#1f2933", "#6b7785", "#dfe5ec"
BLUE, ORANGE = "#2f5fd0", "#e0803a"
BACKING: Any = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no line runs through a figure
STYLE: Any = {  # matplotlib types its settings by a list of literal names
    **{"font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": PALE, "axes.axisbelow": True},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": PALE, "grid.linewidth": 0.8},
    **{"axes.titlelocation": "left", "axes.titlesize": 10, "xtick.major.size": 0, "ytick.major.size": 0},
    **{"xtick.minor.size": 0, "ytick.minor.size": 0},
    "pdf.fonttype": 42,  # text stays text, which editors and search engines read
}


def short_model(name: str) -> str:
    """Return what pictures and tables call a model: a hub's name as it is, of a path its last part."""
    parts = name.rstrip("/").split("/")
    return name if len(parts) <= 2 and not name.startswith((".", "/", "~")) else parts[-1]


def short_paths(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path the shortest end of it, in whole parts, by which it differs from all others."""
    parts = {path: path.rstrip("/").split("/") for path in paths}
    found = {}
    for path, own in parts.items():
        others = [other for name, other in parts.items() if name != path]
        lengths = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        found[path] = "/".join(own[-next(lengths, len(own)) :])
    return found


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table: the first column and those without a name to the left, others to the right.

    A cell's line breaks become spaces and its bars are escaped, so that no text ends a cell.
    """
    lines = [header, [":--", *("--:" if name else ":--" for name in header[1:])], *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines]

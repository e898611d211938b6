"""A notebook as a page of Markdown: its texts, its code, and what the code printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def as_page(notebook: Path) -> str:
    """Return the page; of an output the plain text is taken."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    printed = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
    return [f"```python\n{source}\n```", *(f"```text\n{''.join(lines).rstrip()}\n```" for lines in printed)]

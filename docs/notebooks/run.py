"""Run a notebook from beginning to end in an empty folder, with the packages as they are installed.

python docs/notebooks/run.py docs/notebooks/first-steps.ipynb [OUTPUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# The first cell that runs: which packages the others are about to import, and from where.
WHERE = "import graphmoe_model, graphmoe_kernels; print(graphmoe_model.__file__, graphmoe_kernels.__file__)"


def main(path: Path, result: Path | None = None) -> None:
    """Run it; end with status 1 where a cell fails, or where the packages are those of this repository."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WHERE))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    first, *others = notebook.cells
    found = "".join(output.text for output in first.outputs if output.get("name") == "stdout").strip()
    if not found or f"{Path(__file__).resolve().parents[2]}/graphmoe_" in found:
        sys.exit(f"the packages are those of the repository and not the installed ones: {found}")
    notebook.cells = others
    if result is not None:
        nbformat.write(notebook, result)
    print(f"{path}: {len(others)} cells, with {found}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

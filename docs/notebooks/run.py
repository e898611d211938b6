"""Run a notebook from beginning to end in an empty folder, with the packages as they are installed.

python docs/notebooks/run.py NOTEBOOK [OUTPUT]

OUTPUT is written with what the cells print, but for warnings and progress bars; it may be NOTEBOOK itself.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# The last cell that runs: which packages the others imported, and from where.
WHERE = "import graphmoe_model, graphmoe_kernels; print(graphmoe_model.__file__, graphmoe_kernels.__file__)"


def main(path: Path, result: Path | None = None) -> None:
    """Run it; end with status 1 where a cell fails, or where the packages are those of this repository."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    metadata = copy.deepcopy(notebook.metadata)
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False)
        client.execute()
    *cells, last = notebook.cells
    found = "".join(output.text for output in last.outputs if output.get("name") == "stdout").strip()
    if not found or f"{Path(__file__).resolve().parents[2]}/graphmoe_" in found:
        sys.exit(f"the packages are those of the repository and not the installed ones: {found}")
    if result is not None:
        for cell in (cell for cell in cells if cell.cell_type == "code"):
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        notebook.cells, notebook.metadata = cells, metadata  # the kernel's version is this machine's
        nbformat.write(notebook, result)
    print(f"{path}: {len(cells)} cells, with {found}")


if __name__ == "__main__":
    given = [Path(each) for each in sys.argv[1:]]
    if len(given) not in (1, 2) or not given[0].is_file():
        sys.exit(f"usage: python docs/notebooks/run.py NOTEBOOK [OUTPUT], and NOTEBOOK is a file; got {sys.argv[1:]}")
    main(*given)

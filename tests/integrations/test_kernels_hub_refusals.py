"""What no repository for the kernels hub is assembled from: wrong options and sources, each told with a way out."""

import subprocess
import sys
from pathlib import Path

import pytest

from integrations.kernels_hub import make_kernel

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "my-org/graphmoe-kernels"


def test_the_command_assembles_and_says_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "integrations.kernels_hub.make_kernel", str(tmp_path / "new")]
    command += ["--repo-id", REPOSITORY, "--version", "3"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.endswith("graphmoe-kernels, version 3, for cpu, cuda, rocm\n")
    assert "## Source" not in (tmp_path / "new" / "CARD.md").read_text()
    with pytest.raises(SystemExit, match=r"error: .*new is there and no empty folder; give another one"):
        make_kernel.main([str(tmp_path / "new"), "--repo-id", REPOSITORY])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"repo_id": "graphmoe-kernels"}, ValueError, "repo_id must be OWNER/NAME.*got 'graphmoe-kernels'"),
        ({"repo_id": 'a/"b'}, ValueError, "repo_id must be OWNER/NAME"),
        ({"version": -1}, ValueError, "version must be 0 .* got -1"),
        ({"version": "1"}, TypeError, "version must be an integer.*got '1'"),
        ({"version": True}, TypeError, "version must be an integer"),
        ({"upstream": "git@example.org:a/b"}, ValueError, "upstream must be the https:// address"),
        ({"package": Path("nowhere")}, FileNotFoundError, "nowhere is no package.*give the folder"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, error, message):
    given = {"repo_id": REPOSITORY, **options}
    with pytest.raises(error, match=message):
        make_kernel.assemble(tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "line, error, message",
    [
        ("import graphmoe_kernels.b", ValueError, "__init__.py:2: write 'import graphmoe_kernels.b' as 'from"),
        ("from .b import c", ValueError, "__init__.py:2: write 'from .b import c' as 'from graphmoe_kernels... import"),
        ("from  graphmoe_kernels.b import c", ValueError, "with single spaces on one line"),
        ("from graphmoe_kernels.none import c", FileNotFoundError, "imports graphmoe_kernels.none, which"),
        (
            "import numpy",
            ValueError,
            "imports numpy, and a kernel may import the standard library and torch and triton",
        ),
        ("from rich.table import Table", ValueError, "imports rich"),
        ("", ValueError, "assigns no __all__"),
    ],
)
def test_sources_that_no_kernel_can_have_are_refused(tmp_path, line, error, message):
    package = tmp_path / "graphmoe_kernels"
    package.mkdir()
    (package / "__init__.py").write_text(f'"""A package."""\n{line}\n')
    with pytest.raises(error, match=message):
        make_kernel.assemble(tmp_path / "new", REPOSITORY, package=package)
    assert not (tmp_path / "new").exists()

"""What importing the packages may do: load nothing heavy, touch no device, change no setting of PyTorch's.

Every case runs in a fresh interpreter, since this one has imported everything already.
"""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["graphmoe_kernels", "graphmoe_model"]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code: str) -> None:
    """Runs ``code`` in a fresh interpreter at the repository's root; a failure shows its traceback."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_every_package_is_installed_and_checked():
    """What pyproject.toml leaves out is missing from the wheel, or from what `make check` looks at."""
    ours = {path.name for path in ROOT.glob("graphmoe_*") if path.is_dir()}
    tools = SETTINGS["tool"]
    places = {
        "wheel": {name.removesuffix("*") for name in tools["setuptools"]["packages"]["find"]["include"]},
        "types": set(tools["setuptools"]["package-data"]),
        "mypy": set(tools["mypy"]["files"]),
        "import contracts": set(tools["importlinter"]["root_packages"]),
        "isort": set(tools["ruff"]["lint"]["isort"]["known-first-party"]),
        "warnings": {line.rpartition(":")[2] for line in tools["pytest"]["ini_options"]["filterwarnings"]},
    }
    assert {name: ours - found for name, found in places.items() if ours - found} == {}
    assert [name for name in ours if not (ROOT / name / "py.typed").exists()] == []


def test_the_command_is_there():
    """As pip makes it from pyproject.toml."""
    module, _, function = SETTINGS["project"]["scripts"]["graphmoe"].partition(":")
    run_python(f"""
        import importlib
        assert callable(getattr(importlib.import_module("{module}"), "{function}"))
    """)


def test_kernels_load_no_model_library_and_no_triton():
    """Users of the operators alone pay for no model library, and Triton waits for the first kernel."""
    run_python("""
        import sys
        import graphmoe_kernels
        heavy = {"transformers", "peft", "trl", "accelerate", "triton", "graphmoe_model"} & set(sys.modules)
        assert not heavy, f"import graphmoe_kernels loaded {sorted(heavy)}"
    """)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_where_triton_is_not_installed(package):
    """Triton exists for Linux only: elsewhere the PyTorch implementations must be within reach."""
    run_python(f"""
        import sys
        sys.modules["triton"] = None  # what an import of triton sees where it is not installed
        import {package}
    """)


@pytest.mark.parametrize("package", PACKAGES)
def test_import_initialises_no_cuda(package):
    """A CUDA context made by an import breaks forked data loaders and takes memory from every process."""
    run_python(f"""
        import torch
        import {package}
        assert not torch.cuda.is_initialized(), "import {package} initialised CUDA"
    """)


def test_kernels_ask_no_device_when_imported():
    """Devices may be hidden, chosen or simulated after the import: an answer taken then may be wrong."""
    run_python("""
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("import graphmoe_kernels asked about a device")

        for question in ("is_available", "device_count", "current_device", "get_device_capability",
                         "get_device_name", "get_device_properties"):
            setattr(torch.cuda, question, refuse)
        import graphmoe_kernels
    """)


@pytest.mark.parametrize("package", PACKAGES)
def test_import_changes_no_setting_of_pytorch(package):
    """Precision, threads, gradients and random numbers belong to the user's program."""
    run_python(f"""
        import torch

        def settings():
            return {{
                "default dtype": torch.get_default_dtype(),
                "threads": torch.get_num_threads(),
                "gradients": torch.is_grad_enabled(),
                "matmul precision": torch.get_float32_matmul_precision(),
                "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "random state": torch.get_rng_state().tolist(),
            }}

        before = settings()
        import {package}
        after = settings()
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"import {package} changed {{changed}}"
    """)

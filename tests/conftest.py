"""Settings that every test shares: seed, threads, deprecations, and how hypothesis draws its examples."""

import importlib.util
import os
import platform
from importlib import metadata

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which transformers does

import pytest
from hypothesis import settings

from tests import deprecations, interpreter

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.install()

# No deadline: a busy machine is no failure. Derandomised, so that a change is judged by the same examples as
# the one before it; HYPOTHESIS_PROFILE=explore draws fresh ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets")


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # Triton off Linux; the train extra
        return f"no {package}"


def pytest_report_header() -> str:
    """What a run was of: a result without its versions says little."""
    return ", ".join([f"versions: python {platform.python_version()}", *map(_version, VERSIONS)])


@pytest.fixture(autouse=True)
def _deprecations():
    """A deprecated name that our own code uses is an error, at every version that is allowed."""
    with deprecations.refused():
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """One thread: the tensors are tiny, and on a busy machine a second one costs a hundred times what it gains."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from one seed, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _routing_by_tiles(request, monkeypatch):
    """In the interpreter a program per token is what takes longest of a small layer; a tile of 16 gives the same.

    The tests of routing itself, and calls of a few tokens, run the programs that a GPU runs.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or request.path.name.startswith("test_routing_triton"):
        return
    from graphmoe_kernels.routing.triton import launch

    chosen = launch.kind

    def by_tiles(name, num_tokens, *rest):
        kernel, constants = chosen(name, num_tokens, *rest)
        if constants["BLOCK_M"] == 1 and num_tokens > 2:
            constants = constants | {"BLOCK_M": 16, "BLOCK_D": 128, "BLOCK_E": max(16, constants["BLOCK_E"])}
        return kernel, constants

    monkeypatch.setattr(launch, "kind", by_tiles)

"""Run a function in two processes of one gloo group, by torchrun, and get what it returns on each rank.

The function lies in a module of its own beside the tests (``<subject>_worker.py``), takes and returns what
``torch.save`` can write, and holds one or more scenarios; a test asserts on what came back::

    @pytest.fixture(scope="module")
    def ranks():
        return launch(fsdp2_worker.train, "mixlora", timeout=60)

    def test_ranks_agree(ranks):
        assert ranks[0]["loss"] == ranks[1]["loss"]

Starting the processes and importing PEFT in both takes about 10 seconds, so scenarios that need the same surroundings
share a launch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
START_AND_END = 60  # seconds beyond the workers' own limit: imports, and torchrun's patience with what it ends
SHOWN = 12_000  # characters of a failed run's output


class WorkersFailed(AssertionError):
    """A rank raised, died or ran past its time; the message has the failing rank's traceback."""


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 120,
    processes: int = 2,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``function(*arguments)`` in every process and return the results by rank.

    Args:
        function: of the top level of an importable module, not of a test's (which pytest imports its own way).
        arguments: what ``torch.save`` writes.
        timeout: seconds from a worker's start after which it writes where each of its threads is, and ends.
        processes: how many ranks.
        environment: variables for the workers, beside those of this process.

    Raises:
        WorkersFailed: a rank raised an exception, ended by a signal, or was not done in time. No process is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        name = f"{function.__module__}:{function.__qualname__}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        worker = ["-m", "tests.distributed.worker", name, folder, str(timeout)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
        process = subprocess.Popen(
            torchrun + worker,
            cwd=ROOT,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout + START_AND_END)
        except subprocess.TimeoutExpired:
            raise WorkersFailed(f"{name} was not done in {timeout + START_AND_END} seconds\n{_end(process)}") from None
        except BaseException:
            _end(process)
            raise
        if process.returncode != 0:
            raise WorkersFailed(f"{name} failed (torchrun: {process.returncode})\n{output[-SHOWN:]}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _end(process: subprocess.Popen[str]) -> str:
    """End torchrun and, by it, the workers, which have sessions of their own and outlive a torchrun that is killed."""
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=START_AND_END)[0][-SHOWN:]

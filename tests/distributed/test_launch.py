"""The launcher of all tests here: results by rank, tracebacks of failing ranks, nothing left of a hanging run."""

from __future__ import annotations

import subprocess

import pytest

from tests.distributed import launch_worker
from tests.distributed.launch import WorkersFailed, launch

pytestmark = pytest.mark.distributed


def test_results_come_back_by_rank():
    """Both ranks are in one group and their results are given in order."""
    assert launch(launch_worker.add_up, 20, timeout=60) == [41, 41]


def test_a_failing_rank_shows_its_traceback():
    """A rank that raises ends the other, and the message has its exception and line."""
    with pytest.raises(WorkersFailed, match=r"(?s)in raise_on_one_rank.*rank 1 is out of sorts"):
        launch(launch_worker.raise_on_one_rank, timeout=60)


def test_a_hang_ends_in_time_and_says_where():
    """Ranks that wait for each other are ended, both of them, and say where they waited."""
    with pytest.raises(WorkersFailed, match=r"(?s)Timeout.*in miss_a_collective"):
        launch(launch_worker.miss_a_collective, timeout=10)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "launch_worker:miss_a_collective" not in running

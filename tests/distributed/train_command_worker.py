"""``graphmoe train`` in each of several processes: test_train_command.py."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import Any

from tests.distributed.on_cpu import shard_on_cpu


def command(words: list[str], sharded: bool, killed_at: int | None = None) -> tuple[int, str, str]:
    """Run the command and return its status and what this process printed.

    Args:
        words: what comes after ``graphmoe``.
        sharded: whether Accelerate is to split the model although there is no GPU.
        killed_at: the step at whose end every process is killed, if any.
    """
    if sharded:
        shard_on_cpu()
    from graphmoe_cli.app import app

    if killed_at is not None:
        _kill_after(killed_at)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(words, prog_name="graphmoe")
        except SystemExit as end:
            status = int(end.code or 0)
    print(err.getvalue(), file=sys.stderr)  # into the failure's message, where the other process waits in vain
    return status, out.getvalue(), err.getvalue()


def _kill_after(step: int) -> None:
    from graphmoe_model.training.callbacks import LastStep

    on_step_end = LastStep.on_step_end

    def killed(self: LastStep, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        on_step_end(self, args, state, control, **kwargs)

    LastStep.on_step_end = killed  # type: ignore[method-assign]

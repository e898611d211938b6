"""``graphmoe train`` in each of several processes: test_train_command.py."""

from __future__ import annotations

import contextlib
import io
import sys

from tests.distributed.on_cpu import shard_on_cpu


def command(words: list[str], sharded: bool) -> tuple[int, str, str]:
    """Run the command and return its status and what this process printed.

    Args:
        words: what comes after ``graphmoe``.
        sharded: whether Accelerate is to split the model although there is no GPU.
    """
    if sharded:
        shard_on_cpu()
    from graphmoe_cli.app import app

    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(words, prog_name="graphmoe")
        except SystemExit as end:
            status = int(end.code or 0)
    print(err.getvalue(), file=sys.stderr)  # into the failure's message, where the other process waits in vain
    return status, out.getvalue(), err.getvalue()

"""One process at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(file: Path, what: str, instead: str) -> Iterator[None]:
    """Keep other processes away for the time of the block; the system lets go when this process ends, however.

    On a system without such locks (Windows) nothing is kept away.

    Args:
        file: the lock, in a folder that is there.
        what: is locked, with its verb, for messages: "the sweep in F is".
        instead: of waiting for the other process, what can be done.

    Raises:
        ValueError: another process has it (its id is named), or the folder cannot be written to.
    """
    try:
        lock = open(file, "a+", encoding="utf-8")  # noqa: SIM115  # closed below: closing lets go
    except OSError as error:
        raise ValueError(f"{file.parent} cannot be written to: {error.strerror}; name another folder") from error
    with lock:
        try:
            import fcntl  # Windows has none
        except ImportError:
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            process = lock.read().strip() or "unknown"
            raise ValueError(f"{what} in use by process {process}; wait for its end, or {instead}") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield

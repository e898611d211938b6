"""The folder that a command writes into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_folder(out: Path, option: str = "--out") -> None:
    """`ValueError` that names the option, for a folder that is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{option} {out} is a file; name a folder")


@contextmanager
def results_folder(out: Path, option: str = "--out") -> Iterator[None]:
    """Make a folder that a command will write into, and take it away again if nothing was written.

    Args:
        out: the folder; it may be there.
        option: that names it.

    Raises:
        ValueError: it is a file, or cannot be made.
    """
    check_folder(out, option)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]  # the innermost first
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {out} cannot be written to: {error.strerror}; name another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # one that is not empty stays, and so do those around it
            for folder in new:
                folder.rmdir()

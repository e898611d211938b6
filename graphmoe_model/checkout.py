"""The commit that figures come from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def checked_out_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with ``+`` if files differ; None outside one."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parents[1]
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", "pyproject.toml") != "pyproject.toml":
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""The result as it grows: one JSON file, whole at every moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VERSION = 1


class Document:
    """What a run has found so far, on disk after every step.

    The file is replaced, never written into: a run that is killed leaves what the last step saved. A run that starts
    again on the same file goes on after the steps that it names.

    Attributes:
        content: ``conditions``, ``limits``, ``steps`` (name -> state), ``checks``, ``kernels``, ``layers``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "version": VERSION,
            "conditions": {},
            "limits": {},
            "steps": {},
            "checks": [],
            "kernels": [],
            "layers": [],
        }
        if path.exists():
            self.content = json.loads(path.read_text())

    def save(self) -> None:
        """Write all of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)

    def begin(self, step: str) -> None:
        """Note that a step runs: should it end the process, the next process passes it over."""
        self.content["steps"][step] = {"state": "running"}
        self.save()

    def end(self, step: str, state: str, seconds: float = 0.0, note: str = "") -> None:
        """Note how a step ended: ``"done"``, ``"failed"`` or ``"skipped"``, with the reason."""
        self.content["steps"][step] = {"state": state, "seconds": round(seconds, 2), "note": note}
        self.save()

    def attempted(self, step: str) -> bool:
        """Whether a step has run, or was running when a process ended."""
        return step in self.content["steps"] and self.content["steps"][step]["state"] != "skipped"

    def close_interrupted(self) -> list[str]:
        """Mark the steps that were running when a process ended as failed, and name them."""
        names = [name for name, step in self.content["steps"].items() if step["state"] == "running"]
        for name in names:
            self.content["steps"][name] = {"state": "failed", "note": "the process ended, or was ended, in this step"}
        return names

"""What a run ended with, and under which conditions."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graphmoe_model.machine import device_name, installed_version
from graphmoe_model.training.run_folder import RESULT_FILE
from graphmoe_model.whole_files import write_whole

PACKAGES = ("graphmoe", "torch", "triton", "transformers", "peft", "accelerate", "trl", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class TrainingResult:
    """What `RESULT_FILE` beside the adapter says.

    Attributes:
        steps: of the whole run.
        resumed_from: the step that this process went on from, 0 for none.
        first_loss, last_loss: as logged, each the mean since the log before.
        last_router_loss: Eq. 8 without its weight, as logged last; None where there is none.
        eval_loss: of the saved adapter, the best of the run; None without evaluation.
        best_step: the step of that.
        questions: how many were trained on.
        truncated: how many of them lost their start.
        seconds: of training in this process, evaluations and checkpoints included.
        peak_memory: bytes; on a GPU what PyTorch allocated there, on a CPU the process's; None where
            the system does not tell.
        trainable_parameters: of the adapter.
        adapter_bytes: the size of its weight file.
        conditions: device, dtype, threads, processes, seed and versions.
    """

    steps: int
    resumed_from: int
    first_loss: float | None
    last_loss: float | None
    last_router_loss: float | None
    eval_loss: float | None
    best_step: int | None
    questions: int
    truncated: int
    seconds: float
    peak_memory: int | None
    trainable_parameters: int
    adapter_bytes: int
    conditions: dict[str, Any]


def write_result(result: TrainingResult, folder: str | Path) -> None:
    """Write `RESULT_FILE`, whole or not at all."""
    write_whole(Path(folder) / RESULT_FILE, json.dumps(asdict(result), indent=2) + "\n")


def read_result(folder: str | Path) -> TrainingResult | None:
    """Read it; None if there is none, as of a run that has not ended."""
    path = Path(folder) / RESULT_FILE
    return TrainingResult(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def conditions(device: torch.device, dtype: torch.dtype, processes: int, seed: int) -> dict[str, Any]:
    """Say where and with what a run ran."""
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "seed": seed,
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := installed_version(package))},
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process had so far; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

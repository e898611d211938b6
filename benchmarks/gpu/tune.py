"""Tries configurations of the kernels on this GPU: ``python -m benchmarks.gpu.tune`` or ``make tune``.

For every kernel, size class and dtype class the neighbours of the shipped configuration are checked against fp64,
those that are right are timed in turns, and the fastest goes into ``graphmoe_kernels/configs/<device class>/``. The
configuration that is there stays unless another one is clearly faster. Each is tuned in a process of its own: what
takes the device down costs that one alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "Tuning needs a CUDA device, and there is none."
# Tuned first is what a layer spends most of its time in.
ORDER = ("experts", "gru", "routing")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__.split("\n")[0])
    p.add_argument("--minutes", type=float, default=9.0, help="how long all of it may take (%(default)s)")
    p.add_argument(
        "--seconds", type=float, default=60.0, help="of one kernel, size class and dtype class (%(default)s)"
    )
    p.add_argument("--kernel", action="append", default=[], metavar="TEXT", help="only names with TEXT; may repeat")
    p.add_argument("--dry-run", action="store_true", help="show what would be chosen, write nothing")
    p.add_argument("--list", action="store_true", help="name what can be tuned, and end (needs no GPU)")
    p.add_argument(
        "--log", type=Path, metavar="FILE", help="also write every candidate's time or fault to FILE, as JSON"
    )
    p.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    return p


def names() -> list[tuple[str, str, str, str]]:
    """Operator, kernel, size class and dtype class of everything that is shipped, what matters most first."""
    from graphmoe_kernels.launching import config_table

    found = [
        (operator, kernel, size, dtype)
        for operator in ORDER
        for kernel, sizes in config_table("sm_90", operator).items()
        for size, dtypes in sizes.items()
        for dtype in dtypes
    ]
    # Half precision first, wide ranks last.
    return sorted(found, key=lambda cell: (cell[1].endswith("_wide_rank"), cell[3] != "half"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune; 0 when everything that was asked for was tuned, 1 when some failed or had no time, 2 without a GPU."""
    options = parser().parse_args(arguments)
    work = [cell for cell in names() if not options.kernel or any(text in " ".join(cell) for text in options.kernel)]
    if not work:
        print(f"no kernel's name contains {' or '.join(map(repr, options.kernel))}; see --list", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(" ".join(cell) for cell in work))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.worker:
        return tune_one(options)
    return tune_all(options, work)


def tune_all(options: argparse.Namespace, work: Sequence[tuple[str, str, str, str]]) -> int:
    """Every cell in a process of its own, while there is time; files are rewritten as choices are made."""
    from benchmarks.gpu.tuning import Cell, rewrite
    from graphmoe_kernels.launching import CONFIGS

    end, log, complete = time.monotonic() + 60 * options.minutes, [], True
    for names_of in work:
        cell, left = Cell(*names_of), end - time.monotonic()
        if left < 20:
            print(f"{cell.name}: no time left")
            complete = False
            continue
        found = _in_process(cell.name, min(options.seconds, left - 10), left)
        log.append({"cell": cell.name, **found})
        if options.log is not None:
            options.log.parent.mkdir(parents=True, exist_ok=True)
            options.log.write_text(json.dumps(log, indent=1) + "\n")
        if "config" not in found:
            print(f"{cell.name}: {found['failed']}")
            complete = False
            continue
        print(f"{cell.name}: {describe(found)}", flush=True)
        if found["changed"] and not options.dry_run:
            rewrite(CONFIGS, found["device"], cell, found["config"])
    return 0 if complete else 1


def _in_process(name: str, seconds: float, limit: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu.tune", "--worker", name, "--seconds", f"{seconds:.1f}"]
        try:
            code = subprocess.run([*command, "--log", str(path)], cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return {"failed": "ended, for it took too long"}
        return json.loads(path.read_text()) if path.exists() else {"failed": f"its process ended with {code}"}


def tune_one(options: argparse.Namespace) -> int:
    """The process of one cell: writes what it found to ``--log``."""
    from benchmarks.devices import CudaDevice
    from benchmarks.gpu.tuning import Cell, Tuner
    from benchmarks.sizes import MODELS

    tuner = Tuner(Cell(*options.worker.split()), MODELS["llama-3-8b"].sizes(1, 3, "bf16"), CudaDevice())
    before = dict(tuner.current)
    choice = tuner.run(options.seconds)
    found = {
        "device": tuner.device_class,
        "before": before,
        "config": choice.config,
        "changed": choice.changed,
        "seconds": choice.seconds,
        "refused": choice.refused,
    }
    options.log.write_text(json.dumps(found))
    return 0


def describe(found: dict) -> str:
    """A choice in a line: what was tried, what was chosen, and what it gained."""
    seconds = {json.dumps(config): of_config for config, of_config in found["seconds"]}
    tried = f"{len(found['seconds'])} right and {len(found['refused'])} refused"
    old, new = (seconds.get(json.dumps(found[key])) for key in ("before", "config"))
    if new is None:
        return f"{tried}; nothing right was timed, kept as it was"
    if not found["changed"]:
        return f"{tried}; kept at {1e6 * new:.1f} us"
    gain = "the one before is not right" if old is None else f"{1e6 * old:.1f} us before"
    return f"{tried}; {found['config']} at {1e6 * new:.1f} us, {gain}"


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks on a GPU in limited time, the most important first: ``make gpu-report``.

The work is `pytest benchmarks --minutes`, in a second process. Where a kernel takes that process or the device with it,
another one goes on after the case that was running; where time is up, it is ended. What was found is on disk in either
case.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.document import RESULTS, Document, ResultError, Source

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "The GPU report needs a CUDA device, and there is none (--device cpu --sizes tiny tries the code path)."
# A case without an end for so long hangs: its process is ended, and the next goes on after it.
STUCK_SECONDS = 200.0
# Between the budget's end, after which no case begins, and the end of the process.
GRACE_SECONDS = 25.0
USAGE_ERROR = 4  # pytest's exit code for options that it does not take


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know goes to pytest."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=f"{__doc__.splitlines()[0]} Further options are those of `pytest benchmarks`.",
    )
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the Markdown (%(default)s)")
    p.add_argument("--minutes", type=float, default=8.5, help="how long all of it may take (%(default)s)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    p.add_argument("--file", type=Path, help="the JSON to write or to go on with (default: named by device and date)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; 0 if a layer or a kernel was timed and no check failed, 1 otherwise, 2 without a GPU."""
    start = time.monotonic()
    p = parser()
    options, further = p.parse_known_args(arguments)
    if options.minutes < 1:
        p.error(f"--minutes must be at least 1, got {options.minutes:g}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
    from benchmarks.conditions import now

    path = (options.file or options.out / f"{options.device}-{now()[:19].replace(':', '')}.json").resolve()
    try:
        Document(path)
    except ResultError as error:
        p.error(str(error))
    code = supervise([*further, "--device", options.device], path, 60 * options.minutes - (time.monotonic() - start))
    return code if code == USAGE_ERROR else finish(path)


def supervise(options: Sequence[str], path: Path, seconds: float) -> int | None:
    """Start the second process until a run of it ends by itself, or the time is up; the last one's exit code."""
    environment = dict(os.environ)
    if "cpu" in options:
        environment["TRITON_INTERPRET"] = "1"  # the kernels' code path, without a GPU
    end, before, code = time.monotonic() + seconds, 0, None
    while (left := end - time.monotonic() - GRACE_SECONDS) > 0:
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--result", str(path)]
        process = subprocess.Popen([*command, "--minutes", f"{left / 60:.3f}", *options], cwd=ROOT, env=environment)
        code = _wait(process, path, end - 5)
        document = Document(path)
        if code == USAGE_ERROR or (code in (0, 1) and document.content["steps"]):  # done, whoever was wrong
            return code
        for name in document.close_interrupted():
            print(f"        the process ended in: {name}", flush=True)
        if document.content["steps"]:
            document.save()
        if code is None and time.monotonic() > end - GRACE_SECONDS:
            return code
        if (attempted := sum(document.attempted(name) for name in document.content["steps"])) == before:
            print(f"the report's process ended with {code} before it began another case", file=sys.stderr)
            return code
        before = attempted
    return code


def _wait(process: subprocess.Popen[bytes], path: Path, end: float) -> int | None:
    """The exit code; None where the process was ended, for time or for lack of progress."""
    progress, seen = time.monotonic(), 0.0
    while (code := process.poll()) is None:
        changed = path.stat().st_mtime if path.exists() else 0.0
        now = time.monotonic()
        if changed != seen:
            progress, seen = now, changed
        if now > end or now - progress > STUCK_SECONDS:
            process.kill()
            process.wait()
            return None
        time.sleep(0.2)
    return code


def finish(path: Path) -> int:
    """Write the Markdown beside the JSON, and say by the exit code whether all is well."""
    from benchmarks.page import page

    content = Document(path).content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(page([Source(path, content)]), encoding="utf-8")
    print(f"written to {path} and {path.with_suffix('.md').name}")
    wrong = any(not check["passed"] for check in content["checks"])
    failed = any(step["state"] == "failed" for step in content["steps"].values())
    return 1 if wrong or failed or not (content["kernels"] or content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks and times the kernels and the layer on a GPU: ``python -m benchmarks.gpu.report`` or ``make gpu-report``.

The work is done by a second process. Where a kernel takes that process or the device with it, another one goes on
after the step that was running; where time is up, it is ended. What was found is on disk in either case.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.document import RESULTS

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "The GPU report needs a CUDA device, and there is none (--device cpu --sizes tiny tries the code path)."
# A step without progress for so long hangs: its process is ended, and the next goes on after it.
STUCK_SECONDS = 200.0
# Between the budget's end, after which no step begins, and the end of the process.
GRACE_SECONDS = 25.0
LOST_EXIT = 75


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the Markdown (%(default)s)")
    p.add_argument("--minutes", type=float, default=8.5, help="how long all of it may take (%(default)s)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    p.add_argument("--sizes", choices=("llama-3-8b", "tiny"), default="llama-3-8b", help="(%(default)s)")
    p.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="steps with TEXT in their name; may repeat"
    )
    p.add_argument("--commit", help="the commit, where there is no git checkout to ask")
    p.add_argument("--file", type=Path, help="the JSON to write or to go on with (default: named by device and date)")
    p.add_argument("--worker", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; 0 if a layer or a kernel was timed and no check failed, 1 otherwise, 2 without a GPU."""
    start = time.monotonic()
    p = parser()
    options = p.parse_args(arguments)
    if options.minutes < 1:
        p.error(f"--minutes must be at least 1, got {options.minutes:g}")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.worker is not None:
        return work(options)
    from benchmarks.conditions import now
    from benchmarks.document import Document, ResultError
    from benchmarks.gpu.plan import steps
    from benchmarks.gpu.presets import PRESETS

    names = [step.name for step in steps(PRESETS[options.sizes], options.device)]
    if unknown := [text for text in options.only if not any(text in name for name in names)]:
        p.error(f"--only {unknown[0]!r} is in no step's name; the steps are:\n  " + "\n  ".join(names))
    if options.file is not None:
        try:
            Document(options.file)
        except ResultError as error:
            p.error(str(error))
    name = f"{options.device}-{now()[:19].replace(':', '')}.json"
    path = (options.file or options.out / name).resolve()
    supervise(options, path, 60 * options.minutes - (time.monotonic() - start))
    return finish(path)


def work(options: argparse.Namespace) -> int:
    """The second process: the steps that the document does not have yet."""
    from benchmarks.conditions import conditions
    from benchmarks.devices import CpuDevice, CudaDevice
    from benchmarks.document import Document
    from benchmarks.gpu.budget import Budget
    from benchmarks.gpu.plan import DeviceLost, Run, run_steps, steps
    from benchmarks.gpu.presets import PRESETS

    device = CudaDevice() if options.device == "cuda" else CpuDevice()
    document = Document(options.file)
    if not document.content["conditions"]:
        document.content["conditions"] = conditions(device, options.commit) | {"sizes": options.sizes}
        document.save()
    preset = PRESETS[options.sizes]
    plan = [
        s
        for s in steps(preset, options.device)
        if not options.only or s.name == "limits" or any(t in s.name for t in options.only)
    ]
    try:
        run_steps(Run(preset, device, document, Budget(options.worker)), plan, lambda line: print(line, flush=True))
    except DeviceLost:
        return LOST_EXIT
    return 0


def supervise(options: argparse.Namespace, path: Path, seconds: float) -> None:
    """Start the second process until a run of it ends by itself, or the time is up."""
    from benchmarks.document import Document

    path.parent.mkdir(parents=True, exist_ok=True)
    end, before = time.monotonic() + seconds, 0
    while (left := end - time.monotonic() - GRACE_SECONDS) > 0:
        command = [sys.executable, "-m", "benchmarks.gpu.report", "--worker", f"{left:.1f}", "--file", str(path)]
        command += ["--device", options.device, "--sizes", options.sizes]
        command += [word for text in options.only for word in ("--only", text)]
        command += ["--commit", options.commit] if options.commit else []
        process = subprocess.Popen(command, cwd=ROOT)
        code = _wait(process, path, end - 5)
        if code == 0:
            return
        document = Document(path)
        for name in document.close_interrupted():
            print(f"        the process ended in: {name}", flush=True)
        document.save()
        if code is None and time.monotonic() > end - GRACE_SECONDS:
            return
        if (attempted := sum(document.attempted(name) for name in document.content["steps"])) == before:
            print(f"the report's process ended with {code} before it began another step", file=sys.stderr)
            return
        before = attempted


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
    """Write the Markdown beside the JSON, print it, and say by the exit code whether all is well."""
    from benchmarks.document import Document
    from benchmarks.report import markdown

    content = Document(path).content
    text = markdown(content)
    path.with_suffix(".md").write_text(text)
    print(text)
    print(f"written to {path} and {path.with_suffix('.md').name}")
    wrong = any(not check["passed"] for check in content["checks"])
    failed = any(step["state"] == "failed" for step in content["steps"].values())
    return 1 if wrong or failed or not (content["kernels"] or content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())

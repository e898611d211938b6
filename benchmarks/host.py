"""The host's part of a layer: CPU time of a call at sizes where there is little else, and where it goes.

On PyTorch the call is measured as it is. On Triton it runs in a process of its own where the CPU stands for a GPU: a
launch stops before the device ("unlaunched": does nothing; "bound": Triton binds and specialises its arguments first),
so no GPU is needed. What launches would have computed is not there, so these calls are not checked.

    python -m benchmarks.host RESULT.json [--write docs/performance.md]     a result's host times as Markdown
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.devices import Call, CpuDevice, Samples
from benchmarks.document import ResultError, load
from benchmarks.host_profile import PARTS, split
from benchmarks.layers import Layers
from graphmoe_kernels.cost import Sizes
from graphmoe_model.presentation import markdown_table

ROOT = Path(__file__).resolve().parent.parent
# Calls of a turn on the Triton path, and before the first one: kernels are compiled, the fold is built.
CALLS, WARM_UP = 20, 5
TARGET = "sm_90"
TRITON = {"triton_bound": True, "triton_unlaunched": False}
MARKS = ("<!-- host: written by python -m benchmarks.host -->", "<!-- /host -->")


def device() -> CpuDevice:
    """The CPU by the time that this process was on it, which other programs hardly change."""
    return CpuDevice(time.process_time)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch uses one thread, as a second one would spin beside work of some microseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stubbed(case: Case, seconds: float) -> dict[str, Samples]:
    """Seconds of one call of every contender whose launches stop before the device, and of the others as they are."""
    wanted = [(c.label, c.provider, c.sizes.rounds) for c in case.contenders]
    found = in_own_process({"time": wanted, "sizes": vars(case.sizes), "seconds": seconds})
    return {label: Samples(times) for label, times in found.items()}


def profiled(case: Case) -> list[dict[str, Any]]:
    """Seconds of a call by part, as the document's profiles have them: the shares of a profiled call, of the shortest
    call without the profiler."""
    found = []
    for contender in case.contenders:
        of_one = {"label": contender.label, "provider": contender.provider, "sizes": vars(contender.sizes)}
        if contender.provider in TRITON:
            seconds = in_own_process({"split": of_one})
        else:
            with one_thread():
                seconds = _split(of_one)
        adapter = f"T={contender.sizes.rounds}, {contender.provider}"
        found.append({"model": case.model.name, "adapter": adapter, "phase": "host", "tokens": 1, "seconds": seconds})
    return found


def in_own_process(asked: dict[str, Any]) -> Any:
    """What `answer` says in a new process, without Triton's interpreter.

    Raises:
        RuntimeError: that process failed; with its last line.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", "--answer", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that calls a layer without a GPU failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(asked: dict[str, Any]) -> Any:
    """What the new process is asked: times of several calls in turns, or the parts of one.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which binds no argument.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the host's time on Triton cannot be measured under TRITON_INTERPRET=1: unset it")
    from graphmoe_kernels.aot.absent import absent_gpu

    torch.set_num_threads(1)
    with absent_gpu(TARGET):
        if "split" in asked:
            return _split(asked["split"])
        sizes = Sizes(**asked["sizes"])
        calls = {label: _call(provider, rounds, sizes, CALLS) for label, provider, rounds in asked["time"]}
        turns = device().in_turns(calls, asked["seconds"])
        return {label: samples.of_one(CALLS).seconds for label, samples in turns.items()}


def _call(provider: str, rounds: int, sizes: Sizes, calls: int) -> Call:
    """So many forwards of a layer for one token, warmed up."""
    from graphmoe_kernels.launching import stubbed as stubbed_launches

    layer, stops = Layers(CpuDevice()).get(sizes), provider in TRITON
    backend = "triton" if stops else provider
    module = layer.mlp if provider == "dense" else layer.ffn(replace(sizes, rounds=rounds), "auto", backend)
    module.eval()
    x = layer.draw(1, seed=1)

    def run() -> None:
        with torch.no_grad(), stubbed_launches(bind=TRITON[provider]) if stops else nullcontext():
            for _ in range(calls):
                module(x)

    for _ in range(WARM_UP):
        run()
    return run


def _split(asked: dict[str, Any]) -> dict[str, float]:
    sizes = Sizes(**asked["sizes"])
    call = _call(asked["provider"], sizes.rounds, sizes, CALLS)
    shortest = min(device().in_turns({"": call}, 1.0)[""].seconds) / CALLS
    return {part: share * shortest for part, share in split(call).items()}


def section(content: dict[str, Any]) -> str:
    """A result's host times as Markdown: the shortest of all turns, and the parts of a call.

    Raises:
        ResultError: the result has none.
    """
    rows = [row for row in content["rows"] if row["group"] == "host"]
    profiles = [profile for profile in content["profiles"] if profile["phase"] == "host"]
    if not rows:
        raise ResultError(
            "the result has no rows of the group host: run pytest benchmarks --groups host --save-results"
        )
    c = content["conditions"]
    lines = [
        f"{c['device']['name']}, torch {c['versions']['torch']}, Triton {c['versions']['triton']}, commit "
        f"{c['commit'][:10]}, {c['date'][:10]};",
        "one thread, one token, time of the process, the shortest of "
        f"{min(row['seconds']['turns'] for row in rows)} turns or more; of `generate` per token.",
        "",
    ]
    cells = []
    for row in rows:
        tokens = row.get("tokens a second") or 0.0  # of a `generate`: the median's, so the units follow from both
        units = tokens * row["seconds"]["median"] or 1.0
        cells.append([f"{row['model']}, {row['mode']}: {row['label']}", f"{1e6 * row['seconds']['best'] / units:,.0f}"])
    lines += [*markdown_table(("", "us"), cells), ""]
    if profiles:
        names = [f"{each['model']}, {each['adapter']}" for each in profiles]
        parts = [[part, *(f"{1e6 * each['seconds'].get(part, 0.0):,.0f}" for each in profiles)] for part in PARTS]
        lines += [*markdown_table(("us of a call", *names), parts), ""]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Put ``text`` between the marks in a page.

    Raises:
        ResultError: the page has no marks.
    """
    page = path.read_text(encoding="utf-8")
    if not all(page.count(mark) == 1 for mark in MARKS):
        raise ResultError(f"{path} does not have the lines {MARKS[0]} and {MARKS[1]}, between which the table goes")
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n\n{text.strip()}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a result's host times, or write them to a page; 2 with one line on stderr for wrong input."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.host", description="A result's host times as Markdown.")
    p.add_argument("result", type=Path, nargs="?", help="of pytest benchmarks --groups host --save-results")
    p.add_argument("--write", type=Path, metavar="PAGE", help="put them between the marks of this page")
    p.add_argument("--answer", help=argparse.SUPPRESS)
    options = p.parse_args(arguments)
    if options.answer is not None:
        print(json.dumps(answer(json.loads(options.answer))))
        return 0
    if options.result is None:
        p.error("name a result: pytest benchmarks --groups host --save-results writes one")
    try:
        text = section(load(options.result))
        if options.write is None:
            print(text)
        else:
            write(options.write, text)
    except ResultError as error:
        print(f"benchmarks.host: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

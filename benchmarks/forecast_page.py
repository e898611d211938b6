"""The page of predictions as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.forecast import (
    DECODE,
    EXPERTS,
    HOST,
    LLAMA,
    OTHERS,
    PREFILL,
    ROUNDS,
    TRAINING,
    others,
    ours,
    parts,
    readings,
    times,
    trace,
)
from benchmarks.latency import DEVICES, LATENCY, LAUNCH, OVERLAPPED, RAMP, Device, calibration
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Launch

H100 = DEVICES[0]
# Tokens, experts, training: the cases whose time is taken apart, into so many parts.
WHERE = ((8192, 8, False), (8192, 64, False), (1, 8, False), (16, 64, False), (8192, 8, True), (8192, 64, True))
SHOWN = 12
INTRODUCTION = f"""# Predictions that add latencies

Written by `python -m benchmarks.predictions --write`. Every time but those called measured is a **prediction**, by a
model of time that was made before these kernels had run on a GPU; the configurations of some are what a sweep on an
H100 chose. What an H100 measured of them is [below](#what-an-h100-measured-of-this-page).
[PREDICTIONS.md](PREDICTIONS.md) is the page of 2026-11-23, left as it was; what was wrong with it is
[below](#what-the-page-of-2026-11-23-had-wrong).

## How a time comes about

The layer's host code runs on tensors without memory, forward and backward, and everything that it starts is written
down: products, operations of PyTorch, kernels (`graphmoe_kernels.aot.trace`). A kernel's loops are read from its
machine code (`aot_sm_90.json`, `aot_sm_80.json`): the cycles that one warp takes for a pass, by the counts that the
compiler put into each instruction, and between which of them it waits for loads. A wait ends {LATENCY} cycles after the
last load that it is for. So a program's time is that of its passes; blocks beyond those that are resident at once
follow in waves. A kernel takes the largest of these:

- loads: the waves times a program's cycles (chains of loads and everything between them);
- issue: the instructions of all warps over four a cycle and multiprocessor;
- memory: the bytes of its tensors over the copy rate; L2: these and the experts' matrices of every tile over the L2's
  rate; {1e6 * RAMP:.1f} us on top.

A product of cuBLAS takes its operations over the product rate, and the {1 - OVERLAPPED:.0%} of its bytes that do not
hide behind them, or all of its bytes if that is more. Anything else takes its bytes over the copy rate. Each of those
has {1e6 * RAMP:.1f} us on top, and every launch {1e6 * LAUNCH:.1f} us, as in a CUDA graph. Without a graph the host may
take longer than the device: the column "host" has {1e6 * HOST["ours"]:.0f} us for everything that is started.

Llama-3-8B sizes (D 4096, F 14336, G 409, k 2, r 16), bf16, adapters in bf16 for inference and in fp32 for training;
experts are drawn uniformly. Others are taken by the terms of the cost model, each one launch that moves its tensors
once: the literal loop as torch.compile at its best would have it, but with what its products write for each slot, and
MixLoRA's algorithm (the peer), whose eager operations take 2 to 2.5 times as long.
"""
MEASURED = """## What an H100 measured of this page

[The result](results/cuda-2026-11-26T202140.md) is of the same kernels with the configurations before the sweep, beside
this page as it was for those.

- Layers took 1.00 to 1.02 times as long as predicted at one token, 1.17 at 16, 1.44 at 64, 1.12 (T=3) and 1.18 (T=1) in
  prefill of 8192 tokens, 1.20 (T=1) to 1.28 (T=3) in a training step. Without a graph the host was what took the time
  up to 2048 tokens.
- The wide kernels of experts took longer: 1.12 to 1.22 times forward, 1.59 to 1.75 backward. The page takes the
  largest of loads, instructions and bytes; Nsight Compute finds them half used each (DRAM 51 to 54%, an instruction in
  40 to 48% of the cycles), so they hide each other only in part.
- The GRU's kernels took 1.63 and 2.02 times as long in programs of 8 warps. Of 4, which issue the products of a warp
  group whole, they take 51 and 88 us in place of 85 and 130: the page did not tell them apart.
- Routing's first round took half of its prediction (32 us against 66), and small kernels 0.3 to 0.6 of theirs: what the
  page adds to each launch is more than a launch costs in a graph.
- The kernel of 3 to 64 tokens is the one that is furthest off: 16 tokens in three rounds took 86 us, predicted 42.
- Pieces of H M^T that fit in the L2 cache do not pay: a later round's experts take 0.93 ms in one piece, 0.99 in two,
  1.27 in 8 and 1.52 in 16 (programs too few for full waves).
"""
OLD = """## What the page of 2026-11-23 had wrong

- It took the largest of a kernel's limits for its time. The experts' kernels had none of these limits: 8 warps on a
  multiprocessor waited for one load after the other, and took 2.6 to 6.8 times what it said. The table above has the
  same kernels by their loads.
- It took one program for every 128 tokens as enough, and did not count waves.
- It had the L2's rate as the limit of most kernels; none was near it.
- It put no start on products and kernels at few tokens (the dense MLP at one token: 88.5 us for an H200, where an H100
  took 133.5 us), and took 1.3 us for what takes 3 to 12.
- It had no training step, no dense MLP's backward, and n = 64 for one operator alone.
- It took an order of tokens from the first round for all rounds, as the layer did then: a later round's kernel took
  4.6 ms with it, not 2.8.
"""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, its first column to the left."""
    marks = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, marks, *lines)) + "\n"


def us(seconds: float) -> str:
    """Microseconds."""
    return f"{1e6 * seconds:,.1f}"


def over(numerator: float, denominator: float) -> str:
    """One time over another."""
    return f"{numerator / denominator:.2f}"


def page() -> str:
    """The whole page."""
    sections = (INTRODUCTION, limits(), fitted(), targets(), layers(), training(), where(), kernels(), MEASURED, OLD)
    return "\n".join(sections)


def limits() -> str:
    """What is taken of each device."""
    lines = [
        (d.name, str(d.multiprocessors), f"{d.copy / 1e12:.2f}", f"{d.product / 1e12:,.0f}", f"{d.l2 / 1e12:.2f}",
         f"{d.clock / 1e9:.3f}", d.source)
        for d in DEVICES
    ]  # fmt: skip
    return "## The limits\n\n" + table(
        ("device", "multiprocessors", "copy TB/s", "bf16 TFLOP/s", "L2 TB/s", "GHz", "from"), lines
    )


def fitted() -> str:
    """How the model fits what was measured."""
    lines = [(m.what, us(1e-6 * m.predicted()), us(1e-6 * m.measured), over(m.predicted(), m.measured), m.source)
             for m in calibration()]  # fmt: skip
    for what, form, tokens, rounds, train, measured in OTHERS:
        time = others(form, replace(LLAMA, tokens=tokens, rounds=rounds), train, H100)
        lines.append((what, us(time), us(1e-6 * measured), over(1e6 * time, measured), "cuda-2026-11-26T010249.json"))
    return (
        "## Against what an H100 measured\n\nFitted were the latency, to the six kernels of commit 387fd8a; the share "
        "of a product's bytes, to H M^T alone (342 to 362 us); and the start, to the dense MLP at one token. The "
        "stream's prototype and all else played no part.\n\n"
        + table(("", "predicted us", "measured us", "predicted / measured", "result"), lines)
    )


def sizes(tokens: int, rounds: int, experts: int) -> Sizes:
    """A layer of the page."""
    return replace(LLAMA, tokens=tokens, rounds=rounds, experts=experts)


def layers() -> str:
    """Inference on all devices."""
    lines = []
    for device in DEVICES:
        for tokens in (*PREFILL, *DECODE):
            for rounds in ROUNDS:
                lines += [_layer(device, tokens, rounds, n, training=False) for n in EXPERTS]
    return "## The layer in inference\n\n" + table(LAYER_HEADER, lines)


def training() -> str:
    """A training step on all devices."""
    lines = []
    for device in DEVICES:
        for tokens in TRAINING:
            for rounds in ROUNDS:
                lines += [_layer(device, tokens, rounds, n, training=True) for n in EXPERTS]
    return (
        "## The training step\n\nForward and backward, and the fold with its gradients: the column fold has what reads "
        "no token.\n\n" + table((*LAYER_HEADER, "fold us"), lines)
    )


LAYER_HEADER = ("", "layer us", "host us", "dense us", "over dense", "literal / layer", "peer / layer", "started")


def _layer(device: Device, tokens: int, rounds: int, experts: int, training: bool) -> list[str]:
    s = sizes(tokens, rounds, experts)
    time = ours(s, training, device)
    dense, literal, peer = (
        others(form, replace(s, rounds=1) if form == "dense" else s, training, device)
        for form in ("dense", "literal", "peers")
    )
    mode, found = "training" if training else "inference", trace(s, training, device.device_class)
    many = "" if tokens == 1 else "s"
    line = [f"{device.name}, {mode}, {tokens} token{many}, T={rounds}, n={experts}", us(time)]
    line += [us(HOST["ours"] * len(found.steps)), us(dense), over(time, dense), over(literal, time), over(peer, time)]
    line.append(str(len(found.steps)))
    if training:
        each = zip(times(s, training, device), found.of_tokens, strict=True)
        line.append(us(sum(time.seconds for time, of_tokens in each if not of_tokens)))
    return line


def targets() -> str:
    """The figures that are wanted, with the older page's and measured ones beside them."""
    lines = []
    for device in DEVICES:
        base = {n: others("dense", sizes(n, 1, 8), False, device) for n in (1, 16, 8192)}
        for tokens, bound, *known in ((8192, 1.6, 1.67, 4.27), (1, 1.7, 1.58, 2.15), (16, 1.7, 1.68, 2.37)):
            beside = [str(known[0]) if device.name == "H200" else "-", str(known[1]) if device is H100 else "-"]
            found = ours(sizes(tokens, 3, 8), False, device) / base[tokens]
            what = f"{'prefill' if tokens > 64 else 'decode'}, {tokens} tokens, T=3, over the dense MLP"
            lines.append(_target(device, what, found, bound, beside))
        step = ours(sizes(8192, 3, 8), True, device)
        what = "training step, 8192 tokens, T=3, times faster than the literal loop compiled"
        lines.append(_target(device, what, others("literal", sizes(8192, 3, 8), True, device) / step, -1.7))
        dense = step / others("dense", sizes(8192, 1, 8), True, device)
        lines.append([f"{device.name}: same, over the dense MLP's", "", f"{dense:.2f}", "-"])
        lines[-1] += ["8.52" if device is H100 else "-", ""]
        for train, tokens in ((False, 8192), (False, 16), (True, 8192)):
            many, few = (ours(sizes(tokens, 3, n), train, device) for n in (64, 8))
            what = f"{'training step' if train else 'inference'}, {tokens} tokens, T=3, n = 64 over n = 8"
            lines.append(_target(device, what, many / few, 1.2))
    header = ("", "wanted", "predicted", "page of 2026-11-23", "measured, commit 387fd8a", "")
    return "## The targets\n\n" + table(header, lines) + "\n" + "\n".join(why())


def why() -> list[str]:
    """What keeps an H100 from each target that it misses."""
    found = []
    for tokens, train, form, rounds, bound in (
        (8192, False, "dense", 1, 1.6),
        (1, False, "dense", 1, 1.7),
        (16, False, "dense", 1, 1.7),
        (8192, True, "literal", 3, 1 / 1.7),
    ):
        s = sizes(tokens, 3, 8)
        late = ours(s, train, H100) - bound * others(form, sizes(tokens, rounds, 8), train, H100)
        base = f"[{LLAMA.hidden}, {LLAMA.intermediate}]", f"[{LLAMA.intermediate}, {LLAMA.hidden}]"
        largest = [part for part in parts(s, train, H100) if not part.name.endswith(base)]
        if late > 0:
            named = "; ".join(f"{part.name}, {us(part.seconds)} us" for part in largest[:5])
            what = "training step" if train else "inference"
            found.append(f"- H100, {what}, {tokens} tokens: {us(late)} us too long. Most, but for the base's: {named}.")
    for tokens, train in ((8192, False), (16, False), (8192, True)):
        few, many = (sizes(tokens, 3, n) for n in EXPERTS)
        late = ours(many, train, H100) - 1.2 * ours(few, train, H100)
        less = {part.name: part.seconds for part in parts(few, train, H100)}
        more = sorted(((p.seconds - less.get(p.name, 0.0), p.name) for p in parts(many, train, H100)), reverse=True)
        if late > 0:
            named = "; ".join(f"{name}, {us(seconds)} us" for seconds, name in more[:5])
            what = "training step" if train else "inference"
            found.append(
                f"- H100, {what}, {tokens} tokens, n = 64: {us(late)} us too long. More than at n = 8: {named}."
            )
    return [*found, ""]


def _target(device: Device, what: str, found: float, bound: float, beside: Sequence[str] = ("-", "-")) -> list[str]:
    """A line; a negative bound is a least figure."""
    kept = found >= -bound if bound < 0 else found <= bound
    wanted = f"{'>=' if bound < 0 else '<='} {abs(bound)}"
    return [f"{device.name}: {what}", wanted, f"{found:.2f}", *beside, "within" if kept else "**misses**"]


def where() -> str:
    """Where the time of the cases with a target goes on an H100."""
    found = ["## Where the time goes on an H100, T=3\n"]
    for tokens, n, train in WHERE:
        s = sizes(tokens, 3, n)
        whole, largest = ours(s, train, H100), parts(s, train, H100)
        shown, rest = largest[:SHOWN], largest[SHOWN:]
        lines = [(p.name, str(p.times), us(p.seconds), f"{p.seconds / whole:.1%}", p.limit) for p in shown]
        left = sum(p.seconds for p in rest)
        lines.append((f"{len(rest)} others", str(sum(p.times for p in rest)), us(left), f"{left / whole:.1%}", ""))
        found.append(f"{'Training step' if train else 'Inference'}, {tokens} tokens, n={n}: {us(whole)} us.\n")
        found.append(table(("part", "times", "us", "share", "limit"), lines))
    return "\n".join(found)


def kernels() -> str:
    """Each kernel in its first round and in a later one, on an H100."""
    lines: list[list[str]] = []
    for n in EXPERTS:
        for tokens, train in ((1, False), (16, False), (64, False), (512, False), (8192, True)):
            s = sizes(tokens, 3, n)
            steps = trace(s, train, "sm_90").steps
            left = Counter(step.name for step in steps if isinstance(step, Launch))
            seen: dict[tuple[str, str], list[str]] = {}
            for step, time in zip(steps, times(s, train, H100), strict=True):
                if isinstance(step, Launch):
                    reading = readings("sm_90").of(step)
                    left[step.name] -= 1
                    key = step.name, "later" if _later(step, (step.name, "first") in seen, left[step.name]) else "first"
                    waits = "-" if reading.waits_between_loads is None else str(reading.waits_between_loads)
                    seen[key] = [
                        f"{key[0]}, {key[1]} round", str(tokens), str(n), "x".join(map(str, step.grid)),
                        str(reading.registers), str(reading.resident_warps), waits, us(time.seconds), time.limit,
                    ]  # fmt: skip
            lines += seen.values()
    header = ("kernel", "tokens", "n", "programs", "registers", "warps/SM", "waits between loads", "us", "limit")
    return "## Kernels on an H100\n\nOne launch; of a round in two pieces the second.\n\n" + table(header, lines)


def _later(launch: Launch, begun: bool, left: int) -> bool:
    """Whether it is of a round after the first: forwards begin with the first round, backwards end with it.

    ``begun``: whether the kernel was launched before, in the first round; ``left``: how often it will be again.
    """
    added = launch.arguments.get("added", launch.arguments.get("inner"))
    if "added" in launch.arguments or "inner" in launch.arguments:
        return bool(added)
    if "backward" in launch.name or launch.name == "experts_stream_sum_tokens":
        return left > 0
    return begun

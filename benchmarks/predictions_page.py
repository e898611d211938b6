"""PREDICTIONS.md: the predictions as a page for readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import predictions as p
from benchmarks.limits import H200
from benchmarks.roofline import shipped_config, work
from benchmarks.tables import markdown_table

NOT_MEASURED = "not measured"


def microseconds(seconds: float | None) -> str:
    """A time as the tables show it."""
    return NOT_MEASURED if seconds is None else f"{1e6 * seconds:,.1f}"


def _tokens(count: int) -> str:
    return f"{count} token" + "s" * (count > 1)


def page(result: dict[str, Any] | None, readings: Sequence[dict[str, Any]]) -> str:
    """The whole page; ``result`` of a GPU run or None, ``readings`` of the compile inspector (may be empty)."""
    lines = [
        "# Predictions for an H200",
        "",
        f"Written on {p.WRITTEN}, before any of these kernels had run on a GPU. Every time below is a **prediction** "
        'by arithmetic, but for the columns "measured"; those are filled from the newest result of `make gpu-report` '
        'in `benchmarks/results/` and say "not measured" where there is none. `make predictions` writes this page anew '
        "from the configurations that are shipped.",
        "",
        _measured_line(result),
        "",
        *_limits(),
        *_kernels(result, readings),
        *_layers(result),
        *_forms(),
        *_tiles(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _measured_line(result: dict[str, Any] | None) -> str:
    if result is None:
        return "Nothing of this package has been measured yet."
    c = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    return f"Measured: {c['device']['name']}, commit {c['commit'][:10]}, {c['date'][:10]}, {versions}."


def _limits() -> list[str]:
    return [
        "## The limits",
        "",
        f"Taken for an H200, as PyTorch's own copy and product reach it: {H200.bandwidth / 1e12:.1f} TB/s of device "
        f"copy (bytes read and written), {H200.matrix / 1e12:.0f} TFLOP/s of bf16 products of random data, "
        f"{H200.multiprocessors} multiprocessors. Assumed: {H200.l2_bandwidth / 1e12:.1f} TB/s from the L2 cache to "
        f"all multiprocessors, {H200.sm_bandwidth / 1e9:.0f} GB/s to one of them, {H200.integer / 1e12:.0f} T 32-bit "
        f"integer operations a second, {1e6 * H200.launch:.1f} us a launch in a CUDA graph.",
        "",
        "A predicted time is the largest of four times and a launch: compulsory bytes over the copy rate; all bytes "
        "that the tiles read and write over the L2 rate; operations of the matrix units as executed over the product "
        "rate; integer operations over theirs. With fewer programs than multiprocessors the last three rates shrink in "
        "proportion. How many blocks of a kernel a multiprocessor holds at once comes from `aot_sm_90.json`, which "
        "`python -m graphmoe_kernels.aot --target sm_90 --json` writes; the times do not depend on it. A limit is a "
        "floor: latencies, pointwise work and the end of a grid come on top. The L2 figure "
        "is the least certain: it assumes that no tile finds anything in a multiprocessor's own L1 cache.",
        "",
        "Sizes: D 4096, F 14336, n 8, k 2, r 16, G 409 (padded to 416), bf16, silu. Experts are drawn uniformly.",
        "",
    ]


def _kernels(result: dict[str, Any] | None, readings: Sequence[dict[str, Any]]) -> list[str]:
    header = (
        *("kernel", "tokens", "MB", "GFLOP", "L2 MB", "programs", "blocks/SM", "memory us", "L2 us", "matrix us"),
        *("predicted us", "limit", "measured us", "measured / predicted"),
    )
    rows = []
    for kernel, later, name, variant in p.KERNELS:
        for tokens in p.TOKENS:
            if kernel == "order_tokens" and tokens <= p.SKINNY_TOKENS:
                continue  # so few are not ordered
            sizes = p.sizes_at(tokens)
            needed = work(kernel, sizes, later)
            times, found = H200.times(needed), p.predict(kernel, sizes, later)
            measured = p.measured_kernel(result, kernel, tokens, later)
            rows.append(
                [
                    f"{name.removeprefix('gru ')}, {'later' if later else 'first'} round",
                    str(tokens),
                    f"{needed.bytes / 1e6:,.1f}",
                    f"{needed.operations / 1e9:,.2f}",
                    f"{needed.l2_bytes / 1e6:,.1f}",
                    str(needed.programs),
                    p.blocks_per_sm(readings, kernel, name, variant, tokens),
                    *(f"{1e6 * times[limit]:,.1f}" for limit in ("memory", "L2", "matrix")),
                    microseconds(found.seconds),
                    found.limit,
                    microseconds(measured),
                    "-" if measured is None else f"{measured / found.seconds:.2f}",
                ]
            )
    return ["## Kernels", "", *markdown_table(header, rows), ""]


def _layers(result: dict[str, Any] | None) -> list[str]:
    lines = ["## The whole layer", ""]
    rows = []
    for target in p.TARGETS:
        sizes = p.sizes_at(target.tokens, target.rounds)
        layer, dense = p.total(p.layer_parts(sizes)), p.total(p.dense_parts(sizes))
        measured = [p.measured_layer(result, target.tokens, target.rounds, name) for name in ("triton", "dense")]
        ratio = NOT_MEASURED if None in measured else f"{measured[0] / measured[1]:.2f}"  # type: ignore[operator]
        verdict = "within" if layer / dense <= target.at_most else "**beyond**"
        rows.append(
            [
                f"{target.what}, {_tokens(target.tokens)}, T={target.rounds}",
                microseconds(layer),
                microseconds(dense),
                f"{layer / dense:.2f}",
                f"<= {target.at_most}",
                verdict,
                ratio,
            ]
        )
    header = ("forward", "layer us", "dense MLP us", "ratio", "target", "prediction", "measured ratio")
    lines += [*markdown_table(header, rows), ""]
    for tokens in (8192, 1):
        sizes = p.sizes_at(tokens)
        parts = sorted(p.layer_parts(sizes), key=lambda part: -part.seconds)
        whole = p.total(parts)
        lines += [f"Where the time of T=3 goes at {_tokens(tokens)}:", ""]
        table = [
            [
                part.name,
                str(part.times),
                microseconds(part.one.seconds),
                microseconds(part.seconds),
                f"{part.seconds / whole:.1%}",
                part.one.limit,
            ]
            for part in parts
        ]
        lines += [*markdown_table(("part", "times", "one us", "all us", "share", "limit"), table), ""]
    return lines


def _forms() -> list[str]:
    lines = [
        "## Why tokens are ordered and only the experts of a tile are visited",
        "",
        "The low-rank products of one round: gate, up and down of every slot. Masked, a slot multiplies with all "
        "experts' matrices side by side (n*r wide) and zeros do the choosing; the cost grows with n. By tile, it "
        "multiplies with the matrices of the experts that its tile of tokens holds, one at a time; the cost grows with "
        "how many those are, which the order of tokens keeps low.",
        "",
    ]
    rows = []
    for experts in (8, 64):
        for tokens in (2048, 8192):
            sizes = p.sizes_at(tokens, experts=experts)
            for name, millions, moved in p.low_rank_forms(sizes):
                matrix = 2e6 * millions * tokens / H200.matrix
                needed = name == "needed"
                rows.append(
                    [
                        f"n={experts}, {tokens} tokens: {name}",
                        f"{millions:.2f}",
                        microseconds(matrix),
                        "-" if needed else f"{moved / 1e6:,.0f}",
                        "-" if needed else microseconds(moved / H200.l2_bandwidth),
                    ]
                )
    header = ("form", "million multiply-adds a token", "matrix us", "L2 MB", "L2 us")
    block = shipped_config("forward_kernel", 8192)["BLOCK_M"]
    return [*lines, *markdown_table(header, rows), "", f"Tiles of {block} tokens, the forward kernel's.", ""]


def _tiles() -> list[str]:
    sizes = p.sizes_at(8192)
    others = p.total(part for part in p.layer_parts(sizes) if part.name != "experts, later rounds")
    dense = p.total(p.dense_parts(sizes))
    rows = []
    for tokens, columns, found in p.tile_forms(sizes):
        times = H200.times(found)
        layer = others + 2 * (max(times.values()) + H200.launch)
        rows.append(
            [
                f"{tokens} tokens x {columns} columns",
                f"{found.l2_bytes / 1e6:,.0f}",
                microseconds(times["L2"]),
                microseconds(times["matrix"]),
                f"{layer / dense:.2f}",
            ]
        )
    seconds, found = p.product_apart(sizes)
    rows.append(
        [
            "H M^T apart, by cuBLAS; the kernel adds it",
            f"{found.l2_bytes / 1e6:,.0f}",
            microseconds(H200.times(found)["L2"]),
            microseconds(H200.times(found)["matrix"]),
            f"{(others + 2 * seconds) / dense:.2f}",
        ]
    )
    return [
        "## What the tile of the experts' forward costs",
        "",
        "In a later round every tile of tokens reads the fold M (2 F G) from the L2 cache, and every tile of columns "
        "reads the tokens' states (N G): larger tiles read less. The last row is another form: "
        "H M^T is a product of its own, written to memory, and the kernel reads it beside P_1 (its columns are those "
        "of the kernel alone, its ratio that of both). Prefill of 8192 tokens, T=3; whether a tile fits into "
        "registers and shared memory is another matter.",
        "",
        *markdown_table(("tile", "L2 MB", "L2 us", "matrix us", "layer over dense MLP"), rows),
        "",
    ]

"""The cost model as text: what ``python -m graphmoe_kernels.cost`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from graphmoe_kernels.cost.counter import Reading
from graphmoe_kernels.cost.model import fold_build, fold_bytes, further_round, layer_terms, multiply_adds, traffic
from graphmoe_kernels.cost.sizes import Sizes
from graphmoe_kernels.cost.terms import COUNTS, FORMS
from graphmoe_kernels.rethinking.policy import fold_break_even
from graphmoe_kernels.rethinking.weights import padded


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align columns, each as wide as its widest cell; the first to the left, numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  "
        + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _mega(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def report(sizes: Sizes) -> str:
    """Write all of the cost model but the readings of the counter."""
    parts = [_heading(sizes), _arithmetic(sizes), _totals(sizes), _traffic(sizes)]
    parts.append(_fold(sizes) if sizes.rounds > 1 else _experts(sizes))
    return "\n\n".join(parts)


def _heading(s: Sizes) -> str:
    kind = {"layer": "", "linear": " mixed in every linear", "none": ""}[s.routers] + (", DoRA" if s.dora else "")
    return (
        f"D={s.hidden} F={s.intermediate} experts={s.experts}{kind} top-k={s.top_k} rank={s.rank} GRU={s.gru_width} "
        f"(padded {padded(s.gru_width)}) rounds={s.rounds} tokens={s.tokens} {s.dtype}\n"
        "needed: chosen experts only; executed: what the PyTorch path multiplies, zeros included"
    )


def _arithmetic(s: Sizes) -> str:
    rows = []
    for form in FORMS:
        row = [form]
        for count in COUNTS:
            further = (multiply_adds(form, s, count), further_round(form, s, count))
            row.append(_mega(multiply_adds(form, replace(s, rounds=1), count)))
            row += ["-", "-"] if form == "dense" else map(_mega, further)
        rows.append(row)
    header = ["form", "T=1", f"T={s.rounds}", "further round"]
    return "Million multiply-adds per token (needed, then executed)\n" + table(header + header[1:], rows)


def _totals(s: Sizes) -> str:
    rows = []
    for form in FORMS:
        totals = [f"{2 * s.tokens * multiply_adds(form, s, count) / 1e9:,.1f}" for count in COUNTS]
        rows.append([form, *totals, f"{multiply_adds(form, s) / multiply_adds('literal', s):.2f}"])
    title = f"GFLOP of {s.tokens} tokens, T={s.rounds} (dense: the frozen MLP once)"
    return title + "\n" + table(["form", *COUNTS, "needed, over literal"], rows)


def _traffic(s: Sizes) -> str:
    rows = []
    for form in FORMS:
        decode, prefill = traffic(form, replace(s, tokens=1)), traffic(form, s)
        rows.append([form, *map(_mega, (*decode, *prefill))])
    header = ["form", "1 token, read", "written", f"{s.tokens} tokens, read", "written"]
    return f"MB that an ideal execution moves, T={s.rounds} (needed; weights once per round)\n" + table(header, rows)


def _fold(s: Sizes) -> str:
    build = [2 * sum(fold_build(s, count).values()) / 1e9 for count in COUNTS]
    needed, executed = (fold_bytes(s, count) for count in COUNTS)
    large = [name for name in ("M", "Q") if name in needed]
    own, padded_own = (_mega(sum(kept[name] for name in large)) for kept in (needed, executed))
    tokens = fold_break_even(s.hidden, s.intermediate, padded(s.gru_width), s.rounds, s.dora)
    return (
        "The fold\n"
        f"  building it: {build[0]:,.1f} GFLOP ({build[1]:,.1f} executed)\n"
        f"  pays in a training step from {tokens:,.0f} tokens on; in inference it is kept\n"
        f"  {' and '.join(large)}: {own} MB ({padded_own} padded); "
        f"everything that is kept: {_mega(sum(executed.values()))} MB"
    )


def _experts(s: Sizes) -> str:
    kept = fold_bytes(s, "executed")["experts"]
    return f"Kept in inference: the experts in the compute dtype, {_mega(kept)} MB"


def terms(sizes: Sizes) -> str:
    """Write one table per form: every term's multiply-adds per token and bytes, over all rounds."""
    parts = []
    for form in FORMS:
        rows = []
        for needed, executed in zip(*(layer_terms(form, sizes, count) for count in COUNTS), strict=True):
            moved = (needed.weights, sizes.tokens * needed.read, sizes.tokens * needed.written)
            rows.append([needed.name, *map(_mega, (needed.multiply_adds, executed.multiply_adds, *moved))])
        header = [form, "needed M", "executed M", "MB weights", "MB read", "MB written"]
        parts.append(table(header, rows))
    title = f"Terms over T={sizes.rounds} rounds: million multiply-adds per token, MB of {sizes.tokens} tokens"
    return title + "\n" + "\n\n".join(parts)


def readings(sizes: Sizes, found: list[Reading]) -> str:
    """Write the model's figures beside PyTorch's FLOP counter's."""
    rows = [[r.code, f"{r.modelled / 1e6:,.3f}", f"{r.counted / 1e6:,.3f}", f"{100 * r.deviation:.2f}%"] for r in found]
    title = (
        f"MFLOP executed by the code at D={sizes.hidden} F={sizes.intermediate} GRU={sizes.gru_width} "
        f"tokens={sizes.tokens} rounds={sizes.rounds}, by this model and by torch.utils.flop_counter"
    )
    return title + "\n" + table(["code", "model", "counter", "deviation"], rows)

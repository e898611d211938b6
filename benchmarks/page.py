"""Results as tables: on a page with targets, conditions and every row beside the limit, and shorter on a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.document import WITHOUT_ROUNDS, Ratio, Source, turn_ratio
from benchmarks.predictions import beside
from benchmarks.targets import HEADER, target_rows
from benchmarks.units import mega, plural, seconds
from graphmoe_kernels.cost.report import table
from graphmoe_model.presentation import markdown_table

if TYPE_CHECKING:
    from benchmarks.plots import Drawn

OWN_FIRST = "its own first row"
ROWS_NOTE = (
    "A row's time over that of another provider at the same T, or over the first row of its own provider: median "
    "[lowest, highest] over the turns in which both were timed. MB and GFLOP are what the computation must move and "
    "compute; the share of the limit is that time which the binding limit alone asks for, over the median. Peak MB is "
    "what a call holds beyond what is kept (in inference the fold is kept). Rows of the group host are time of the "
    "process, of one thread."
)
KERNELS_NOTE = (
    "Each kernel alone, many launches in a CUDA graph, replayed one behind the other; operands rotate so that together "
    'they exceed the L2 cache ("warm L2" where they do not by half).'
)
ERRORS = ("largest error", "plain computation's own")
# Whose time the others are compared with on a terminal: the first of these that a case has, else its first contender.
YARDSTICKS = ("dense", "torch, T=1", "triton, T=1")
BUSY = 0.25
# Below this share of the limit a layer's time is the calling of its operations.
IDLE = 0.1
OVERHEAD = (
    "Some layers reach less than a tenth of the limit: their time is that of calling many small operations, not of the "
    "arithmetic that folding saves, and they say nothing about large ones."
)
Table = tuple[Sequence[str], list[list[str]]]


def page(sources: Sequence[Source], plots: Mapping[Path, Sequence[Drawn]] | None = None) -> str:
    """The whole page; ``plots`` by the path of the result that they show."""
    known = [source for source in sources if source.content["conditions"]]
    lines = [
        "# Benchmark report",
        "",
        "## Targets",
        "",
        "Each figure is a ratio of times: the median over the turns in which both were timed, with the lowest and the "
        'highest in brackets, or "of medians" where they took no turns with each other. GPU targets are about one '
        "H200, bf16, at Llama-3-8B sizes. The median decides, also where the bound lies within the range.",
        "",
        *markdown_table(HEADER, target_rows(known)),
        "",
    ]
    for source in sources:
        lines += _result(source.content, (plots or {}).get(source.path, ()))
    return "\n".join(lines).rstrip() + "\n"


def markdown(content: dict[str, Any]) -> str:
    """The page of one result, without plots: what a run writes beside its JSON file."""
    return page([Source(Path(), content)])


def _result(content: dict[str, Any], plots: Sequence[Drawn]) -> Iterator[str]:
    if not content["conditions"]:
        yield from ("## Result", "", "The run ended before it could say where it ran.", "")
        yield from _section("Steps", "", _steps(content["steps"]))
        return
    yield from (f"## {content['conditions']['device']['name']}", "")
    yield from (f"- {line}" for line in conditions_lines(content))
    yield ""
    for plot in plots:
        yield from (f"![{plot.name}]({plot.path.name})" if plot.path else f"No plot of {plot.name}: {plot.reason}.", "")
    if content["rows"]:
        yield from ("### Rows", "", ROWS_NOTE, "")
        for case, rows in cases(content["rows"]).items():
            yield from (f"{case}:", "", *markdown_table(*case_table(rows)), "")
    yield from _section("Kernels", KERNELS_NOTE, kernel_table(content["kernels"]))
    yield from _section("Beside the predictions", "Of an H200, by arithmetic: PREDICTIONS.md.", beside(content))
    yield from _section("Where the time goes", "", profile_table(content["profiles"]))
    checks = content["checks"]
    passed = sum(check["passed"] for check in checks)
    yield from _section("Checks", f"{passed} of {len(checks)} passed; what failed was not timed.", _checks(checks))
    yield from _section("Not timed", "", _not_timed(content))
    yield from _section("Steps", f"{plural(len(content['steps']), 'step')}.", _steps(content["steps"]))


def _section(title: str, note: str, found: Table) -> list[str]:
    """A heading with its table, or nothing where there are no lines and nothing to say."""
    if not found[1]:
        return [f"### {title}", "", note, ""] if title in ("Checks", "Steps") and note else []
    return [f"### {title}", "", *([note, ""] if note else []), *markdown_table(*found), ""]


def conditions_lines(content: dict[str, Any]) -> list[str]:
    """Where, with what, when, and the limits of the device."""
    c, limits = content["conditions"], content["limits"]

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    lines = [
        f"Device: {listed(c['device'])}",
        f"Host: {listed(c.get('host', {})) or '-'}",
        f"Versions: {listed(c['versions'])}",
        f"Commit: {c['commit']}",
        f"Date: {c['date']}",
        "Limits: not measured",
    ]
    if "copy bytes a second" in limits and "matrix operations a second" in limits:
        lines[-1] = (
            f"Limits, measured in this run: copy of device memory {limits['copy bytes a second'] / 1e9:,.1f} GB/s "
            f"(read and written), {limits.get('matrix dtype', '')} matrix product "
            f"{limits['matrix operations a second'] / 1e9:,.0f} GFLOP/s"
        )
    return lines if c["device"]["kind"] == "cuda" else [*lines, "Not a GPU: no figure below says anything about one."]


def cases(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by their case."""
    found = defaultdict(list)
    for row in rows:
        found[row["case"]].append(row)
    return found


def case_table(rows: Sequence[dict[str, Any]], yardstick: str | None = None) -> Table:
    """The rows of a case: over every provider of the case and their own first row, or over ``yardstick`` alone."""
    if yardstick is None:
        providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "triton"]
        over = {name: [_ratio(row, rows, name) for row in rows] for name in (*providers, OWN_FIRST)}
    else:
        first = next(row for row in rows if row["label"] == yardstick)
        over = {yardstick: [None if row is first else turn_ratio(row, first) for row in rows]}
    columns: dict[str, list[str]] = {
        "": [row["label"] + (", in a graph" if row["graph"] else "") for row in rows],
        "median": [seconds(row["seconds"]["median"]) for row in rows],
        "quartiles": [" to ".join(map(seconds, row["seconds"]["quartiles"])) for row in rows],
        "turns": [str(row["seconds"].get("turns", "-")) for row in rows],
        **{f"over {name}": [str(ratio or "-") for ratio in cells] for name, cells in over.items()},
        "MB": [mega((row.get("work") or {}).get("bytes")) for row in rows],
        "GFLOP": [_giga((row.get("work") or {}).get("operations")) for row in rows],
        "share of limit": [_share(row) for row in rows],
        "peak MB": [mega(row.get("peak bytes")) for row in rows],
        "tokens a second": [f"{rate:,.1f}" if (rate := row.get("tokens a second")) else "-" for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


def _ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]], over: str) -> Ratio | None:
    """Of a row over that of a provider at the same sizes (T apart, where it has no rounds), or over its own first."""
    if over == OWN_FIRST:
        others = [other for other in rows if other["provider"] == row["provider"]][:1]
    else:
        others = [other for other in rows if other["provider"] == over and _alike(row["sizes"], other)]
    return next((ratio for other in others if other is not row and (ratio := turn_ratio(row, other))), None)


def _alike(sizes: dict[str, Any], other: dict[str, Any]) -> bool:
    rounds = sizes["rounds"] if other["provider"] in WITHOUT_ROUNDS else other["sizes"]["rounds"]
    return sizes == {**other["sizes"], "rounds": rounds}


def _giga(operations: float | None) -> str:
    return "-" if operations is None else f"{operations / 1e9:,.3f}"


def _share(row: dict[str, Any]) -> str:
    limits, share = row.get("limit"), row.get("share")
    if share is None:
        return "-"
    return f"{share:.0%}" + (f" ({max(limits, key=limits.get)})" if limits else "")


def kernel_table(kernels: Sequence[dict[str, Any]]) -> Table:
    """Kernels alone, beside what they must move and compute."""
    rows = []
    for row in kernels:
        limits, needed, time = row.get("limits"), row.get("work") or {}, row["seconds"]
        name = row["kernel"] + (f", {row['backend']}" if "backend" in row else "")
        if "config" in row:
            chosen = "chosen" if row.get("chosen") else f"refused: {row['refused']}" if "refused" in row else "slower"
            name += f" {chosen}: " + " ".join(f"{field}={value}" for field, value in row["config"].items())
        order = {True: ", in order", False: ", not in order", None: ""}[row.get("ordered")]
        what = f"{row['operator']}: {name}, {row['round']} round, n={row['experts']}, {row['tokens']} tokens{order}"
        share = f"{max(limits.values()) / time['median']:.0%} ({max(limits, key=limits.get)})" if limits else "-"
        quartiles = " to ".join(map(seconds, time.get("quartiles", ()))) or "-"
        cells = [what, seconds(time["median"]), quartiles, str(time.get("turns", "-"))]
        cells += [mega(needed.get("bytes")), _giga(needed.get("operations")), share]
        rows.append([*cells, "" if row.get("cold", True) else "warm L2"])
    return ("kernel", "median", "quartiles", "turns", "MB", "GFLOP", "share of limit", ""), rows


def profile_table(profiles: Sequence[dict[str, Any]]) -> Table:
    """Shares of a forward by part."""
    parts = list(dict.fromkeys(part for profile in profiles for part in profile["seconds"]))
    rows = []
    for profile in profiles:
        times = profile["seconds"]
        whole = sum(times.values())
        what = f"{profile['model']}, {profile['phase']}, {plural(profile['tokens'], 'token')}: {profile['adapter']}"
        shares = [f"{times[part] / whole:.1%}" if part in times and whole else "-" for part in parts]
        rows.append([what, seconds(whole), *shares])
    return ("profile", "time", *parts), rows


def _checks(checks: Sequence[dict[str, Any]]) -> Table:
    """What failed, then what passed, each with its error and the plain computation's, which is the budget."""
    rows = []
    for check in sorted(checks, key=lambda check: check["passed"]):
        named = [_contender(check), *(str(check.get(key, "-")) for key in ("case", "tokens", "dtype"))]
        errors = [f"{check[key]:.1e}" if key in check else "-" for key in ERRORS]
        rows.append([*named, *errors, "passed" if check["passed"] else f"failed: {check['fault']}"])
    return ("check of", "case", "tokens", "dtype", *ERRORS, ""), rows


def _contender(check: dict[str, Any]) -> str:
    """Whom a check is of: its label in its case, or what was checked where no one is timed."""
    return next((check[key] for key in ("label", "provider", "what") if check.get(key)), "-")


def _not_timed(content: dict[str, Any]) -> Table:
    """Contenders that failed their check, and those that passed it and yet are not among the rows of their case."""
    known = {row["case"] for row in content["rows"]}
    timed = {(row["case"], row[key]) for row in content["rows"] for key in ("label", "provider")}
    reasons: dict[tuple[str, str], str] = {}
    for check in content["checks"]:
        name = (check.get("case", ""), _contender(check))
        if name[0] and name not in timed and not check["passed"]:
            reasons[name] = f"failed: {check['fault']}"
        elif name[0] in known and name not in timed:
            reasons.setdefault(name, "passed its check; why it was not timed stands with the steps")
    return ("case", "contender", "why"), [[*name, reason] for name, reason in reasons.items()]


def _steps(steps: dict[str, dict[str, Any]]) -> Table:
    left = [[name, step["state"], step.get("note", "")] for name, step in steps.items() if step["state"] != "done"]
    return ("not done", "state", "why"), left


def summary(content: dict[str, Any]) -> str:
    """What a run ends with on a terminal: conditions, a table for each case, and what was not timed."""
    lines = [*conditions_lines(content), ROWS_NOTE, ""]
    alone = []  # with nobody to compare with, a table of its own would be a heading and a line
    for case, rows in cases(content["rows"]).items():
        if len(rows) == 1:
            alone.append(rows[0] | {"label": f"{case}: {rows[0]['label']}"})
            continue
        labels = [row["label"] for row in rows]
        header, cells = case_table(rows, next((name for name in YARDSTICKS if name in labels), labels[0]))
        lines += [table((case, *header[1:]), cells), ""]
    lines += [table(*case_table(alone, alone[0]["label"])), ""] if alone else []
    for found in (kernel_table(content["kernels"]), beside(content), profile_table(content["profiles"])):
        lines += [table(*found), ""] if found[1] else []
    shares = [row["share"] for row in content["rows"] if row["group"] == "layer" and row.get("share") is not None]
    lines += [OVERHEAD, ""] if any(share < IDLE for share in shares) else []
    lines += [f"not timed: {name} in {case}: {reason}" for case, name, reason in _not_timed(content)[1]]
    failed = [check for check in content["checks"] if not check["passed"]]
    lines.append(f"{len(content['checks']) - len(failed)} of {plural(len(content['checks']), 'check')} passed")
    lines += [f"{state}: {name}: {note}" for name, state, note in _steps(content["steps"])[1]]
    left_out = content["conditions"].get("left out", {})
    lines += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    host = content["conditions"].get("host", {})
    load, cores = host.get("load average"), host.get("cores")
    if load is not None and cores and load > BUSY * cores:
        lines.append(f"the machine was busy before the run (load average {load}): trust the ratios more than the times")
    return "\n".join(lines)

"""Results as a Markdown page: targets, conditions, every row beside the limit, what failed and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.document import WITHOUT_ROUNDS, Source, turn_ratio
from benchmarks.tables import markdown_table, mega, plural, seconds
from benchmarks.targets import HEADER, target_rows

if TYPE_CHECKING:
    from benchmarks.plots import Drawn


OWN_FIRST = "its own first row"
ROWS_NOTE = (
    "A row's time over that of another provider at the same T, or over the first row of its own provider: median "
    "[lowest, highest] over the turns in which both were timed. MB and GFLOP are what the computation must move and "
    "compute; the share of the limit is that time which the binding limit alone asks for, over the median."
)
ERRORS = ("largest error", "plain computation's own")


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


def _result(content: dict[str, Any], plots: Sequence[Drawn]) -> list[str]:
    if not content["conditions"]:
        return ["## Result", "", "The run ended before it could say where it ran.", "", *_steps(content["steps"])]
    return [
        f"## {content['conditions']['device']['name']}",
        "",
        *_conditions(content),
        *_plots(plots),
        *_rows(content["rows"]),
        *_kernels(content["kernels"]),
        *_profiles(content["profiles"]),
        *_checks(content["checks"]),
        *_not_timed(content),
        *_steps(content["steps"]),
    ]


def _conditions(content: dict[str, Any]) -> list[str]:
    c, limits = content["conditions"], content["limits"]

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    lines = [
        f"- Device: {listed(c['device'])}",
        f"- Host: {listed(c.get('host', {})) or '-'}",
        f"- Versions: {listed(c['versions'])}",
        f"- Commit: {c['commit']}",
        f"- Date: {c['date']}",
    ]
    if "copy bytes a second" in limits and "matrix operations a second" in limits:
        lines.append(
            f"- Limits, measured in this run: copy of device memory {limits['copy bytes a second'] / 1e9:,.1f} GB/s "
            f"(read and written), {limits.get('matrix dtype', '')} matrix product "
            f"{limits['matrix operations a second'] / 1e9:,.0f} GFLOP/s"
        )
    else:
        lines.append("- Limits: not measured")
    if c["device"]["kind"] != "cuda":
        lines.append("- Not a GPU: no figure below says anything about one.")
    return [*lines, ""]


def _plots(plots: Sequence[Drawn]) -> list[str]:
    if not plots:
        return []
    lines = ["### Plots", ""]
    for plot in plots:
        shown = f"![{plot.name}]({plot.path.name})" if plot.path else f"No plot of {plot.name}: {plot.reason}."
        lines += [shown, ""]
    return lines


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table for each case."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["case"], []).append(row)
    lines = []
    if rows:
        lines += ["### Rows", "", ROWS_NOTE, ""]
    for group, cases in groups.items():
        lines += [f"#### {group}", ""]
        for case, of_case in cases.items():
            lines += [f"{case}:", "", *_case(of_case), ""]
    return lines


def _case(rows: Sequence[dict[str, Any]]) -> list[str]:
    compared = {over: [_ratio(row, rows, over) for row in rows] for over in _baselines(rows)}
    compared = {over: cells for over, cells in compared.items() if set(cells) != {"-"}}
    header = ["", "median", "quartiles", "turns", *(f"over {over}" for over in compared)]
    header += ["MB", "GFLOP", "share of limit", "peak MB"]
    speeds = [row.get("tokens a second") for row in rows]
    header += ["tokens a second"] if any(speeds) else []
    table = []
    for index, row in enumerate(rows):
        needed = row.get("work") or {}
        table.append(
            [
                row["label"],
                *_times(row["seconds"]),
                *(cells[index] for cells in compared.values()),
                mega(needed.get("bytes")),
                _giga(needed.get("operations")),
                _share(row),
                mega(row.get("peak bytes")),
                *([f"{speeds[index]:,.1f}" if speeds[index] else "-"] if any(speeds) else []),
            ]
        )
    return markdown_table(header, table)


def _times(found: dict[str, Any]) -> list[str]:
    low, high = found["quartiles"]
    return [seconds(found["median"]), f"{seconds(low)} to {seconds(high)}", str(found.get("turns", "-"))]


def _baselines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the columns compare with: every provider but the kernels, whose rows have those ratios, and `OWN_FIRST`."""
    return [*(name for name in dict.fromkeys(row["provider"] for row in rows) if name != "triton"), OWN_FIRST]


def _ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]], over: str) -> str:
    """Of a row over that of a provider at the same sizes (T apart, where it has no rounds), or over its own first."""
    if over == OWN_FIRST:
        others = [other for other in rows if other["provider"] == row["provider"]][:1]
    else:
        others = [other for other in rows if other["provider"] == over and _alike(row["sizes"], other)]
    found = next((ratio for other in others if other is not row and (ratio := turn_ratio(row, other))), None)
    return "-" if found is None else str(found)


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


def _kernels(kernels: Sequence[dict[str, Any]]) -> list[str]:
    if not kernels:
        return []
    table = []
    for row in kernels:
        name = row["kernel"] + (f", {row['backend']}" if "backend" in row else "")
        order = {True: ", in order", False: ", not in order", None: ""}[row.get("ordered")]
        limits, needed = row.get("limits"), row.get("work", {})
        table.append(
            [
                f"{row['operator']}: {name}, {row['round']} round, n={row['experts']}, {row['tokens']} tokens{order}",
                *_times(row["seconds"]),
                mega(needed.get("bytes")),
                _giga(needed.get("operations")),
                max(limits, key=limits.get) if limits else "-",
                f"{max(limits.values()) / row['seconds']['median']:.0%}" if limits else "-",
                "" if row.get("cold", True) else "warm L2",
            ]
        )
    header = ("kernel", "median", "quartiles", "turns", "MB", "GFLOP", "limit", "share of limit", "")
    note = (
        "Each kernel alone, many launches in a CUDA graph, operands rotating so that together they exceed the L2 cache "
        '("warm L2" where they do not by half).'
    )
    return ["### Kernels", "", note, "", *markdown_table(header, table), ""]


def _profiles(profiles: Sequence[dict[str, Any]]) -> list[str]:
    if not profiles:
        return []
    parts = list(dict.fromkeys(part for profile in profiles for part in profile["seconds"]))
    table = []
    for profile in profiles:
        times = profile["seconds"]
        whole = sum(times.values())
        shares = [f"{times[part] / whole:.1%}" if part in times and whole else "-" for part in parts]
        what = f"{profile['model']}, {profile['phase']}, {profile['tokens']} tokens: {profile['adapter']}"
        table.append([what, seconds(whole), *shares])
    return ["### Where the time goes", "", *markdown_table(("profile", "time", *parts), table), ""]


def _checks(checks: Sequence[dict[str, Any]]) -> list[str]:
    """What failed, then what passed, each with its error and the plain computation's, which is the budget."""
    failed = [check for check in checks if not check["passed"]]
    lines = ["### Checks", "", f"{len(checks) - len(failed)} of {len(checks)} passed; what failed was not timed.", ""]
    if not checks:
        return lines
    table = []
    for check in sorted(checks, key=lambda check: check["passed"]):
        named = [_contender(check), *(str(check.get(key, "-")) for key in ("case", "tokens", "dtype"))]
        errors = [f"{check[key]:.1e}" if key in check else "-" for key in ERRORS]
        table.append([*named, *errors, "passed" if check["passed"] else f"failed: {check['fault']}"])
    header = ("check of", "case", "tokens", "dtype", *ERRORS, "")
    return [*lines, *markdown_table(header, table), ""]


def _contender(check: dict[str, Any]) -> str:
    """Whom a check is of: its label in its case, or what was checked where no one is timed."""
    return next((check[key] for key in ("label", "provider", "what") if check.get(key)), "-")


def _not_timed(content: dict[str, Any]) -> list[str]:
    """Contenders that failed their check, and those that passed it and yet are not among the rows of their case."""
    cases = {row["case"] for row in content["rows"]}
    timed = {(row["case"], row[key]) for row in content["rows"] for key in ("label", "provider")}
    reasons: dict[tuple[str, str], str] = {}
    for check in content["checks"]:
        name = (check.get("case", ""), _contender(check))
        if not name[0] or name in timed:
            continue
        if not check["passed"]:
            reasons[name] = f"failed: {check['fault']}"
        elif name[0] in cases:
            reasons.setdefault(name, "passed its check; why it was not timed stands with the steps")
    table = [[case, contender, reason] for (case, contender), reason in reasons.items()]
    if not table:
        return []
    return ["### Not timed", "", *markdown_table(("case", "contender", "why"), table), ""]


def _steps(steps: dict[str, dict[str, Any]]) -> list[str]:
    left = [[name, step["state"], step.get("note", "")] for name, step in steps.items() if step["state"] != "done"]
    lines = ["### Steps", "", f"{len(steps) - len(left)} of {plural(len(steps), 'step')} done.", ""]
    return [*lines, *markdown_table(("not done", "state", "why"), left), ""] if left else lines

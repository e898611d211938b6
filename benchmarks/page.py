"""Results as tables: on a page with targets and plots, on a terminal, and between the marks of another page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.document import ResultError, Source, conditions_line, turn_ratio
from benchmarks.predictions import beside
from benchmarks.targets import HEADER, target_rows
from benchmarks.units import mega, plural, seconds
from graphmoe_kernels.cost.report import table
from graphmoe_model.presentation import markdown_table

if TYPE_CHECKING:
    from benchmarks.plots import Drawn

OWN_FIRST = "its own first row"
TARGETS_NOTE = (
    "Each figure is a ratio of times: the median over the turns in which both were timed, with the lowest and the "
    "highest in brackets. GPU targets are about one H200, bf16, at Llama-3-8B sizes. The median decides, also where "
    "the bound lies within the range."
)
ROWS_NOTE = (
    "A row's time over that of the case's yardstick and over the first row of its own provider: median [lowest, "
    "highest] over the turns in which both were timed. MB and GFLOP are what the computation must move and compute; "
    "the share of the limit is that time which the binding limit alone asks for, over the median. Peak MB is what a "
    "call holds beyond what is kept (in inference the fold is kept). Rows of the group host are time of the process, "
    "of one thread."
)
KERNELS_NOTE = (
    "Each kernel alone, many launches in a CUDA graph, replayed one behind the other; operands rotate so that together "
    'they exceed the L2 cache ("warm L2" where they do not by half).'
)
PREDICTIONS_NOTE = (
    "PREDICTIONS-2026-11-26.md; kernels are an H100's. A kernel's times, predicted and measured, are those of all its "
    "launches in one round."
)
# Whose time the others are compared with: the first of these that a case has, else its first contender.
YARDSTICKS = ("dense", "torch, T=1", "triton, T=1")
DETAILS = ("quartiles", "turns", "MB", "GFLOP")
ERRORS = ("largest error", "plain computation's own")
BUSY = 0.25
# Between these a page of the docs has a result's tables of one group.
MARKS = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
Table = tuple[Sequence[str], list[list[str]]]


class Section(NamedTuple):
    """A table with its heading."""

    title: str
    note: str
    table: Table

    def markdown(self, level: str) -> list[str]:
        """The lines of a page."""
        return [f"{level} {self.title}", "", *([self.note, ""] if self.note else []), *markdown_table(*self.table), ""]


def page(sources: Sequence[Source], plots: Mapping[Path, Sequence[Drawn]] | None = None) -> str:
    """The whole page; ``plots`` by the path of the result that they show."""
    known = [source for source in sources if source.content["conditions"]]
    lines = ["# Benchmark report", "", *Section("Targets", TARGETS_NOTE, (HEADER, target_rows(known))).markdown("##")]
    for path, content in sources:
        if content["conditions"]:
            lines += [f"## {content['conditions']['device']['name']}", ""]
            lines += [*(f"- {line}" for line in conditions_lines(content)), ""]
        else:
            lines += ["## Result", "", "The run ended before it could say where it ran.", ""]
        for plot in (plots or {}).get(path, ()):
            lines += [f"![{plot.name}]({plot.path.name})" if plot.path else f"No plot of {plot.name}: {plot.reason}."]
            lines.append("")
        lines += ["### Rows", "", ROWS_NOTE, ""] if content["rows"] else []
        for section in row_sections(content["rows"]):
            lines += section.markdown("####")
        for section in other_sections(content):
            lines += section.markdown("###")
        passed, steps = _passed(content), plural(len(content["steps"]), "step")
        lines += [f"{passed} passed; what failed was not timed. {steps}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def summary(content: dict[str, Any]) -> str:
    """What a run ends with on a terminal: conditions, every table, and what failed."""
    lines = [*conditions_lines(content), ROWS_NOTE, ""]
    for title, _, (header, rows) in [*row_sections(content["rows"]), *other_sections(content)]:
        shown = [row for row in rows if row[-1] != "passed"]
        lines += [table((title, *header[1:]), shown), ""] if shown else []
    lines.append(f"{_passed(content)} passed")
    left_out = content["conditions"].get("left out", {})
    lines += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    host = content["conditions"].get("host", {})
    load, cores = host.get("load average"), host.get("cores")
    if load is not None and cores and load > BUSY * cores:
        lines.append(f"the machine was busy before the run (load average {load}): trust the ratios more than the times")
    return "\n".join(lines)


def write_into(path: Path, content: dict[str, Any]) -> list[str]:
    """Put a result's tables between the marks of a page, for every group that the result has; the groups' names.

    Raises:
        ResultError: the page has no marks, or none of a group of the result.
    """
    written = []

    def tables(found: re.Match[str]) -> str:
        start, group, end = found.groups()
        rows = [row for row in content["rows"] if row["group"] == group]
        profiles = [each for each in content["profiles"] if group == ("host" if each["phase"] == "host" else "profile")]
        if not rows and not profiles:
            return found[0]
        written.append(group)
        lines = [f"{conditions_line(content)}:", ""]
        for section in [*row_sections(rows, brief=True), *profile_sections(profiles)]:
            lines += [f"{section.title}:", "", *markdown_table(*section.table), ""]
        return "\n".join([start, *lines, end])

    text = MARKS.sub(tables, path.read_text(encoding="utf-8"))
    if not written:
        groups = dict.fromkeys(row["group"] for row in content["rows"])
        wanted = ", ".join(f"<!-- results: {group} -->" for group in groups)
        raise ResultError(f"{path} has none of the marks {wanted} with <!-- /results --> after it: nothing to write")
    path.write_text(text, encoding="utf-8")
    return written


def conditions_lines(content: dict[str, Any]) -> list[str]:
    """Where, with what, when, what a reader has to know of the run, and the limits of the device."""
    c, limits = content["conditions"], content["limits"]

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items()) or "-"

    lines = [f"{name}: {listed(c.get(name.lower(), {}))}" for name in ("Device", "Host", "Versions")]
    lines += [f"Commit: {c['commit']}", f"Date: {c['date']}"]
    lines += [f"What: {c['what']}"] if "what" in c else []
    lines.append("Limits: not measured")
    if "copy bytes a second" in limits and "matrix operations a second" in limits:
        lines[-1] = (
            f"Limits, measured in this run: copy of device memory {limits['copy bytes a second'] / 1e9:,.1f} GB/s "
            f"(read and written), {limits.get('matrix dtype', '')} matrix product "
            f"{limits['matrix operations a second'] / 1e9:,.0f} GFLOP/s"
        )
    return lines if c["device"]["kind"] == "cuda" else [*lines, "Not a GPU: no figure below says anything about one."]


def row_sections(rows: Sequence[dict[str, Any]], brief: bool = False) -> list[Section]:
    """A table for each case; cases of one contender share one. ``brief``: without `DETAILS`, as narrow as docs are."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    alone = [of_case[0] | {"label": f"{case}: {of_case[0]['label']}"} for case, of_case in by_case.items()]
    alone = [row for row in alone if len(by_case[row["case"]]) == 1]
    together = {case: of_case for case, of_case in by_case.items() if len(of_case) > 1}
    together |= {"One contender alone": alone} if alone else {}
    return [Section(title, "", case_table(of_case, brief)) for title, of_case in together.items()]


def case_table(rows: Sequence[dict[str, Any]], brief: bool = False) -> Table:
    """The rows of a case, over its yardstick and over their own provider's first row."""
    labels = [row["label"] for row in rows]
    yardstick = rows[labels.index(next((name for name in YARDSTICKS if name in labels), labels[0]))]
    firsts = {row["provider"]: row for row in reversed(rows)}
    columns: dict[str, list[str]] = {
        "": [row["label"] + (", in a graph" if row["graph"] else "") for row in rows],
        "median": [seconds(row["seconds"]["median"]) for row in rows],
        "quartiles": [" to ".join(map(seconds, row["seconds"]["quartiles"])) for row in rows],
        "shortest": [seconds(row["seconds"].get("best")) for row in rows],
        "turns": [str(row["seconds"].get("turns", "-")) for row in rows],
        f"over {yardstick['label']}": [_over(row, yardstick) for row in rows],
        f"over {OWN_FIRST}": [_over(row, firsts[row["provider"]]) for row in rows],
        "MB": [mega((row.get("work") or {}).get("bytes")) for row in rows],
        "GFLOP": [_giga((row.get("work") or {}).get("operations")) for row in rows],
        "share of limit": [_share(row.get("limit"), row.get("share")) for row in rows],
        "peak MB": [mega(row.get("peak bytes")) for row in rows],
        "tokens per second": [f"{rate:,.1f}" if (rate := row.get("tokens a second")) else "-" for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if set(cells) != {"-"} and not (brief and name in DETAILS)}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


def _over(row: dict[str, Any], other: dict[str, Any]) -> str:
    return str((None if row is other else turn_ratio(row, other)) or "-")


def _giga(operations: float | None) -> str:
    return "-" if operations is None else f"{operations / 1e9:,.3f}"


def _share(limits: dict[str, float] | None, share: float | None) -> str:
    binding = f" ({max(limits, key=lambda name: limits[name])})" if limits else ""
    return "-" if share is None else f"{share:.0%}{binding}"


def other_sections(content: dict[str, Any]) -> Iterator[Section]:
    """What a result has beside its rows; a table without a line is left out."""
    found = [Section("Kernels", KERNELS_NOTE, kernel_table(content["kernels"]))]
    if content["conditions"]:
        found.append(Section("Beside the predictions", PREDICTIONS_NOTE, beside(content)))
    found += profile_sections(content["profiles"])
    found.append(Section("Checks", "", _checks(content["checks"])))
    steps = [(name, step) for name, step in content["steps"].items() if step["state"] != "done"]
    left = [[name, step["state"], step.get("note", "")] for name, step in steps]
    found.append(Section("Not done", "", (("case", "state", "why"), left)))
    return (section for section in found if section.table[1])


def kernel_table(kernels: Sequence[dict[str, Any]]) -> Table:
    """Kernels alone, beside what they must move and compute."""
    rows = []
    for row in kernels:
        limits, needed, time = row.get("limits"), row.get("work") or {}, row["seconds"]
        name = row["kernel"] + (f", {row['backend']}" if "backend" in row else "")
        if "config" in row:
            chosen = "chosen" if row.get("chosen") else f"refused: {row['refused']}" if "refused" in row else "slower"
            name += f" {chosen}: " + " ".join(f"{field}={value}" for field, value in row["config"].items())
        what = f"{row['operator']}: {name}, {row['round']} round, n={row['experts']}, {row['tokens']} tokens"
        cells = [what, seconds(time["median"]), " to ".join(map(seconds, time.get("quartiles", ()))) or "-"]
        cells += [str(time.get("turns", "-")), mega(needed.get("bytes")), _giga(needed.get("operations"))]
        share = _share(limits, max(limits.values()) / time["median"] if limits else None)
        rows.append([*cells, share, "" if row.get("cold", True) else "warm L2"])
    return ("kernel", "median", "quartiles", "turns", "MB", "GFLOP", "share of limit", ""), rows


def profile_sections(profiles: Sequence[dict[str, Any]]) -> list[Section]:
    """For each model and phase, the time of every part of a forward and its share."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for each in profiles:
        title = f"Where the time goes: {each['model']}, {each['phase']}"
        found.setdefault(title, {})[f"{each['adapter']}, {plural(each['tokens'], 'token')}"] = each["seconds"]
    sections = []
    for title, columns in found.items():
        wholes = [sum(times.values()) for times in columns.values()]
        rows = [["whole", *map(seconds, wholes)]]
        for part in dict.fromkeys(part for times in columns.values() for part in times):
            times = [
                (times.get(part, 0.0), whole or 1.0) for times, whole in zip(columns.values(), wholes, strict=True)
            ]
            rows.append([part, *(f"{seconds(time)}, {time / whole:.1%}" for time, whole in times)])
        sections.append(Section(title, "", (("part", *columns), rows)))
    return sections


def _checks(checks: Sequence[dict[str, Any]]) -> Table:
    """What failed, then what passed, each with its error and the plain computation's, which is the budget."""
    rows = []
    for check in sorted(checks, key=lambda check: check["passed"]):
        named = [_contender(check), *(str(check.get(key, "-")) for key in ("case", "tokens", "dtype"))]
        errors = [f"{check[key]:.1e}" if key in check else "-" for key in ERRORS]
        rows.append([*named, *errors, "passed" if check["passed"] else f"failed: {check['fault']}"])
    return ("check of", "case", "tokens", "dtype", *ERRORS, ""), rows


def _passed(content: dict[str, Any]) -> str:
    checks = content["checks"]
    return f"{sum(check['passed'] for check in checks)} of {plural(len(checks), 'check')}"


def _contender(check: dict[str, Any]) -> str:
    """Whom a check is of: its label in its case, or what was checked where no one is timed."""
    return next((check[key] for key in ("label", "provider", "what") if check.get(key)), "-")

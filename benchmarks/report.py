"""Result files as tables and plots: ``python -m benchmarks.report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import RESULTS, Ratio, ResultError, Source, conditions_line, every, load, turn_ratio
from benchmarks.page import page, write_into
from benchmarks.targets import HEADER, target_rows
from benchmarks.units import plural
from graphmoe_kernels.cost.report import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the targets and write the report, or what an option says; 2 with one line on stderr for wrong input."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Result files as tables and plots.")
    p.add_argument("files", nargs="*", type=Path, help="result files (default: all in the results, the newest first)")
    p.add_argument("--out", type=Path, help=f"folder of report.md and the plots (default: {RESULTS / 'report'})")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="do the ratios of two results agree")
    one.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the files' tables between the marks of this page, nothing else"
    )
    options = p.parse_args(arguments)
    if options.compare and (options.files or options.out):
        p.error("--compare takes its two files and writes nothing: leave out the other files and --out")
    if options.write and (options.out or not options.files):
        p.error("--write takes the result files whose tables it writes, and no --out")
    try:
        if options.compare:
            print(compare(*(Source(path, load(path)) for path in options.compare)))
            return 0
        sources = _sources(options.files)
        if options.write:
            for path, content in sources:
                print(f"{path}: {', '.join(write_into(options.write, content))} in {options.write}")
            return 0
        print(table(HEADER, target_rows(sources)), end="\n\n")
        print(*write(sources, options.out or RESULTS / "report"), sep="\n")
    except ResultError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"benchmarks.report: the plots need matplotlib (pip install -e '.[bench]'): {error}", file=sys.stderr)
        return 2
    return 0


def write(sources: Sequence[Source], folder: Path) -> list[str]:
    """Write report.md and the plots of every result; a line for each file written and each plot left out.

    Raises:
        ResultError: the folder cannot be written to, or two results have one file name, which names the plots.
        ImportError: matplotlib is not installed.
    """
    from benchmarks.plots import draw

    stems = [source.path.stem for source in sources]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise ResultError(f"two of the files are called {twice[0]}.json, which names their plots: rename one")
    path = folder / "report.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots = {source.path: draw(source.content, folder, source.path.stem) for source in sources}
        path.write_text(page(sources, plots), encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{folder} cannot be written to: {error.strerror}; name another folder by --out") from error
    lines: list[str] = []
    without: dict[str, list[str]] = {}
    for source in sources:
        rows, failed = source.content["rows"], sum(not check["passed"] for check in source.content["checks"])
        lines.append(f"{source.path}: {conditions_line(source.content)}")
        lines.append(f"  {plural(len(rows), 'row')}, {plural(failed, 'failed check')}")
        for plot in plots[source.path]:
            if plot.path:
                lines.append(f"  {plot.path}")
            else:
                without.setdefault(f"no plot of {plot.name}: {plot.reason}", []).append(source.path.name)
    lines += [f"{what} ({plural(len(names), 'file')}: {', '.join(names)})" for what, names in without.items()]
    return [*lines, f"written to {path}"]


def compare(first: Source, second: Source) -> str:
    """Every ratio that two results of one device have, side by side, and how many agree within their ranges.

    Raises:
        ResultError: the devices differ, no ratio is in both, or both are one file.
    """
    sources = (first, second)
    devices = [source.content["conditions"]["device"] for source in sources]
    named = [
        ", ".join(f"{key} {device[key]}" for key in ("kind", "name", "threads") if key in device) for device in devices
    ]
    if named[0] != named[1]:
        raise ResultError(
            f"these are results of different devices: {first.path} of {named[0]}; {second.path} of {named[1]}. "
            "Compare results of one device"
        )
    if first.path.resolve() == second.path.resolve():
        raise ResultError(f"{first.path} is named twice: name two results")
    mine, other = (_ratios(source.content["rows"]) for source in sources)
    rows = []
    for what in [what for what in mine if what in other]:
        a, b = mine[what], other[what]
        rows.append([what, str(a), str(b), f"{b.value / a.value - 1:+.1%}", "yes" if a.overlaps(b) else "NO"])
    if not rows:
        raise ResultError(f"{first.path} and {second.path} have no ratio in common: no case and labels are in both")
    lines = [
        f"{letter}: {path}, {conditions_line(content)}" for letter, (path, content) in zip("AB", sources, strict=True)
    ]
    header = ("time over time, median [lowest, highest] of the turns", "A", "B", "shift", "agree")
    agree = sum(row[-1] == "yes" for row in rows)
    alone = f"{len(mine) - len(rows)} of A and {len(other) - len(rows)} of B alone are not compared"
    lines += ["", table(header, rows), "", f"{agree} of {len(rows):,} ratios agree within their ranges; {alone}"]
    return "\n".join(lines)


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Ratio]:
    """Ratios turn by turn, by what they are of. One and its inverse are the same: the labels' order picks one."""
    by_name = {(row["case"], row["label"]): row for row in rows}
    found = {}
    for (case, label), row in by_name.items():
        for other in row["ratios"]:
            over, under = sorted((label, other), reverse=True)
            if (case, other) in by_name and (ratio := turn_ratio(by_name[case, over], by_name[case, under])):
                found[f"{case}: {over} over {under}"] = ratio
    return found


def _sources(files: Sequence[Path]) -> list[Source]:
    if files:
        return [Source(path, load(path)) for path in dict.fromkeys(files)]
    sources, passed_over = every(RESULTS)
    for line in passed_over:
        print(f"passed over: {line}", file=sys.stderr)
    if not sources:
        print(f"there is no result in {RESULTS}: `make bench` or `make gpu-report` writes one", file=sys.stderr)
    return sources


if __name__ == "__main__":
    sys.exit(main())

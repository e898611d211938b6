"""Result files as tables and plots: ``python -m benchmarks.report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.document import RESULTS, ResultError, Source, conditions_line, every, load
from benchmarks.page import compare, page, write_into
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
    lines = []
    for source in sources:
        rows, failed = source.content["rows"], sum(not check["passed"] for check in source.content["checks"])
        lines.append(f"{source.path}: {conditions_line(source.content)}")
        lines.append(f"  {plural(len(rows), 'row')}, {plural(failed, 'failed check')}")
        for plot in plots[source.path]:
            lines.append(f"  {plot.path}" if plot.path else f"  no plot of {plot.name}: {plot.reason}")
    return [*lines, f"written to {path}"]


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

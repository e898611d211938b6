"""``python -m experiments.study``: run what is missing of the study, say what would be run, or make its tables."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers

from experiments.study.parts import PARTS
from experiments.study.report import PAGE, section, write_into
from experiments.study.results import RESULTS, Results
from experiments.study.runner import dry_run, go_through

WORK = RESULTS.parent / "work"
UNITS = {"s": 1, "m": 60, "h": 3600}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 2 with one line on stderr for what a person has to change, 130 if interrupted."""
    p = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__.split(": ", 1)[1])
    p.add_argument("action", nargs="?", choices=("run", "report"), default="run", help="what to do (%(default)s)")
    p.add_argument("--part", choices=sorted(PARTS), action="append", help="a part of the study (default: all)")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="tasks and methods of the part")
    p.add_argument("--budget", type=seconds, metavar="TIME", help="begin no run that would not end in it: 2h, 30m")
    p.add_argument("--dry-run", action="store_true", help="say what would be run, and how long it takes; run nothing")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    p.add_argument("--work", type=Path, default=WORK, help="folder of what runs need until they end (%(default)s)")
    p.add_argument("--page", type=Path, default=PAGE, help="what report writes its tables into (%(default)s)")
    options = p.parse_args(arguments)
    parts = [PARTS[name] for name in options.part or PARTS]
    if options.only and len(parts) > 1:
        p.error("--only names tasks and methods of one part: add --part")
    if options.action == "report" and (options.only or options.budget or options.dry_run):
        p.error("report tells of all that there is: leave out --only, --budget and --dry-run")
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # of loading: a file is no place for bars
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # said on every machine without a GPU
    try:
        if options.action == "report":
            found = {part.name: section(Results(part, options.results / part.name)) for part in parts}
            write_into(options.page, found)
            say(f"{', '.join(found)} in {options.page}")
            return 0
        for part in parts:
            folder, work = options.results / part.name, options.work / part.name
            if options.dry_run:
                dry_run(part, folder, work, only=options.only, say=say)
            else:
                go_through(part, folder, work, budget=options.budget, only=options.only, say=say)
    except ValueError as error:
        print(f"experiments.study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.study: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def seconds(text: str) -> float:
    """Return the seconds of ``2h``, ``30m`` or ``90s``; ``ArgumentTypeError`` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"a time is a number above 0 with its unit, as 2h, 30m or 90s, got {text!r}")
    return float(match[1]) * UNITS[match[2]]


def say(line: str) -> None:
    """Print a line at once: the study runs in the background."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

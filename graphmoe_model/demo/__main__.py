"""The demo's command: its options, and whether it found what it should."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.text import Text

from graphmoe_model.demo.commands import on_a_real_model
from graphmoe_model.demo.scale import FOLDERS, FULL, MARK, QUICK

EXTRA = ("accelerate", "datasets", "lm_eval", "matplotlib", "trl")  # packages of graphmoe[demo]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options; wrong values end with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m graphmoe_model.demo",
        description="Builds a small Llama, fine-tunes GraphMoE adapters on a synthetic multiple-choice task, saves, "
        "reloads, profiles, compares all methods after equal steps, and writes a report. "
        "On the CPU, in a few minutes, without any download.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the report (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the task, the weights and the training (%(default)s)")
    parser.add_argument("--steps", type=int, help=f"fine-tuning steps ({FULL.steps})")
    parser.add_argument(
        "--no-comparison",
        action="store_true",
        help=f"leave out the {FULL.comparison_steps} steps of every method (half of the time)",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, learns nothing")
    found = parser.parse_args(arguments)
    if found.steps is not None and found.steps < 1:
        parser.error(f"--steps must be at least 1, got {found.steps}")
    if found.seed < 0:
        parser.error(f"--seed must not be negative, got {found.seed}")
    if found.out.exists() and not found.out.is_dir():
        parser.error(f"--out must be a folder, {found.out} is a file")
    for folder in (found.out / name for name in FOLDERS):
        if folder.exists() and not (folder / MARK).exists():
            parser.error(f"--out has a {folder} that this demo did not make and would empty; name another folder")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if it learnt and reloaded as it should, and every method trained."""
    options = parse_arguments(arguments)
    scale = QUICK if options.quick else FULL
    scale = scale._replace(steps=options.steps or scale.steps)
    if options.no_comparison:
        scale = scale._replace(comparison_steps=0)
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:  # said now, not after the training
        print(f"The demo needs {', '.join(missing)}: pip install 'graphmoe[demo]'", file=sys.stderr)
        return 1
    from graphmoe_model.demo.report import print_results, write_report
    from graphmoe_model.demo.results import failures
    from graphmoe_model.demo.stages import run

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading a model that takes no time
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # said on every machine without a GPU
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by the name Transformers had
    torch.set_num_threads(1)  # the model is tiny: a second thread gains nothing, and costs a lot on a busy machine

    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    results = run(scale, options.seed, options.out, console)
    print_results(results, console)
    report = write_report(results, options.out)
    console.print(f"\nThe whole story with plots: [bold]{report}[/bold]")

    found = failures(results, learnt=not options.quick)
    for failure in found:
        console.print(f"[red]{failure}[/red]")
    console.print(Text(on_a_real_model()), soft_wrap=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

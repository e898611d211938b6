"""What happens beside the steps: the last one is logged and evaluated, experts' load is counted, a line shows it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm
from transformers import TrainerCallback

from graphmoe_model.routing.expert_load import ExpertLoad, collect_routing

LOAD_FILE = "expert_load.jsonl"


class DivergedError(ValueError):
    """Training stopped because the loss is no number any more."""


class LastStep(TrainerCallback):
    """Logs the last step, and evaluates after it, whatever the intervals: it may be the best.

    A step whose loss is not finite is the last too: `DivergedError`.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for both at the end."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where the loss is no number any more: nothing after it would be of use."""
        loss = kwargs["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {state.global_step}, so training was stopped; name another folder and a "
                "smaller --learning-rate, or some --warmup"
            )


class ExpertLoadLog(TrainerCallback):
    """Counts which experts the tokens of logged steps go to, of all processes.

    Each logged step becomes a line of `LOAD_FILE` in the output folder: ``{"step": ..., "load": {router: [T][n]}}``,
    the share of each round that each expert got. In Trainer's logs, for each round: ``expert_load_max/round_1``, n
    times the largest share, a mean over the routers; 1 where the load is balanced, n where one expert has it all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / LOAD_FILE
        self._blocks = ExitStack()
        self._load: ExpertLoad | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what a run that was killed had written after the checkpoint that is gone on from."""
        if not state.is_world_process_zero:
            return
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count in the steps that are logged alone: what counting costs is paid there."""
        step = state.global_step + 1
        first = step == 1 and args.logging_first_step
        if first or step % args.logging_steps == 0 or step >= state.max_steps:
            self._load = self._blocks.enter_context(collect_routing(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._blocks.close()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the counted step's load, and its largest share by round into the logs."""
        load, logs = self._load, kwargs["logs"]
        if load is None or "loss" not in logs:
            return
        self._load = None
        _add_up(load)
        shares = load.load()
        if not shares:  # a method without routers
            return
        rounds = len(next(iter(shares.values())))
        for i in range(rounds):
            largest = [own.shape[1] * own[i].max().item() for own in shares.values()]
            logs[f"expert_load_max/round_{i + 1}"] = sum(largest) / len(largest)
        state.log_history[-1].update({name: logs[name] for name in logs if name.startswith("expert_load_max/")})
        if state.is_world_process_zero:
            line = {"step": state.global_step, "load": {name: own.tolist() for name, own in shares.items()}}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a line, or infinity if it was not written whole."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _add_up(load: ExpertLoad) -> None:
    """Sum the counts over all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for name in load.counts:
        both = torch.stack([load.counts[name].double(), load.weights[name]])  # [2, T, n]
        distributed.all_reduce(both)
        load.counts[name], load.weights[name] = both[0].to(torch.int64), both[1]


class ProgressLine(TrainerCallback):
    """One line on a terminal: steps, time left, loss, router loss; elsewhere a line for each log entry.

    Args:
        say: writes a line where there is no terminal.
        title: of the bar.
    """

    def __init__(self, say: Callable[[str], None], title: str = "train") -> None:
        self.say, self.title = say, title
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that a resumed run goes on from."""
        self.begun, self.first = time.monotonic(), state.global_step
        self.shown = state.is_world_process_zero
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", leave=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the losses."""
        logs = kwargs["logs"]
        names = {"loss": "loss", "aux_loss": "router loss", "eval_loss": "evaluation loss"}
        values = {title: f"{logs[name]:.4g}" for name, title in names.items() if name in logs}
        if not self.shown or not values:
            return
        if self.bar is not None:
            self.bar.set_postfix(values)
            return
        done = state.global_step - self.first
        left = (time.monotonic() - self.begun) / max(1, done) * (state.max_steps - state.global_step)
        texts = [f"{title} {value}" for title, value in values.items()]
        self.say(f"step {state.global_step}/{state.max_steps}: {', '.join(texts)}, {duration(left)} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Write a duration: ``9 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"

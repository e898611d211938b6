"""How arguments are taken, and what a wrong one ends in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from graphmoe_tables.methods import PRESETS
from graphmoe_tables.models import MODEL_SHAPES, is_path, known_model

_WITHOUT_GRAPH = [name for name in PRESETS if f"graphmoe-{name}" not in PRESETS and not name.startswith("graphmoe-")]
PRESET_NAMES = (
    f"{', '.join(name for name in PRESETS if not name.startswith('graphmoe-'))}, graphmoe-<name> of each but "
    f"{' and '.join(_WITHOUT_GRAPH)}"
)
MODEL_NAMES = f"{', '.join(MODEL_SHAPES)}, a folder (before any of these) or a name on the hub; its config.json is read"
NO_MODEL = f"name the base model by --model: {', '.join(MODEL_SHAPES)}, a folder or a name on the hub"


# Options as other trainers call them, by the name here: suggested where the spelling is nearer to others.
MEANT = {
    **dict.fromkeys(("--lr", "--learning_rate"), "--learning-rate"),
    **dict.fromkeys(("--rank", "--lora-r", "--lora-rank"), "--r"),
    **dict.fromkeys(("--num-epochs", "--num-train-epochs"), "--epochs"),
    **dict.fromkeys(("--gradient-accumulation-steps", "--grad-accum"), "--accumulation"),
    **dict.fromkeys(("--bs", "--per-device-train-batch-size"), "--batch"),
    **dict.fromkeys(("--train-data", "--dataset", "--train-file"), "--data"),
    **dict.fromkeys(("--validation-data", "--val-data", "--dev-data"), "--eval-data"),
    **dict.fromkeys(("--output-dir", "--out"), "--output"),
    **dict.fromkeys(("--max-seq-length", "--max-seq-len", "--cutoff-len"), "--max-length"),
}


def one_of(names: Iterable[str], hints: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what makes an option a choice of these names, for `typer.Option` (which takes choices from types only).

    ``hints`` say of other names that one might think of what to write.
    """
    known = list(names)

    def parse(given: str) -> str:
        if given not in known:
            hint = (hints or {}).get(given.lower())
            listed = ", ".join(map(repr, known))
            raise typer.BadParameter(f"{given!r} is not one of {listed}" + ("" if hint is None else f"; {hint}"))
        return given

    parser: Callable[[str], str] = parse
    return {"parser": parser, "metavar": f"[{'|'.join(known)}]"}


def folder(given: str | Path) -> Path:
    """Return the path of a folder.

    Raises:
        typer.BadParameter: it is empty, as an unset variable of the shell gives it: it would be the current folder.
    """
    text = str(given)
    if not text or "\0" in text:
        raise typer.BadParameter("it is empty; name a folder (. is the current one)" if not text else "it has a NUL")
    return Path(text)


def tell_of_the_hub(*, model: str | None = None, adapter: str | None = None) -> None:
    """Say on stderr what is not here and is asked for on the hub, whose answer may take half a minute.

    Raises:
        ValueError: an adapter or a model that is no folder, by a name that none on the hub has.
    """
    if adapter and not Path(adapter).exists():
        if is_path(adapter) or "/" not in adapter:
            raise ValueError(
                f"cannot load the adapter {adapter!r}: there is no such folder here, and on the hub an adapter is "
                "called owner/name"
            )
        typer.echo(f"There is no folder {adapter} here: asking the hub for that adapter.", err=True)
    if not model or model.endswith(".json") or is_path(model):  # refused, with what to name, where it is not here
        return
    if not Path(model).exists() and known_model(model) is None:
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is None:
            raise ValueError(
                f"cannot load the model {model!r}: there is no such folder here, and on the hub a model is called "
                "owner/name"
            )
        typer.echo(f"There is no folder {model} here: asking the hub for that model.", err=True)


def expert_counts(text: str) -> int | list[int] | str:
    """Return a number or a list of them; anything else is a pattern, or for the configuration to refuse."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        return text
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


class ListCommand(TyperCommand):
    """Takes ``--seq 64 256`` for ``--seq 64 --seq 256``; for commands without positional arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer's, with a list option's name repeated before each of its values."""
        own = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        current: str | None = None
        waiting: str | None = None  # a list option that no value has followed yet
        for arg in [*args, "--"]:
            if not arg.startswith("--"):
                _no_commas(ctx, current, arg)
                spread += [arg] if current is None else [current, arg]
                waiting = None
                continue
            if waiting is not None:
                raise typer.BadParameter("it needs at least one value", ctx=ctx, param_hint=f"'{waiting}'")
            name, _, value = arg.partition("=")
            if name not in own and MEANT.get(name) in own:
                raise typer.BadParameter(
                    f"no such option; did you mean {MEANT[name]}?", ctx=ctx, param_hint=f"'{name}'"
                )
            current = name if name in lists else None
            waiting = None if value else current
            _no_commas(ctx, current, value)
            spread += [arg] if value or current is None else []
        return super().parse_args(ctx, spread[:-1])


def _no_commas(ctx: Any, option: str | None, value: str) -> None:
    """Refuse several values of a list option in one word; what has blanks is a text, and its commas are its own."""
    if option is not None and "," in value and " " not in value.strip():
        apart = " ".join(part for part in value.split(",") if part)
        hint = f"{value!r} has commas; values are separated by spaces: {option} {apart}"
        raise typer.BadParameter(hint, ctx=ctx, param_hint=f"'{option}'")


def no_bars_in_files() -> None:
    """Leave out tqdm's bars where stderr is no terminal: a file is no place for them. tqdm reads it when imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def one_line_errors(command: str, said: bool = True) -> Iterator[None]:
    """End what the user can mend in one line and status 2; anything else is a fault here and keeps its traceback.

    Args:
        command: its name.
        said: whether the line is printed; of many processes that refuse the same the first alone says so.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        if said:
            typer.echo(f"graphmoe {command}: error: {error}", err=True)
        raise typer.Exit(2) from error

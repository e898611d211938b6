"""Times that were measured before, by `graphmoe profile` or `pytest benchmarks`, read back from their JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graphmoe_model.evaluation.document import read_document
from graphmoe_model.profiling.result import CATEGORIES

WHAT = "a profile.json of graphmoe profile, or a result of pytest benchmarks"
PHASES = ("prefill", "decode")
ROUNDS = "rounds"  # the group of benchmarks that times a layer with T = 1, 2, ...


class ModelTime(NamedTuple):
    """One forward of a model.

    Attributes:
        model, adapter: their names.
        phase: ``"prefill"`` of all tokens, or ``"decode"`` of one token, by a cache of ``tokens``.
        tokens: the sequence's length.
        shares: of `CATEGORIES`, adding up to 1.
        seconds: elapsed time of the forward, without the profiler; None where the file has none (benchmarks).
    """

    model: str
    adapter: str
    phase: str
    tokens: int
    shares: dict[str, float]
    seconds: float | None


class LayerTime(NamedTuple):
    """One layer with T rounds.

    Attributes:
        case: what was timed: model, mode, tokens, experts, dtype.
        provider: by what: ``"triton"``, ``"torch"``, ``"literal"``, ``"dense"``, ..., and whether in a CUDA graph, in
            which the host's time does not count.
        rounds: T; None for a provider without rounds.
        seconds: median.
    """

    case: str
    provider: str
    rounds: int | None
    seconds: float


class Timings(NamedTuple):
    """What a file holds.

    Attributes:
        file: its path.
        device: that was measured, as the file says it.
        conditions: all that it says about them.
        models, layers: the times.
    """

    file: str
    device: str
    conditions: dict[str, Any]
    models: list[ModelTime]
    layers: list[LayerTime]

    def by_model(self) -> dict[str, list[ModelTime]]:
        """Return the times of each model, in the file's order."""
        found: dict[str, list[ModelTime]] = {}
        for each in self.models:
            found.setdefault(each.model, []).append(each)
        return found

    def measured(self) -> str:
        """Say how it was measured, for under a picture."""
        of = self.conditions
        host, versions = of.get("host", of), of.get("versions", of)
        told = [
            self.device,
            *([str(of["dtype"])] if "dtype" in of else []),
            *([f"batch {of['batch']}"] if "batch" in of else []),
            *([f"{of['threads']} threads"] if "threads" in of else []),
            *([f"torch {versions['torch']}"] if "torch" in versions else []),
            *([f"load average {host['load average']} of {host['cores']} cores"] if "load average" in host else []),
        ]
        return ", ".join(told)

    def by_phase(self) -> dict[tuple[str, str], list[ModelTime]]:
        """Return the times of each model and phase, in the file's order."""
        found: dict[tuple[str, str], list[ModelTime]] = {}
        for each in self.models:
            found.setdefault((each.model, each.phase), []).append(each)
        return found


def read_timings(path: Path) -> Timings:
    """Read a file of `graphmoe profile` or of `pytest benchmarks`.

    Raises:
        ValueError: it cannot be read, is neither, or has two adapters of one name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file in it, {path / 'profile.json'}")
    document = read_document(path, WHAT)
    try:
        conditions = dict(document["conditions"])
        device = conditions["device"]
        found = Timings(
            file=str(path),
            device=device["name"] if isinstance(device, dict) else str(device),
            conditions=conditions,
            models=[_model_time(own) for own in document["profiles"] if own["phase"] in PHASES],
            layers=[_layer_time(own) for own in document.get("rows", ()) if own["group"] == ROUNDS],
        )
    except KeyError as error:
        raise ValueError(f"{path} is not {WHAT}: it has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not {WHAT}: {error}") from error
    places = [(each.model, each.adapter, each.phase, each.tokens) for each in found.models]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ValueError(f"{path} has two adapters called {twice[1]}, which cannot be told apart; profile them anew")
    return found


def with_times(found: Sequence[Timings]) -> list[Timings]:
    """Return the files with what has elapsed times; ``ValueError`` for one that has none."""
    kept = []
    for own in found:
        timed = own._replace(models=[each for each in own.models if each.seconds is not None])
        if not timed.models and not timed.layers:
            raise ValueError(
                f"{own.file} has no elapsed times of prefill or decode and no layers by rounds; make one by graphmoe "
                "profile, or by pytest benchmarks --groups rounds"
            )
        kept.append(timed)
    return kept


def with_shares(found: Sequence[Timings], tokens: int | None) -> list[Timings]:
    """Return the files with the shares of one length: the one asked for, else the longest of each model and phase.

    What has another length alone is not among them: `left_out` names it.

    Raises:
        ValueError: a file has no profile, or none of that length.
    """
    kept = []
    for own in found:
        lengths = sorted({each.tokens for each in own.models})
        if not lengths:
            raise ValueError(f"{own.file} has no profile of prefill or decode; make one by graphmoe profile")
        if tokens is not None and tokens not in lengths:
            raise ValueError(f"{own.file} has no profile of {tokens} tokens; it has {', '.join(map(str, lengths))}")
        wanted = {place: tokens or max(each.tokens for each in group) for place, group in own.by_phase().items()}
        kept.append(own._replace(models=[each for each in own.models if each.tokens == wanted[each.model, each.phase]]))
    return kept


def left_out(found: Sequence[Timings], shown: Sequence[Timings]) -> list[str]:
    """Name the adapters and phases of files that `with_shares` found no profile of, with the lengths that they have."""
    lines = []
    for own, kept in zip(found, shown, strict=True):
        there = {(each.model, each.adapter, each.phase) for each in kept.models}
        lengths: dict[tuple[str, str, str], list[int]] = {}
        for each in own.models:
            if (place := (each.model, each.adapter, each.phase)) not in there:
                lengths.setdefault(place, []).append(each.tokens)
        lines += [
            f"{own.file}: not shown is the {phase} of {model} with {adapter}, which is of "
            f"{', '.join(f'{length:,}' for length in sorted(own_lengths))} tokens"
            for (model, adapter, phase), own_lengths in lengths.items()
        ]
    return lines


def _model_time(entry: Mapping[str, Any]) -> ModelTime:
    seconds = {name: float(entry["seconds"][name]) for name in CATEGORIES}
    total = math.fsum(seconds.values())
    if not total > 0:
        raise ValueError(f"the profile of {entry['adapter']} has no time in it")
    return ModelTime(
        model=str(entry["model"]),
        adapter=str(entry["adapter"]),
        phase=str(entry["phase"]),
        tokens=int(entry["tokens"]),
        shares={name: spent / total for name, spent in seconds.items()},
        seconds=float(entry["wall_seconds"]) if "wall_seconds" in entry else None,
    )


def _layer_time(entry: Mapping[str, Any]) -> LayerTime:
    label, _, rounds = str(entry["label"]).partition(", T=")
    return LayerTime(
        case=str(entry["case"]).removeprefix(f"{ROUNDS}, ").removesuffix(", by rounds").replace(", by rounds,", ","),
        provider=label + (", in a CUDA graph" if entry["graph"] else ""),
        rounds=int(rounds) if rounds else None,
        seconds=float(entry["seconds"]["median"]),
    )

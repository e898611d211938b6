"""What ``graphmoe profile`` was asked for, and whether that can be done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from graphmoe_cli.pictures import drawn
from graphmoe_cli.results_folder import check_folder
from graphmoe_tables.methods import METHODS
from graphmoe_tables.models import MODEL_SHAPES, PHASES, check_layers, check_lengths, model_shape


class FreshAdapter(NamedTuple):
    """An adapter with random weights: a base method at its published sizes, with T rounds."""

    method: str
    rounds: int


@dataclass(frozen=True)
class ProfileOptions:
    """The command's options; `graphmoe_cli.profile` says what each means.

    Raises:
        ValueError: options that exclude each other, that need one another, or out of range.
    """

    model: str | None = None
    preset: str | None = None
    layers: int | None = None
    adapter: str | None = None
    method: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    seq: tuple[int, ...] = (64, 256, 1024)
    phase: tuple[str, ...] = PHASES
    batch: int = 1
    repetitions: int = 5
    dtype: str = "auto"
    device: str = "auto"
    backend: str | None = None
    fold: str | None = None
    threads: int | None = None
    out: Path = Path("profile_report")
    plot: bool | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.preset is None):
            given = "both were given" if self.model else "neither was given"
            raise ValueError(f"name the model by --model or by --preset ({', '.join(MODEL_SHAPES)}); {given}")
        if self.layers is not None and self.preset is None:
            raise ValueError("--layers sets the layers of a --preset; a --model has its own")
        check_layers(self.layers)
        positions = None if self.preset is None else model_shape(self.preset).max_position_embeddings
        check_lengths(self.seq, self.phase, positions)
        for name, value in (("batch", self.batch), ("repetitions", self.repetitions)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for value in self.rounds:
            if value < 0:
                raise ValueError(f"rounds must be 0 (no adapter) or more, got {value}")
        if set(self.method) == {"lora"} and max(self.rounds, default=1) > 1:
            raise ValueError(
                f"--method lora has no experts and so no rounds, got --rounds {max(self.rounds)}; name a method with "
                "experts beside it, or leave --rounds out"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        check_folder(self.out)
        drawn(self.plot)  # refused now, not after the measuring

    @property
    def drawn(self) -> bool:
        """Whether the shares are drawn: where it is not ruled out, and matplotlib is installed."""
        return drawn(self.plot)

    @property
    def variants(self) -> list[FreshAdapter | str | None]:
        """None for the plain model, fresh adapters (LoRA's once), and the saved adapter by its path."""
        fresh = self.rounds or self.method or self.adapter is None
        rounds = tuple(dict.fromkeys(self.rounds or (0, 1, 3))) if fresh else ()
        found: list[FreshAdapter | str | None] = [None] * (0 in rounds)
        for name in dict.fromkeys(self.method or ("mixlora",)):
            own = rounds if METHODS[name].routers else rounds and (1,)
            found += [FreshAdapter(name, count) for count in own if count > 0]
        return [*found, *([] if self.adapter is None else [self.adapter])]

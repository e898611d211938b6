"""Every adapter tensor of a module: its name and shape here, and its name where experts are kept one by one.

A shape is a tuple of sizes and of letters for sizes that the tensors themselves tell: D hidden size, F intermediate
size, n experts, r rank, G GRU width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from graphmoe_model.config import GraphMoEConfig

LINEARS = ("gate_proj", "up_proj", "down_proj")
CONTAINER = "lora_graphmoe"

Shape = tuple[int | str, ...]


class Entry(NamedTuple):
    """One tensor of a module.

    Attributes:
        name: below the module, here.
        shape: here.
        peer: below the module, there; with ``{e}`` where every expert has a tensor of its own. None: there is none.
        linear: the MLP's linear it belongs to, ``""`` for what belongs to the whole module.
    """

    name: str
    shape: Shape
    peer: str | None
    linear: str = ""

    @property
    def stacked(self) -> bool:
        """Tell whether the first dimension here counts tensors there."""
        return len(self.shape) == 3 or self.name.endswith(".magnitude")

    def peers(self, num_experts: int) -> list[str]:
        """List the names there: one for every expert where they are kept apart, else one."""
        if self.peer is None:
            return []
        return [self.peer.format(e=e) for e in range(num_experts)] if "{e}" in self.peer else [self.peer]


def mlp_entries(config: GraphMoEConfig) -> list[Entry]:
    """List the tensors of an adapted MLP."""
    method, entries = config.base_method, []
    expert = "" if method.routers is None else "experts.{e}."
    for linear in LINEARS:
        to, fro = ("D", "F") if linear == "down_proj" else ("F", "D")
        path = f"{CONTAINER}.experts.{linear}"
        entries += [
            Entry(f"{path}.A", ("n", "r", fro), f"{linear}.{expert}lora_A.weight", linear),
            Entry(f"{path}.B", ("n", to, "r"), f"{linear}.{expert}lora_B.weight", linear),
        ]
        if method.routers == "linear":
            entries.append(Entry(f"{path}.router.weight", ("n", fro), f"{linear}.moe_gate.weight", linear))
        if config.use_dora:
            peer = f"{linear}.lora_magnitude_vector" if method.routers is None else None
            entries.append(Entry(f"{path}.magnitude", ("n", to), peer, linear))
    if method.routers == "layer":
        entries.append(Entry(f"{CONTAINER}.router.weight", ("n", "D"), "moe_gate.weight"))
    if config.rounds > 1:
        gates = [(f"{gate}.weight", ("G", "G+D")) for gate in ("update_gate", "reset_gate", "candidate")]
        for name, shape in [*gates, ("candidate.bias", ("G",)), ("output_proj.weight", ("D", "G"))]:
            entries.append(Entry(f"{CONTAINER}.gru.{name}", shape, None))
    return entries


def linear_entries(config: GraphMoEConfig) -> list[Entry]:
    """List the tensors of an adapted attention projection; none if the method has nothing there."""
    attention = config.base_method.attention
    if attention is None:
        return []
    if attention == "experts":
        entries = [
            Entry(f"{CONTAINER}.A", ("n", "r", "in"), "experts.{e}.lora_A.weight"),
            Entry(f"{CONTAINER}.B", ("n", "out", "r"), "experts.{e}.lora_B.weight"),
            Entry(f"{CONTAINER}.router.weight", ("n", "in"), "moe_gate.weight"),
        ]
        return [*entries, Entry(f"{CONTAINER}.magnitude", ("n", "out"), None)] if config.use_dora else entries
    entries = [
        Entry("lora_A.weight", ("r", "in"), "lora_A.weight"),
        Entry("lora_B.weight", ("out", "r"), "lora_B.weight"),
    ]
    magnitude = Entry("lora_magnitude_vector.weight", ("out",), "lora_magnitude_vector")
    return [*entries, magnitude] if config.use_dora else entries


def resolved(shape: Shape, sizes: Mapping[str, int | str]) -> Shape:
    """Put sizes, or other letters, in place of a shape's letters."""
    return tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], what: str, problems: list[str]
) -> dict[str, int]:
    """Check that the tensors are just the expected ones; a size given by letter is what most tensors say.

    Args:
        tensors: by name.
        expected: shapes by name.
        what: names the checkpoint in the error.
        problems: found before; they go into the same error.

    Returns:
        The sizes behind the letters.

    Raises:
        ValueError: tensors missing, of another shape or without a place; all of them are named.
    """
    votes: dict[str, Counter[int]] = {}
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else ()
        if len(found) == len(shape):
            for letter, size in zip(shape, found, strict=True):
                if isinstance(letter, str):
                    votes.setdefault(letter, Counter())[size] += 1
    sizes = {letter: counts.most_common(1)[0][0] for letter, counts in votes.items()}
    problems = list(problems)
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name}: missing")
            continue
        wanted = [_size(size, sizes) for size in shape]
        if list(tensors[name].shape) != wanted:
            problems.append(f"{name}: {list(tensors[name].shape)}, expected {_text(wanted)}")
        elif not tensors[name].numel():
            problems.append(f"{name}: {list(tensors[name].shape)}, which holds nothing")
    problems += [f"{name}: has no place in such an adapter" for name in tensors if name not in expected]
    raise_problems(problems, what)
    return sizes


def raise_problems(problems: Sequence[str], what: str) -> None:
    """Raise ``ValueError`` with all the problems of a checkpoint, if there are any."""
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{what} is not whole, or its tensors do not fit its adapter_config.json:\n{lines}")


def _size(size: int | str, sizes: dict[str, int]) -> int | str:
    if isinstance(size, int):
        return size
    parts = size.split("+")  # "G+D" is their sum
    return sum(sizes[part] for part in parts) if all(part in sizes for part in parts) else size


def _text(wanted: list[int | str]) -> str:
    return f"[{', '.join(map(str, wanted))}]"

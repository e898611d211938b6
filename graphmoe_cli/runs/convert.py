"""What ``graphmoe convert`` does: read an adapter in the format it has, and write it in another."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_model.checkpoints import in_use, read_config
from graphmoe_model.config import GraphMoEPeftType
from graphmoe_model.conversion.adapter import Adapter, read_adapter, write_adapter
from graphmoe_model.conversion.exports import attention_lora, to_moe_peft, to_peft
from graphmoe_model.conversion.import_moe_peft import from_moe_peft
from graphmoe_model.conversion.peer_config import PEER_TYPES
from graphmoe_model.conversion.rounds import with_rounds
from graphmoe_model.module_names import ROOT
from graphmoe_tables.formats import check_format
from graphmoe_tables.printing import print_whole

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates"),
)
WRITERS = {"peft": to_peft, "moe-peft": to_moe_peft, "attention-lora": attention_lora}


def run(
    source: str | Path,
    target: str | Path,
    to: str = "graphmoe",
    rounds: int | None = None,
    overwrite: bool = False,
    *,
    console: Console,
) -> Adapter:
    """Convert the adapter in ``source``, whose format its adapter_config.json tells, and print what it is.

    Args:
        source: the adapter's folder: GraphMoE's, MoE-PEFT's or PEFT's LoRA.
        target: the folder to write.
        to: a name of `graphmoe_tables.formats.FORMATS`.
        rounds: T of the GraphMoE adapter to write, with fresh GRUs; None: the source's.
        overwrite: whether an adapter in ``target`` is replaced.
        console: where the summary goes.

    Returns:
        The adapter that was written, or whose part was.

    Raises:
        ValueError: the source cannot be read or converted, or an option is unknown or does not go with another.
        OSError: the source is not there, or the target is, or cannot be written to.
    """
    check_format(to, rounds)
    adapter = _read(source)
    other_format = to != "graphmoe" or read_config(source).get("peft_type") != GraphMoEPeftType.GRAPHMOE.value
    if other_format and Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target} is the source itself, which would be lost; name another target")
    if rounds is not None and rounds != adapter.config.rounds:
        adapter = with_rounds(adapter, rounds)
    notes = list(adapter.notes)
    if not other_format and rounds is None:
        notes.append("it was GraphMoE's already, and still is: --to peft or --to moe-peft writes another format")
    if in_use(Path(target)) and not overwrite:
        raise FileExistsError(f"{target} is not empty; name a new folder, or add --overwrite")
    if to == "graphmoe":
        write_adapter(adapter, target, overwrite)
    else:
        notes += WRITERS[to](adapter, target, overwrite)
    written = adapter
    if to == "attention-lora":
        of_attention = tuple(f"{ROOT}{module.path}." for module in adapter.modules if not module.is_mlp)
        kept = {name: tensor for name, tensor in adapter.tensors.items() if name.startswith(of_attention)}
        written = dataclasses.replace(adapter, tensors=kept)
    if carried := _carry_tokenizer(Path(source), Path(target)):
        notes.append(f"copied beside it: {', '.join(carried)}")
    _print(written, notes, Path(target), to, console)
    return adapter


def _carry_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what a tokenizer saved beside the adapter, by the names that Transformers' tokenizers give their files."""
    if source.resolve() == target.resolve():
        return []
    found = sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern)})
    for path in found:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def _read(source: str | Path) -> Adapter:
    peft_type = read_config(source).get("peft_type")
    if peft_type == GraphMoEPeftType.GRAPHMOE.value:
        return read_adapter(source)
    if peft_type in PEER_TYPES:
        return from_moe_peft(source)
    raise ValueError(
        f"{source} holds an adapter of peft_type {peft_type!r}; what can be converted is "
        f"{', '.join([GraphMoEPeftType.GRAPHMOE.value, *PEER_TYPES])}"
    )


def _print(adapter: Adapter, notes: list[str], target: Path, to: str, console: Console) -> None:
    config, modules, plain = adapter.config, adapter.modules, to in ("peft", "attention-lora")
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "method": f"{'DoRA' if config.use_dora else 'LoRA'}, PEFT's" if plain else config.title,
        "rounds": "" if plain else str(config.rounds),
        "rank, alpha": f"{config.r}, {config.lora_alpha}",
        "other ranks": ", ".join(f"{value} in {key}" for key, value in (config.rank_pattern or {}).items()),
        "other alphas": ", ".join(f"{value} in {key}" for key, value in (config.alpha_pattern or {}).items()),
        "experts": "" if plain else f"{config.num_experts}, of which {config.top_k} run per token",
        "layers": str(len({module.layer for module in modules})),
        "adapted per layer": ", ".join(dict.fromkeys(module.place for module in modules)),
        "tensors": f"{len(adapter.tensors):,}",
        "parameters": f"{sum(tensor.numel() for tensor in adapter.tensors.values()):,}",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))  # a pattern's key is no markup
    print_whole(table, console)
    for note in notes:
        console.print(f"Note: {note}", style="yellow", markup=False, highlight=False)
    console.print(f"Written as {to}: {target}", markup=False, highlight=False)

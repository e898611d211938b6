"""Adapter checkpoints are whole: checked when they are loaded, replaced as a whole when they are saved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from graphmoe_model.config import GraphMoEPeftType


def check_adapter_state(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that does not fit the adapter, before any of it is loaded.

    Args:
        model: holds the adapter.
        adapter_name: its name.
        state: the checkpoint's tensors by their names in the model.

    Raises:
        ValueError: tensors of other shapes than the adapter's, missing from the checkpoint, or without a
            place in the model; each is named.
    """
    own = model.state_dict()
    if not any(name.startswith("base_model.model.") for name in own):  # injected, without a PeftModel
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    adapter = _filter_state_dict_by_key_prefixes(own, _get_tuner_state_dict_key_prefixes(model, adapter_name))
    problems = [
        f"{name}: {list(state[name].shape)} in the checkpoint, {list(adapter[name].shape)} in the model"
        for name in adapter
        if name in state and state[name].shape != adapter[name].shape
    ]
    problems += [f"{name}: missing from the checkpoint" for name in adapter if name not in state]
    problems += [f"{name}: not in the model" for name in state if name not in own]
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(
            f"the checkpoint does not fit the adapter {adapter_name!r}: was it made for another model or "
            "configuration? (An adapter is loaded whole or not at all, also with ignore_mismatched_sizes.)\n"
            f"{lines}"
        )


def save_whole(save: Callable[..., None]) -> Callable[..., None]:
    """``PeftModel.save_pretrained`` that leaves no half-written GraphMoE adapter.

    Everything is first written to a temporary folder inside the target, then moved into place file by file.
    Whatever fails while writing leaves an adapter that was there as it was. Other methods' adapters are saved
    as ever.
    """

    @wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        writes = kwargs.get("is_main_process", args[3] if len(args) > 3 else True)
        if self.peft_type != GraphMoEPeftType.GRAPHMOE or not writes or os.path.isfile(save_directory):
            save(self, save_directory, *args, **kwargs)
            return
        folder = Path(save_directory)
        created = not folder.exists()
        modes = [(config, config.inference_mode) for config in self.peft_config.values()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
                if (folder / "README.md").exists():  # PEFT keeps what a model card says already
                    shutil.copy2(folder / "README.md", temporary)
                save(self, temporary, *args, **kwargs)
                move_into(Path(temporary), folder)
        except BaseException:
            for config, mode in modes:  # PEFT sets inference_mode for the file, and back only when all went well
                config.inference_mode = mode
            if created:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    return save_pretrained


def move_into(source: Path, target: Path) -> None:
    """Move every file below ``source`` to its place below ``target``, where it appears as a whole."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:  # on disk before the first old file goes
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)

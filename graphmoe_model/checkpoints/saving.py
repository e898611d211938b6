"""``PeftModel.save_pretrained`` that leaves no half-written GraphMoE adapter."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor

from graphmoe_model.checkpoints.digest import stamp
from graphmoe_model.checkpoints.folder import fill_folder
from graphmoe_model.checkpoints.whole import has_nothing_of, saving_whole
from graphmoe_model.config import GraphMoEPeftType


def save_whole(save: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``PeftModel.save_pretrained`` so that an adapter is replaced as a whole (`fill_folder`), with the digest of
    its configuration in both of its files, and only by a whole one. Other methods' adapters are saved as ever.

    Raises of the wrapped method, beside PEFT's own:
        NotWhole: a tensor is missing, or there in part, as it is spread over processes.
    """
    parameters = signature(save)

    @wraps(save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        given = parameters.bind(self, *args, **kwargs).arguments
        directory, options = given["save_directory"], given.get("kwargs", {})
        state: dict[str, Tensor] | None = options.get("state_dict")
        if self.peft_type != GraphMoEPeftType.GRAPHMOE or os.path.isfile(directory):
            save(self, *args, **kwargs)
            return
        whole = self.state_dict() if state is None else state  # FSDP1 gathers in it, so on every rank
        if not given.get("is_main_process", True):
            return
        if state and given.get("selected_adapters") is None:
            given["selected_adapters"] = _in_state(self, state)
        arguments = {name: value for name, value in given.items() if name != "kwargs"}
        folder = Path(directory)
        modes = [(config, config.inference_mode) for config in self.peft_config.values()]

        def write(temporary: Path) -> None:
            if (folder / "README.md").exists():  # PEFT keeps what a model card says already
                shutil.copy2(folder / "README.md", temporary)
            with saving_whole(given_state=state is not None):
                save(**{**arguments, "save_directory": temporary, **options, "state_dict": whole})
            for config in temporary.rglob(CONFIG_NAME):
                stamp(config.parent)

        try:
            fill_folder(folder, write)
        except BaseException:
            for config, mode in modes:  # PEFT sets inference_mode for the file, and back only when all went well
                config.inference_mode = mode
            raise

    return save_pretrained


def _in_state(model: PeftModel, state: dict[str, Tensor]) -> list[str] | None:
    """Choose the adapters to save from a given state dict: those that it has; None if these are all.

    Trainer gathers trained tensors alone under ZeRO-3, so a frozen adapter beside the trained one, such as the
    reference of a preference loss, is not in its state dicts.
    """
    absent = [name for name in model.peft_config if has_nothing_of(model, name, state)]
    if not absent or len(absent) == len(model.peft_config):
        return None
    warnings.warn(
        f"saved without the adapters {', '.join(map(repr, absent))}: they are frozen, and the state dict that was "
        "given has none of their tensors. To save them too, give one of the whole model (accelerator.get_state_dict)",
        stacklevel=3,
    )
    return [name for name in model.peft_config if name not in absent]

"""``PeftModel.save_pretrained`` that leaves no half-written GraphMoE adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from graphmoe_model.checkpoints.digest import stamp
from graphmoe_model.checkpoints.folder import fill_folder
from graphmoe_model.config import GraphMoEPeftType


def save_whole(save: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``PeftModel.save_pretrained`` so that an adapter is replaced as a whole (`fill_folder`), with the digest of
    its configuration in both of its files. Other methods' adapters are saved as ever."""

    @wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        writes = kwargs.get("is_main_process", args[3] if len(args) > 3 else True)
        if self.peft_type != GraphMoEPeftType.GRAPHMOE or not writes or os.path.isfile(save_directory):
            save(self, save_directory, *args, **kwargs)
            return
        folder = Path(save_directory)
        modes = [(config, config.inference_mode) for config in self.peft_config.values()]

        def write(temporary: Path) -> None:
            if (folder / "README.md").exists():  # PEFT keeps what a model card says already
                shutil.copy2(folder / "README.md", temporary)
            save(self, temporary, *args, **kwargs)
            for config in temporary.rglob(CONFIG_NAME):
                stamp(config.parent)

        try:
            fill_folder(folder, write)
        except BaseException:
            for config, mode in modes:  # PEFT sets inference_mode for the file, and back only when all went well
                config.inference_mode = mode
            raise

    return save_pretrained

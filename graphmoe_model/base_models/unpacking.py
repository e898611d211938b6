"""A model in a GGUF file as Transformers saves models: read in a moment, and by everything."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from graphmoe_inference.folder import CONFIG
from graphmoe_model.base_models.loading import ModelSource, load_base_model, load_tokenizer
from graphmoe_model.base_models.shapes import is_local_model


def unpack(folder: Path, gguf_file: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Write the model and the tokenizer of a GGUF file into its folder, as Transformers saves them.

    The weights are those that loading the file gives in this dtype, so results are the same; Transformers, Trainer and
    PEFT take the folder as they take any model, where a model from a GGUF file is one that they do not train or save.

    Args:
        folder: with the file in it.
        gguf_file: its name.
        dtype: of the weights.

    Returns:
        Whether it was done; False where the folder has a model already.

    Raises:
        ValueError: there is no such file, the package ``gguf`` is missing, or the folder cannot be written.
    """
    if is_local_model(str(folder)):
        return False
    source = ModelSource(str(folder), gguf_file, dtype=dtype)
    tokenizer, model = load_tokenizer(source), load_base_model(source)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            # config.json last: it is what makes the folder a model's.
            for path in sorted(Path(work).iterdir(), key=lambda path: path.name == CONFIG):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror or error}; name another folder") from error
    return True

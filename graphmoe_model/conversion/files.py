"""The two files of an adapter's folder: read with care, written as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from graphmoe_model.checkpoints import Weights, check_target, fill_folder, in_use, read_weights_file, weights_file


def read_weights(folder: str | Path) -> Weights:
    """Read the folder's tensors by name, on the CPU and in the dtype they were saved in, and their digest.

    A pickle is read without running any code in it.

    Raises:
        FileNotFoundError: there is no weight file.
        ValueError: there are two, or what `read_weights_file` refuses.
    """
    folder = Path(folder)
    file = weights_file(folder)
    if file.name != WEIGHTS_NAME and (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} holds both {SAFETENSORS_WEIGHTS_NAME} and {WEIGHTS_NAME}, and they may differ; move away the "
            "one that is out of date"
        )
    return read_weights_file(file)


def write_folder(folder: str | Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Have ``write`` fill a folder, whose files appear together and as a whole (`fill_folder`).

    With ``overwrite`` an adapter that is there is replaced, weights of the other file type included; other files stay.

    Raises:
        FileExistsError: the folder is a file or a broken link, or is not empty and ``overwrite`` is off.
        OSError: it cannot be written to.
    """
    folder = Path(folder)
    check_target(folder)
    if in_use(folder) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; name a new folder, or pass overwrite=True")
    try:
        fill_folder(folder, write)
    except SafetensorError as error:  # its writer says so of a full disk
        raise OSError(f"{folder} cannot be written: {error}") from error

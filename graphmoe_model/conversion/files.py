"""The two files of an adapter's folder: read with care, written as a whole."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graphmoe_model.checkpoints import move_into


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's adapter_config.json.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        ValueError: the file holds no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; name an adapter's folder on disk (one on the hub is fetched by "
            "huggingface_hub.snapshot_download)"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; name the folder in which an adapter was saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save or fetch the adapter again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object with the adapter's settings, got {type(config).__name__}")
    return config


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The folder's tensors by name, on the CPU and in the dtype they were saved in.

    A pickle is read without running any code in it.

    Raises:
        FileNotFoundError: there is no weight file.
        ValueError: there are two, or it is damaged, or it holds anything but tensors by name.
    """
    folder = Path(folder)
    files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} holds neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
    if len(files) > 1:
        raise ValueError(
            f"{folder} holds both {SAFETENSORS_WEIGHTS_NAME} and {WEIGHTS_NAME}, and they may differ; move away the "
            "one that is out of date"
        )
    weights = _load(files[0])
    if not isinstance(weights, dict):
        raise ValueError(f"{files[0]} must hold a dictionary of tensors by name, got {type(weights).__name__}")
    others = [f"{name!r} ({type(value).__name__})" for name, value in weights.items() if not _named(name, value)]
    if others:
        raise ValueError(f"{files[0]} must hold nothing but floating point tensors by name; also got {_list(others)}")
    return {name: tensor.detach() for name, tensor in weights.items()}


def write_folder(folder: str | Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Have ``write`` fill a temporary folder, then move its files to ``folder``, where each appears as a whole.

    With ``overwrite`` an adapter that is there is replaced, weights of the other file type included; other files stay.
    Whatever fails in ``write`` leaves the folder as it was.

    Raises:
        FileExistsError: the folder is a file, or is not empty and ``overwrite`` is off.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the adapter")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; name a new folder, or pass overwrite=True (--overwrite)")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            write(Path(temporary))
            written = {path.name for path in Path(temporary).iterdir()}
            move_into(Path(temporary), folder)
    except BaseException:
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for name in {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME} - written:
        (folder / name).unlink(missing_ok=True)


def _load(path: Path) -> Any:
    if path.name == SAFETENSORS_WEIGHTS_NAME:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); save or fetch the adapter again") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no plain file of tensors: reading it could run code, or it is damaged, so it was not read. "
            f"Get the adapter as {SAFETENSORS_WEIGHTS_NAME}, or, if you trust its author, load it yourself and save "
            "its tensors in that format"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where a cut file has ended
            raise
        raise ValueError(f"{path} is damaged ({error}); save or fetch the adapter again") from error


def _named(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()


def _list(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

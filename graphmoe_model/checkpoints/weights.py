"""The weight file of an adapter: looked at before it is read, and read without running code in it."""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphmoe_model.checkpoints.digest import METADATA, digest_of_archive
from graphmoe_model.messages import some

# What a pickle says takes up to 220 times its size in memory, and a second for every two megabytes. A tensor takes
# about 200 bytes of it, so this is an adapter of 20,000 tensors.
PICKLE_LIMIT = 4 * 2**20

# What torch.load raises for bytes that nobody saved, beside UnpicklingError.
_UNREADABLE: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError)
_UNREADABLE += (OSError, RuntimeError, TypeError, ValueError)


class Weights(NamedTuple):
    """A weight file's tensors by name, and the digest of the configuration it was saved with, if it has one."""

    tensors: dict[str, Tensor]
    digest: str | None


def weights_path(folder: Path) -> Path | None:
    """Find the weight file that every loader takes: the safetensors file, else the pickle."""
    paths = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    return next((path for path in paths if path.is_file()), None)


def weights_file(folder: Path) -> Path:
    """Find it, or say that it is missing: `FileNotFoundError`. PEFT would ask the hub for a model of that name."""
    found = weights_path(folder)
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}; name the folder in which an "
            "adapter was saved whole"
        )
    return found


def read_weights_file(path: Path) -> Weights:
    """Read a weight file on the CPU, in the dtypes it was saved in.

    Raises:
        ValueError: it is damaged, empty, or a pickle that is out of proportion or may hold code; or it holds anything
            but dense floating point tensors by name.
    """
    weights = _safetensors(path) if path.suffix == ".safetensors" else _archive(path)
    others = [f"{name!r} ({_kind(value)})" for name, value in weights.tensors.items() if not _usable(name, value)]
    if others:
        raise ValueError(f"{path} must hold nothing but floating point tensors by name; also got {some(others)}")
    return Weights({name: tensor.detach() for name, tensor in weights.tensors.items()}, weights.digest)


def inspect_weights(path: Path) -> str | None:
    """Look at a weight file before it is loaded, without reading its data, and return its digest.

    Raises:
        ValueError: as `read_weights_file`; but embeddings and other copies of the base model may have any dtype, if
            they are dense tensors with data.
    """
    if path.suffix == ".safetensors":
        dtypes, digest = _header(path)
        others = [f"{name!r} ({dtype})" for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
    else:
        tensors, digest = _archive(path, mmap=True)
        absent = [f"{name!r} ({_kind(value)})" for name, value in tensors.items() if not _has_data(value)]
        if absent:
            raise ValueError(f"{path} must hold nothing but dense tensors with data, by name; got {some(absent)}")
        others = [f"{name!r} ({_kind(value)})" for name, value in tensors.items() if not _usable(name, value)]
    others = [other for other in others if ".lora_" in other]
    if others:
        raise ValueError(f"{path}: an adapter's tensors are floating point; got {some(others)}")
    return digest


def tensor_names(path: Path) -> list[str]:
    """List the names of a weight file's tensors."""
    return list(_header(path)[0] if path.suffix == ".safetensors" else _archive(path, mmap=True).tensors)


def _header(path: Path) -> tuple[dict[str, str], str | None]:
    """Read the dtypes by name, as the file calls them, and the digest."""
    with _opened(path) as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return dtypes, (file.metadata() or {}).get(METADATA)


def _safetensors(path: Path) -> Weights:
    with _opened(path) as file:  # tensors and digest of one file, also if it is replaced meanwhile
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Weights(tensors, (file.metadata() or {}).get(METADATA))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; save or fetch the adapter again")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _archive(path: Path, mmap: bool = False) -> Weights:
    tensors = _pickle(path, mmap)
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors by name, got {type(tensors).__name__}")
    return Weights(tensors, digest_of_archive(path) if zipfile.is_zipfile(path) else None)


def _pickle(path: Path, mmap: bool) -> Any:
    archive = _check_size(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and archive)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no plain file of tensors: reading it could run code, or it is damaged, so it was not read. "
            f"Get the adapter as {SAFETENSORS_WEIGHTS_NAME}, or, if you trust its author, load it yourself and save "
            "its tensors in that format"
        ) from error
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where a cut file has ended
            raise
        raise _damaged(path, error) from error


def _check_size(path: Path) -> bool:
    """Refuse a pickle that would take far more memory or time than its tensors, and tell whether it is an archive."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; save or fetch the adapter again")
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"  # what torch.load goes by
    if not archive:
        if size > PICKLE_LIMIT:
            raise ValueError(
                f"{path} is no archive as torch.save writes since version 1.6, and with {size:,} bytes larger than "
                f"the {PICKLE_LIMIT:,} that are read without one: it is damaged, or of an older version; get the "
                f"adapter as {SAFETENSORS_WEIGHTS_NAME}"
            )
        return False
    try:
        with zipfile.ZipFile(path) as zipped:
            parts = zipped.infolist()
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error
    unpacked = sum(part.file_size for part in parts)
    if unpacked > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(
            f"{path} has {size:,} bytes and unpacks to {unpacked:,}: torch.save packs nothing, so this was made "
            f"otherwise and is not read; get the adapter as {SAFETENSORS_WEIGHTS_NAME}"
        )
    index = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if index > PICKLE_LIMIT:
        raise ValueError(
            f"{path}: its list of tensors has {index:,} bytes, and only {PICKLE_LIMIT:,} are read (20,000 tensors); "
            f"get the adapter as {SAFETENSORS_WEIGHTS_NAME}"
        )
    return True


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error or type(error).__name__}); save or fetch the adapter again")


def _usable(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point() and _has_data(value)


def _has_data(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"{value.dtype}{layout}" + (f", {value.device.type}" if value.device.type != "cpu" else "")

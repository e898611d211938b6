"""Which base model a folder holds: a digest that is made without reading its weights as a whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDS = 2**20  # bytes


def base_digest(model: str, gguf_file: str | None) -> str | None:
    """Return the beginning of a digest of a base model in a folder; None for one on the hub.

    It is of config.json, and of each weights file's name, size, first and last megabyte (with ``gguf_file`` of that
    file's alone). So it notices another architecture, dtype or quantisation, and other weights that differ at a file's
    ends, as all do after training of the whole model. It does not notice what differs inside a file alone, such as one
    layer of many, nor another tokenizer or generation_config.json.

    Raises:
        ValueError: a file cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    weights = (path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    names = [gguf_file] if gguf_file else sorted(weights)
    config = folder / "config.json"
    try:
        digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
        for name in names:
            with (folder / name).open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{name} {size}".encode())
                for start in (0, max(0, size - ENDS)):
                    file.seek(start)
                    digest.update(file.read(ENDS))
    except OSError as error:
        raise ValueError(f"the base model's file {error.filename} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:12]

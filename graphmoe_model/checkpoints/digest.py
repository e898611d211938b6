"""The digest of a configuration, in both files of an adapter: it tells whether they are of the same save."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from graphmoe_model.checkpoints.folder import TEMPORARY

FIELD = "saved_digest"  # in adapter_config.json
METADATA = "graphmoe_config_digest"  # in the weights
_SETS = ("target_modules", "exclude_modules")  # PEFT writes them in any order


def config_digest(settings: dict[str, Any]) -> str:
    """Compute the digest of an adapter_config.json's content, whatever the order of its fields."""
    content = {
        name: sorted(value) if name in _SETS and isinstance(value, list) else value
        for name, value in settings.items()
        if name != FIELD
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamp(folder: Path) -> None:
    """Write the digest of a folder's adapter_config.json into that file and into the weights beside it."""
    path = folder / CONFIG_NAME
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings[FIELD] = config_digest(settings)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    if (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        _stamp_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, settings[FIELD])
    if (folder / WEIGHTS_NAME).exists():
        with zipfile.ZipFile(folder / WEIGHTS_NAME, "a") as archive:  # what torch.save writes
            archive.comment = f"{METADATA}={settings[FIELD]}".encode()


def _stamp_safetensors(path: Path, digest: str) -> None:
    """Give the file a longer header: eight bytes of length, JSON padded to a multiple of eight, then the data."""
    stamped = path.with_suffix(".stamped")
    with path.open("rb") as old, stamped.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), METADATA: digest}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 16 * 2**20)
    stamped.replace(path)


def digest_of_archive(path: Path) -> str | None:
    """Return the digest in a file of ``torch.save``; None if it has none."""
    with zipfile.ZipFile(path) as archive:
        name, _, digest = archive.comment.decode("utf-8", "replace").partition("=")
    return digest if name == METADATA else None


def check_digest(folder: Path, of_config: str | None, of_weights: str | None) -> None:
    """Refuse a configuration and weights of two different saves.

    Args:
        folder: names them in the error.
        of_config: the digest in the configuration.
        of_weights: the digest in the weights; None, as tools that rewrite them leave it, fits every configuration.

    Raises:
        ValueError: they differ.
    """
    if of_weights is None or of_config == of_weights:
        return
    rest = [path for path in sorted(folder.glob(f"{TEMPORARY}*/**/{CONFIG_NAME}")) if _digest_in(path) == of_weights]
    todo = (
        f"the configuration that belongs to the weights is still in {rest[0]}: move it to {folder / CONFIG_NAME} to "
        "finish that save"
        if rest
        else "save or fetch the adapter again"
    )
    raise ValueError(
        f"{folder} holds the configuration of one save and the weights of another (digest "
        f"{'none' if of_config is None else str(of_config)[:12]} in {CONFIG_NAME}, {of_weights[:12]} in the weights): "
        f"a save was killed between the two, or they were copied together; {todo}"
    )


def _digest_in(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(FIELD)
    except (OSError, ValueError, AttributeError):
        return None

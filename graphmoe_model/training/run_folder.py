"""A run's folder: whose it is, whether there is room for it, and which checkpoints in it are whole.

A checkpoint is whole when `COMPLETE`, which lists its files with their sizes, is there and agrees with them. It is
written last, and removed first, so that a run that is killed at any moment leaves either a whole checkpoint or one that
can be told not to be.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from graphmoe_tables.recipe import TrainingRecipe
from graphmoe_tables.recipe_files import RECIPE_FILE, differences, recipe_of

COMPLETE = "complete.json"
DATA_FILE = "data.json"
RESULT_FILE = "train_result.json"
PREFIX = "checkpoint-"


def check_folder(recipe: TrainingRecipe, resume: bool) -> bool:
    """Return whether the output folder holds a run of this recipe to go on with.

    Raises:
        ValueError: it is no folder, cannot be written to, holds files of something else, or a run: of another recipe
            (what differs is named), or of this one while ``resume`` is off.
    """
    folder = Path(recipe.output)
    _check_writable(folder)
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not there:
        return False
    if RECIPE_FILE not in there:
        some = ", ".join(there[:4])
        raise ValueError(f"--output {folder} holds other files ({some}) and no run; name a new or an empty folder")
    changed = differences(recipe_of({}, folder / RECIPE_FILE), recipe)
    if changed:
        raise ValueError(
            f"--output {folder} holds a run of another recipe: {'; '.join(changed)}. Name another folder (with "
            f"--start-from {folder} to train its adapter on, from a new schedule), or go on with that run as it is: "
            f"--config {folder / RECIPE_FILE} --resume"
        )
    if not resume:
        raise ValueError(
            f"--output {folder} holds a run of this same recipe; go on with it by --resume, or name another folder"
        )
    return True


def _check_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"  # each process has its own
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written to: {error.strerror}; name another folder") from error


def check_space(recipe: TrainingRecipe, parameters: int) -> int:
    """Return how many bytes the run's files take at most: adapters in fp32, and two moments per parameter beside them.

    One checkpoint more than is kept: the next is written before the oldest goes; and with evaluation the best.

    Raises:
        ValueError: the disk has less than that free.
    """
    checkpoints = recipe.keep_checkpoints + 1 + (recipe.eval_data is not None)
    needed = 4 * parameters * (3 * checkpoints + 1)
    free = shutil.disk_usage(recipe.output).free
    if free < needed:
        raise ValueError(
            f"the disk of --output {recipe.output} has {free / 1e9:.1f} GB free, and this run writes up to "
            f"{needed / 1e9:.1f} GB ({parameters:,} trained parameters, {checkpoints} checkpoints with AdamW's state); "
            "free some, name another folder, or keep fewer by --keep-checkpoints"
        )
    return needed


def complete(checkpoint: Path) -> None:
    """Mark a checkpoint as whole: everything in it is on the disk, and listed."""
    sizes = _sizes(checkpoint)
    for name in sizes:
        with open(checkpoint / name, "rb") as file:
            os.fsync(file.fileno())
    new = checkpoint / f".{COMPLETE}"
    with open(new, "w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, checkpoint / COMPLETE)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has all the files, of the sizes, that it was completed with."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = _sizes(checkpoint)
    return bool(listed) and all(found.get(name) == size for name, size in listed.items())


def checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoints, whole or not, the latest last."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=_step)


def last_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the latest whole checkpoint, and those that are not whole."""
    found = checkpoints(folder)
    whole = [path for path in found if is_whole(path)]
    return (whole[-1] if whole else None), [path for path in found if path not in whole]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is removed in part is no whole one any more."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Remove the oldest checkpoints but for ``keep`` of them and the best."""
    names = {Path(best).name} if best else set()
    for checkpoint in checkpoints(folder)[:-keep]:
        if checkpoint.name not in names:
            remove(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name.lstrip(".") != COMPLETE]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(files)}

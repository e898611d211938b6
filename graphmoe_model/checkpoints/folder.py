"""A folder whose files are replaced together: filled beside them first, then moved into place in a few renames."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

try:
    import fcntl
except ImportError:  # Windows has no such locks: savers do not wait for each other there
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".saving-"
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def check_target(folder: Path) -> None:
    """Refuse a path that cannot become a folder.

    Raises:
        FileExistsError: it is a file, or a symbolic link to something that is not there.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(
            f"{folder} is a symbolic link to {os.readlink(folder)}, which is not there; make that folder, or remove "
            "the link"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the adapter")


def in_use(folder: Path) -> bool:
    """Tell whether anything but the remains of killed saves is in a folder."""
    return folder.is_dir() and bool(set(folder.iterdir()) - set(stale_folders(folder)))


def fill_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a temporary folder inside ``folder``, then move its files into their places.

    Whatever fails leaves every file as it was: an error in ``write`` before the first was touched, a failing move by
    taking the others back. The configuration comes right after the weights, so that a kill seldom falls between the
    two; a weight file of the other type beside the new one goes after that. Other files in the folder stay.

    Raises:
        FileExistsError: the folder is a file or a broken link, or has a folder where a file has to go.
        OSError: what the file system raises.
    """
    check_target(folder)
    created = not folder.exists()
    try:
        with temporary_folder(folder) as temporary:
            write(temporary)
            _move_into(temporary, folder)
    except BaseException:
        if created:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty: another process may have saved into it meanwhile
        raise


def stale_folders(folder: Path) -> list[Path]:
    """List the temporary folders that killed saves left behind: nobody holds their locks."""
    return [path for path in sorted(folder.glob(f"{TEMPORARY}*")) if path.is_dir() and _is_free(path)]


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a folder inside ``folder``, locked for as long as its process needs it and lives.

    What killed processes left of such folders goes first.
    """
    for attempt in range(5):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(folder):  # nobody takes it for stale before it has its lock
                _remove_stale(folder)
                path = Path(tempfile.mkdtemp(dir=folder, prefix=TEMPORARY))
                lock = _lock(path, wait=True)
            break
        except FileNotFoundError:  # another save that failed has just removed the empty folder
            if attempt == 4:
                raise
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _unlock(lock)


def _move_into(source: Path, target: Path) -> None:
    """Move every file below ``source`` to its place below ``target``; all of them or none."""
    written = [path for path in source.rglob("*") if path.is_file()]
    order = sorted(written, key=lambda path: (path.name == CONFIG_NAME, path.name in _WEIGHTS, path))
    places = {path: target / path.relative_to(source) for path in order}
    _check_places(target, places.values())
    for path in order:  # on disk before the first old file goes
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        old = Path(tempfile.mkdtemp(dir=source))  # what the places held; goes with ``source``
        undo: list[Callable[[], object]] = []
        try:
            for path, place in places.items():
                undo.append(_set_aside(place, old / str(len(undo))))
                path.replace(place)
            for place in places.values():
                other = place.with_name(_WEIGHTS[1 - _WEIGHTS.index(place.name)]) if place.name in _WEIGHTS else None
                if other is not None and other not in places.values():
                    undo.append(_set_aside(other, old / str(len(undo))))
                    other.unlink(missing_ok=True)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        _remove_stale(target, {place.relative_to(target) for place in places.values()})


def _check_places(target: Path, places: Iterable[Path]) -> None:
    for place in places:
        if place.is_dir() and not place.is_symlink():
            raise FileExistsError(f"{place} is a folder where a file of that name has to go; move it away")
        blocked = [path for path in place.relative_to(target).parents if (target / path).is_file()]
        if blocked:
            raise FileExistsError(f"{target / blocked[0]} is a file where a folder has to go; move it away")


def _set_aside(place: Path, old: Path) -> Callable[[], object]:
    """Keep what is at ``place`` also as ``old``, and return how to put it back."""
    if not (place.exists() or place.is_symlink()):
        return lambda: place.unlink(missing_ok=True)
    try:
        os.link(place, old, follow_symlinks=False)  # no gap in which the place is empty, and no copy
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(place, old, follow_symlinks=False)
    return lambda: old.replace(place)


def _remove_stale(folder: Path, written: Iterable[Path] = ()) -> None:
    """Remove what killed saves left, but no configuration that is still needed.

    One whose weights are in place already belongs to them, unless this save has ``written`` both anew or the same
    configuration is in place too.
    """
    for path in stale_folders(folder):
        configs = [config for config in path.rglob(CONFIG_NAME) if config.relative_to(path) not in written]
        if not any(_is_rest(config, folder / config.relative_to(path)) for config in configs):
            shutil.rmtree(path, ignore_errors=True)


def _is_rest(config: Path, place: Path) -> bool:
    """Tell whether a configuration was left without its weights and differs from what is in its place."""
    if any((config.parent / name).exists() for name in _WEIGHTS):
        return False
    return not place.is_file() or config.read_bytes() != place.read_bytes()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the folder's lock, and hold it."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """Take a folder's lock, which the system releases when its holder dies; None where there are no such locks.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is off.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems lock no folders
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _is_free(folder: Path) -> bool:
    """Tell whether nobody holds a folder's lock; False also where nobody can know."""
    try:
        lock = _lock(folder, wait=False)
    except (BlockingIOError, FileNotFoundError):
        return False
    _unlock(lock)
    return lock is not None

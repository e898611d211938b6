"""The sources of a Python package as a kernel has them: what its `__init__` reaches, importing each other relatively.

A kernel is loaded under a name of its own, so an import of the package by its name would find another one, or none.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# Besides the standard library; the hub allows PyTorch, and Triton comes with it.
ALLOWED = ("torch", "triton")
# kernel-builder generates it, and refuses to where it is there.
GENERATED = "_ops.py"


def collect_sources(package: Path) -> dict[str, str]:
    """Return the text of every file that a kernel made of ``package`` consists of, by its path in it.

    These are the modules that the package's `__init__` imports, and those that they import, also inside functions, all
    with relative imports; and all JSON files. Its `_ops` is left out.

    Args:
        package: the folder of the package.

    Raises:
        FileNotFoundError: there is no package, or a module imports one of it that is not there.
        ValueError: a module imports the package in a form that has no relative one, or a library that is not allowed.
    """
    if not (package / "__init__.py").is_file():
        raise FileNotFoundError(f"{package} is no package: it has no __init__.py; give the folder of graphmoe_kernels")
    found: dict[str, str] = {}
    waiting = [package / "__init__.py"]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(package).as_posix()
        if name in found:
            continue
        found[name], imported = relative_imports(path, package)
        waiting += imported
    found.pop(GENERATED, None)
    configurations = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.json")}
    return dict(sorted((found | configurations).items()))


def relative_imports(path: Path, package: Path) -> tuple[str, list[Path]]:
    """Return the text of a module with relative imports of its package, and the files of the package that it imports.

    Args:
        path: of the module.
        package: the folder of its package.

    Raises:
        FileNotFoundError, ValueError: as `collect_sources`.
    """
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    here = path.relative_to(package).parent.parts
    imported: list[Path] = []
    for node in ast.walk(ast.parse(text)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for each in node.names:
                _check_allowed(each.name, package.name, where, lines[node.lineno - 1])
        if not isinstance(node, ast.ImportFrom):
            continue
        root, *parts = (node.module or "").split(".")
        if node.level or root != package.name:
            _check_allowed("." * node.level + (node.module or ""), package.name, where, lines[node.lineno - 1])
            continue
        old = f"from {node.module} import"
        line, start = lines[node.lineno - 1], node.col_offset
        if not line.startswith(old, start):
            raise ValueError(f"{where}: write '{old} ...' with single spaces on one line, to be made relative")
        new = f"from {_relative(parts, here)} import"
        lines[node.lineno - 1] = line[:start] + new + line[start + len(old) :]
        imported += _files(package, parts, [each.name for each in node.names], where)
    return "".join(lines), imported


def _check_allowed(module: str, package: str, where: str, line: str) -> None:
    root = module.partition(".")[0]
    if root in (package, ""):
        raise ValueError(f"{where}: write '{line.strip()}' as 'from {package}... import ...', to be made relative")
    if root not in ALLOWED and root not in sys.stdlib_module_names:
        raise ValueError(
            f"{where}: imports {root}, and a kernel may import the standard library and {' and '.join(ALLOWED)} alone; "
            "keep it out of what the package's __init__ reaches"
        )


def _relative(parts: list[str], here: tuple[str, ...]) -> str:
    """The module ``parts`` of a package as a module in its folder ``here`` names it."""
    common = 0
    while common < min(len(parts), len(here)) and parts[common] == here[common]:
        common += 1
    return "." * (len(here) - common + 1) + ".".join(parts[common:])


def _files(package: Path, parts: list[str], names: list[str], where: str) -> list[Path]:
    """The files that are run by an import of ``names`` from the module ``parts``: it, what it lies in, submodules."""
    folders = [package.joinpath(*parts[:depth]) for depth in range(len(parts))]
    module = package.joinpath(*parts)
    if module.is_dir():
        submodules = [_file(module / name) for name in names]
        found = [_file(module), *(path for path in submodules if path is not None)]
    else:
        found = [_file(module)]
    files = [path for path in (*map(_file, folders), *found) if path is not None]
    if found[0] is None:
        raise FileNotFoundError(f"{where}: imports {'.'.join((package.name, *parts))}, which {package} does not have")
    return files


def _file(module: Path) -> Path | None:
    """The file of a module that is given without its suffix, or of a package's `__init__`; None where there is none."""
    return next((path for path in (module / "__init__.py", module.with_suffix(".py")) if path.is_file()), None)

"""Assemble the repository that the kernels hub builds `graphmoe_kernels` from, and its built form.

python -m integrations.kernels_hub.make_kernel OUTPUT --repo-id OWNER/NAME
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from pathlib import Path
from string import Template
from typing import Any

from integrations.kernels_hub.build_folder import ARCHITECTURES, write_files, write_variants
from integrations.kernels_hub.sources import collect_sources

PACKAGE = "graphmoe_kernels"
NAME = PACKAGE.replace("_", "-")  # the hub's names have no underscores
LICENSE = "apache-2.0"
HERE = Path(__file__).resolve().parent
LAYOUT = HERE / "layout"
HIDDEN = {"gitignore": ".gitignore"}  # in this repository it would hide files
# By the hub's convention what may still change its interface, as graphmoe before 1.0 may.
VERSION = 0
# What the card offers of the functions that the package exports; the others are for graphmoe_model.
OPERATORS = (
    *("topk_softmax_routing", "route_tokens", "expert_swiglu", "swiglu", "gru_step", "rethink"),
    "register_activation",
)


def assemble(
    output: Path,
    repo_id: str,
    *,
    version: int = VERSION,
    upstream: str | None = None,
    package: Path | None = None,
) -> None:
    """Write the kernel's repository to a folder: sources, tests, benchmarks, card, settings, and ``build``.

    Args:
        output: the folder; made where it is missing.
        repo_id: owner and name of the repository on the hub, which tests, card and upload go by.
        version: of the kernel on the hub, whose branch is ``v<version>``.
        upstream: address of the git repository that the kernel's code comes from.
        package: the folder of graphmoe_kernels; by default the one that an import would find.

    Raises:
        FileExistsError: the folder has something in it, or is a file.
        FileNotFoundError, ModuleNotFoundError: there is no graphmoe_kernels.
        TypeError: a version that is no integer.
        ValueError: a repository, version or address of another form; sources that a kernel cannot have.
    """
    _check_options(repo_id, version, upstream)
    _check_free(output)
    package = _installed() if package is None else package
    sources = collect_sources(package)
    exported = _exported(package)
    settings: dict[str, Any] = {"version": version, "license": LICENSE}
    if upstream is not None:
        settings["upstream"] = upstream
    values = {
        "name": NAME,
        "repo_id": repo_id,
        "version": version,
        "license": LICENSE,
        "upstream": "" if upstream is None else f'upstream = "{upstream}"\n',
        "origin": "" if upstream is None else f"\n## Source\n\n{upstream}\n",
        "backends": _listed(ARCHITECTURES),
        "cuda": _listed(ARCHITECTURES["cuda"]),
        "rocm": _listed(ARCHITECTURES["rocm"]),
        "functions": _bullets(OPERATORS),
        "types": _bullets(name for name in exported if not name.islower() and not name.isupper()),
    }
    files = {path.relative_to(LAYOUT).as_posix(): path for path in LAYOUT.rglob("*") if path.is_file()}
    written = {
        HIDDEN.get(name, name): Template(path.read_text()).substitute(values)
        for name, path in files.items()
        if "__pycache__" not in path.parts
    }
    written["LICENSE"] = (HERE.parents[1] / "LICENSE").read_text()
    write_files(output, written)
    write_files(output / "torch-ext" / PACKAGE, sources)
    write_variants(output / "build", sources, NAME, settings)
    write_files(output / "build", {"CARD.md": written["CARD.md"]})  # the upload makes it the hub's README


def main(arguments: list[str] | None = None) -> None:
    """Assemble the kernel as the command line says; end with a message where that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m integrations.kernels_hub.make_kernel", description=__doc__)
    parser.add_argument("output", type=Path, help="a folder that is empty or not there yet")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository on the hub")
    parser.add_argument("--version", type=int, default=VERSION, help="of the kernel on the hub (default: %(default)s)")
    parser.add_argument("--upstream", metavar="URL", help="git repository that the code comes from, https://...")
    given = parser.parse_args(arguments)
    try:
        assemble(given.output, given.repo_id, version=given.version, upstream=given.upstream)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{given.output}: {NAME}, version {given.version}, for {', '.join(ARCHITECTURES)}")


def _check_options(repo_id: str, version: int, upstream: str | None) -> None:
    if not isinstance(repo_id, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id, re.ASCII):
        raise ValueError(f"repo_id must be OWNER/NAME, as the hub has it, such as my-org/{NAME}; got {repo_id!r}")
    if isinstance(version, bool) or not isinstance(version, int):
        raise TypeError(f"version must be an integer, the hub's branch being v<version>; got {version!r}")
    if version < 0:
        raise ValueError(f"version must be 0 (may still change) or more, got {version}")
    if upstream is not None and not re.fullmatch(r"https://[^\s\"'$\\]+", upstream):
        raise ValueError(f"upstream must be the https:// address of a git repository, got {upstream!r}")


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there and no empty folder; give another one, or remove it")


def _installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no {PACKAGE} to import; install it (pip install -e .), or run at the repository")
    return Path(spec.origin).parent


def _exported(package: Path) -> list[str]:
    """The names of `__all__`, which are the interface that the hub's versions promise."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise ValueError(f"{package / '__init__.py'} assigns no __all__, a list of names, which the hub takes as interface")


def _listed(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _bullets(names: Any) -> str:
    return "\n".join(f"- `{name}`" for name in names)


if __name__ == "__main__":
    main()

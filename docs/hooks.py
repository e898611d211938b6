"""What the site needs besides the pages of this folder: pages at the root, files that pages link to, tables of fields.

Pages are written for Git hosts, where links are paths in the repository. A link that leaves this folder gets a place in
the site: README, CONTRIBUTING and CHANGELOG are pages, any other file is copied under ``files/``. A notebook is a page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fields import with_fields  # beside this file
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from notebook_pages import as_page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    **{"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"},
    "docs/notebooks/first-steps.ipynb": "notebooks/first-steps.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages at the root, and all files outside of this folder that a page links to."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place, content=_text(ROOT / name)))
    linked: set[Path] = set()
    for page in [*(ROOT / name for name in PAGES), *DOCS.rglob("*.md")]:
        text = FENCED.sub("", _text(page))
        linked |= {_target(page, found[2]) for found in LINK.finditer(text) if "://" not in found[2]}
    for target in sorted(linked):
        if not target.exists() or target.is_dir():
            raise PluginError(f"a page links to {target.relative_to(ROOT)}, which is no file of this repository")
        if not target.is_relative_to(DOCS) and str(target.relative_to(ROOT)) not in PAGES:
            files.append(File.generated(config, _copied(target), content=target.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn the page's links from paths in the repository into paths in the site; put in the tables it asks for."""
    source = _source(page.file.src_uri)
    if source is None:  # made by a plugin, or a copied file
        return markdown
    here = Path(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        opening, target, anchor, closing = found.groups()
        if "://" in target:
            return found[0]
        place = _place(_target(source, target))
        return f"{opening}{os.path.relpath(place, here)}{anchor or ''}{closing}"

    pieces, end = [], 0
    for block in FENCED.finditer(markdown):  # what is to be typed stays as it is
        pieces += [LINK.sub(moved, markdown[end : block.start()]), block[0]]
        end = block.end()
    return with_fields("".join([*pieces, LINK.sub(moved, markdown[end:])]))


def _text(page: Path) -> str:
    return as_page(page) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")


def _source(uri: str) -> Path | None:
    """The file of the repository that a page of the site is made from."""
    at_root = {place: name for name, place in PAGES.items()}
    if uri in at_root:
        return ROOT / at_root[uri]
    return DOCS / uri if (DOCS / uri).is_file() else None


def _target(page: Path, link: str) -> Path:
    return (page.parent / link).resolve()


def _place(target: Path) -> str:
    """Where a file of the repository is in the site."""
    name = str(target.relative_to(ROOT))
    if name in PAGES:
        return PAGES[name]
    return str(target.relative_to(DOCS)) if target.is_relative_to(DOCS) else _copied(target)


def _copied(target: Path) -> str:
    """A Markdown file is copied as text: written by a command, it has tables wider than a page."""
    name = f"files/{target.relative_to(ROOT)}"
    return f"{name}.txt" if target.suffix in (".md", "") else name

"""What ``graphmoe compare`` does: read evaluations, write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graphmoe_model.evaluation.comparison import check_evaluation, comparison_page
from graphmoe_model.evaluation.document import read_document


def run(evaluations: Sequence[Path], output: Path | None) -> None:
    """Compare evaluations, named as their files unless those have one name.

    Raises:
        ValueError: fewer than two, a file that is no evaluation's, no task in common, or other questions under
            one name.
        OSError: the page cannot be written.
    """
    documents = [read_document(path, "a JSON file that graphmoe eval wrote") for path in evaluations]
    for document, path in zip(documents, evaluations, strict=True):
        check_evaluation(document, str(path))
    names = [path.stem for path in evaluations]
    if len(set(names)) < len(names):
        names = [str(path) for path in evaluations]
    for document, name in zip(documents, names, strict=True):
        document["conditions"]["name"] = name
    page = comparison_page(documents)
    if output is None:
        print(page, end="")
    else:
        output.write_text(page, encoding="utf-8")
        print(f"Page: {output}")

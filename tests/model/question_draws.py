"""Files of questions: rows that a person could write, with any of their parts spoilt, and lines of anything."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

TEXT = st.text(max_size=12) | st.sampled_from(["Which?", " ", "", "\ud800", "a\u2028b", "é", "[red]", "_"])
JUNK = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.lists(TEXT, max_size=3) | st.just({"a": 1})
CHOICES = st.lists(TEXT, max_size=5) | st.lists(st.sampled_from("abcd"), min_size=2, max_size=30)
ANSWER = st.integers(-1, 5) | st.sampled_from(["A", "B", "Z", "true", "b", "0"])


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    """An object: mostly a question, sometimes with a part of another kind, one too few or one too many."""
    row: dict[str, Any] = {"question": draw(TEXT), "choices": draw(CHOICES), "answer": draw(ANSWER)}
    if draw(st.booleans()):
        row["context"] = draw(TEXT)
    if draw(st.integers(0, 3)) == 0:
        row["labels"] = draw(st.lists(TEXT | st.sampled_from(["true", "false"]), max_size=5))
    for key in draw(st.lists(st.sampled_from([*row, "answers"]), max_size=1)):
        if draw(st.booleans()):
            row[key] = draw(JUNK)
        else:
            row.pop(key, None)
    return row


@st.composite
def files(draw: Any) -> bytes:
    """A file's bytes: good rows, drawn ones, and rarely a line that is no JSON."""
    good = st.builds(
        lambda answer: {"question": "Which?", "choices": ["a", "b"], "answer": answer}, st.sampled_from([0, "B"])
    )
    lines = [json.dumps(row).encode() for row in draw(st.lists(good, max_size=3))]
    for row in draw(st.lists(rows(), max_size=2)):
        lines.insert(
            draw(st.integers(0, len(lines))),
            json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"),
        )
    if draw(st.integers(0, 3)) == 0:
        lines.insert(
            draw(st.integers(0, len(lines))), draw(st.binary(max_size=20) | st.sampled_from([b"", b"{}", b"[1]"]))
        )
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)

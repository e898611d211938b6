"""docs/peft.md says what PEFT's users can expect, and which test holds each of it: both must stay true."""

from __future__ import annotations

import re
from pathlib import Path

from graphmoe_model.config.refused_options import REFUSED_OPTIONS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/peft.md").read_text()


def test_every_test_that_the_page_names_is_there():
    """A row whose test was renamed or deleted is held by nothing."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 40
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests/model" / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_the_page_has_all_refused_options():
    """One table in the code, the same in the docs: the reason that a user reads is the one that the error gives."""
    listed = PAGE.partition("## Options that are refused")[2].partition("\n- ")[2].split()  # lines are wrapped
    expected = [f"`{name}`: {why.reason}; {why.instead}." for name, why in REFUSED_OPTIONS.items()]
    assert " ".join(listed) == " - ".join(expected)

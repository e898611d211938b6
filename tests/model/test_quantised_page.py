"""docs/quantised.md says what works on quantised bases, and which test holds it: every name must be one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/quantised.md").read_text()


def test_every_test_that_the_page_names_is_there():
    """A cell whose test was renamed or deleted is held by nothing."""
    tests = "".join(path.read_text() for path in sorted((ROOT / "tests/quant").glob("test_*.py")))
    tests += (ROOT / "tests/model/test_dequantise.py").read_text()
    named = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", PAGE))
    assert len(named) > 20
    assert not {name for name in named if not re.search(rf"^def {name}\(", tests, re.MULTILINE)}

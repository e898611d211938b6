"""What a command drew."""

from __future__ import annotations

from pathlib import Path

PNG, PDF = b"\x89PNG\r\n\x1a\n", b"%PDF-"


def assert_picture(png: Path) -> None:
    """A picture is there, as PNG and as PDF, and both are whole."""
    assert png.read_bytes().startswith(PNG)
    vector = png.with_suffix(".pdf").read_bytes()
    assert vector.startswith(PDF)
    assert vector.rstrip().endswith(b"%%EOF")
    assert b"CreationDate" not in vector  # the same picture is the same bytes

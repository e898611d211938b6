"""What the tests that measure share."""

from __future__ import annotations

import pytest


@pytest.fixture
def quick(monkeypatch):
    """As few turns and repeats as there can be."""
    monkeypatch.setattr("benchmarks.devices.MIN_TURNS", 2)
    monkeypatch.setattr("benchmarks.measure.SHORTEST_TURN", 0.0)

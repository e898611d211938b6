"""The study's parts by name."""

from __future__ import annotations

from experiments.study import depth, real

PARTS = {part.name: part for part in (real.PART, real.HARD, depth.PART)}

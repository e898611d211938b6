"""How results write figures."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """A time in the unit that suits its size."""
    if value is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.4g} {unit}" if value * factor < 1000 else f"{value * factor:,.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def mega(value: float | None, digits: int = 1) -> str:
    """Millions, of bytes for one."""
    return "-" if value is None else f"{value / 1e6:,.{digits}f}"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

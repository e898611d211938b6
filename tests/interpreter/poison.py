"""Masked-off lanes of a load without ``other=`` hold poison instead of zero.

Triton leaves their value undefined, and on a GPU they hold whatever the register held. The stock interpreter fills in
zeros, which hides a forgotten ``other=`` wherever zero happens to be harmless: in a sum, in a dot product. Here floats
are NaN, and integers a pattern that is outside every tensor when it is used as an index. (The interpreter's ``tl.max``
and ``tl.min`` pass over NaN, as those of a GPU do: there the poison does not show.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

BFLOAT16_NAN = 0x7FC0
INTEGER_BYTE = b"\x55"


def poison_value(dtype: np.dtype, is_bfloat16: bool) -> Any:
    """What a masked-off lane holds; the interpreter stores bfloat16 as its bits, in uint16."""
    if is_bfloat16:
        return np.uint16(BFLOAT16_NAN)
    if dtype.kind == "f":
        return dtype.type(np.nan)
    if dtype.kind == "b":
        return np.bool_(True)
    return np.frombuffer(INTEGER_BYTE * dtype.itemsize, dtype=dtype)[0]

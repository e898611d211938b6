"""DoRA: an adapted weight W~ = m * (W + s B A) / ||W + s B A||, row by row, for the experts of one linear.

Source: DoRA, Eq. 5, with the norm held constant in the backward pass as in its section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.backend import without_autocast

# Elements of W that are computed with at once where W has to be cast: 64 MiB in fp32.
BLOCK_ELEMENTS = 2**24


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + s B_i A_i|| of every row and expert, [n, out], without gradient and without forming the sum.

    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T for a row w of W and b of B.

    Args:
        weight: [out, in], of any float dtype.
        A: [n, r, in]; B: [n, out, r].
        scale: s.

    What ``torch.set_float32_matmul_precision`` says of matrix products holds for the terms with A. ||w||^2 is none, so
    with B = 0 the norms are those of W's rows under every setting.

    The expansion loses digits where s b A nearly cancels w: its rounding is that of ||w||^2, not of the small sum.

    Returns:
        [n, out], in fp32 or, if any argument is, fp64. With B = 0 these are the norms of W's own rows, to the bit the
        same whatever A and s are.
    """
    exact = torch.float64 if torch.float64 in (weight.dtype, A.dtype, B.dtype) else torch.float32
    with torch.no_grad(), without_autocast(weight):
        A, B = A.to(exact), B.to(exact)
        rows = max(1, BLOCK_ELEMENTS // weight.shape[1]) if weight.dtype != exact else weight.shape[0]
        own, cross = [], []
        for block in weight.split(rows):
            block = block.to(exact)
            own.append(torch.linalg.vecdot(block, block))  # [rows]
            cross.append(block @ A.flatten(0, 1).T)  # [rows, n*r]
        reads = torch.cat(cross).unflatten(1, A.shape[:2]).transpose(0, 1)  # [n, out, r]
        mixed = torch.linalg.vecdot(2 * scale * reads + scale**2 * (B @ (A @ A.mT)), B)  # [n, out]
        return (torch.cat(own) + mixed).clamp(min=0).sqrt()


def dora_scale(magnitude: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """m / ||W + s B A||, [n, out], differentiable in the magnitude [n, out]; other arguments as in `row_norms`.

    The norms are rounded to the magnitude's dtype first, so that a magnitude that was set to them gives 1.
    """
    norms = row_norms(weight, A, B, scale).to(magnitude.dtype)
    exact = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(exact) / norms.to(exact)


def scaled_rows(B: Tensor, scale: Tensor | None) -> Tensor:
    """B [n, out, r] with its rows times ``scale`` [n, out], in the wider dtype; B itself without one."""
    return B if scale is None else B * scale[..., None]


def scaled_by(x: Tensor, change: Tensor) -> Tensor:
    """x (1 + change), in the dtype of x: a change far below 1 keeps its own precision."""
    return torch.addcmul(x, x, change.to(x.dtype))

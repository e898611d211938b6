"""x W^T as accurate as in fp32 where PyTorch was told to multiply fp32 matrices with less.

Under ``torch.set_float32_matmul_precision("high")`` tensor cores read 11 bits of every fp32 number, so that logits near
a tie send tokens to other experts. Turning the setting off around a product would turn it off for every thread.
Instead an fp32 number is written as the sum of three that have 8 bits each: those are read whole under every setting,
their products are exact in fp32, and six of the nine (the others are below the rounding) add up to the fp32 product.

That is three matrix products of 3n, 2n and n columns in place of one of n, and two more copies of x, and only where the
setting asks for it: with the router's n they stay small beside the layer's other products. bf16 numbers are one part
and fp16 numbers two.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.tracing import asked_while_tracing

# How many numbers of 8 bits hold one of the dtype.
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@asked_while_tracing
def reduced_precision(device_type: str) -> bool:
    """Tell whether fp32 matrix products on such a device read less than fp32 at present."""
    backends = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}  # type: ignore[attr-defined]
    return device_type in backends and backends[device_type].fp32_precision in ("tf32", "bf16")


def exact_linear(x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
    """Multiply x [N, K] with weight [n, K] transposed, in fp32 (fp64 if x is), whatever the precision of products is.

    Differentiable, with gradients of the same accuracy in the dtypes of the arguments; autocast has to be off.

    Args:
        x, weight: of any float dtypes.
        offset: [N, n], to which the product is added, or None.

    Returns:
        [N, n].
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if offset is not None and offset.dtype is not wide:
        offset = offset.to(wide)
    if wide is torch.float32 and reduced_precision(x.device.type):
        product: Tensor = _ExactLinear.apply(x, weight)
        return product if offset is None else offset + product
    if x.dtype is not wide or weight.dtype is not wide:
        x, weight = x.to(wide), weight.to(wide)
    # Of two dimensions these are quicker to call than F.linear.
    return torch.mm(x, weight.t()) if offset is None else torch.addmm(offset, x, weight.t())


class _ExactLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        (upstream,) = gradients
        d_x = d_weight = None
        with without_autocast(upstream):  # whoever calls backward() inside autocast
            if ctx.needs_input_grad[0]:
                d_x = exact_linear(upstream, weight.T).to(x.dtype)  # [N, K]
            if ctx.needs_input_grad[1]:
                d_weight = exact_linear(upstream.T, x.T).to(weight.dtype)  # [n, K]
        return d_x, d_weight


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The sum of the products of parts, the smallest first."""
    weights, n = _split(weight), weight.shape[0]
    stacked = torch.cat(weights)  # [3n, K]
    products = []  # each with how many times 2^-8 it is smaller
    for i, part in enumerate(_split(x)):
        several = F.linear(part, stacked[: (3 - i) * n])  # [N, up to 3n]
        products += [(i + j, product) for j, product in enumerate(several.split(n, dim=1))]
    smallest_first = sorted(products, key=lambda product: -product[0])
    return functools.reduce(torch.add, (product for _, product in smallest_first))


def _split(x: Tensor) -> list[Tensor]:
    """fp32 tensors of 8-bit numbers that add up to x, the largest first."""
    rest, parts = x.float(), []
    for _ in range(PARTS.get(x.dtype, 3) - 1):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return [*parts, rest]

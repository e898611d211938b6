"""The folds across rounds: products of weights that stand in for the base projections of every later round.

x_t = x_1 + W_g H_t with H_t = h_1 + ... + h_{t-1}, so W x_t = W x_1 + (W W_g) H_t for every W that reads x. And all but
the last y_t are only read by the GRU, so its input is (W^y W_D) c_t + (W^y s B_D) z_t. Both are identities.

The GRU is widened to a multiple of 16 with units whose weights are zero: nothing reads them, and the inner dimension
of every product suits the hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.weights import GRUWeights, LayerWeights

ALIGNMENT = 16


def padded(width: int) -> int:
    """``width`` rounded up to a multiple of `ALIGNMENT`."""
    return -(-width // ALIGNMENT) * ALIGNMENT


class Fold(NamedTuple):
    """What the later rounds compute with; G' is the padded GRU width. In the compute dtype, the router's in fp32.

    Attributes:
        gate, up: W_G W_g and W_U W_g (M of the design), [F, G'] each.
        low_gate, low_up: A W_g of all experts, [n*r, G'] each.
        router: R W_g, [n, G'].
        inputs: W^y W_D (Q), [3G', F]; with ``candidate_input="hidden_state"`` without its last third, [2G', F].
        inputs_low: W^y s B_D, [3G' or 2G', n*r].
        inputs_bias: W^y b_D, [3G' or 2G'], or None for an MLP whose down projection has no bias.
        recurrent_gates: [2G', G']; recurrent_candidate: [G', G']; candidate_bias: [G'].
        output: W_g, [D, G'].
        candidate_x, candidate_state: W_o^x [G', D] and W_o^x W_g [G', G'] with ``candidate_input="hidden_state"``.
    """

    gate: Tensor
    up: Tensor
    low_gate: Tensor
    low_up: Tensor
    router: Tensor
    inputs: Tensor
    inputs_low: Tensor
    inputs_bias: Tensor | None
    recurrent_gates: Tensor
    recurrent_candidate: Tensor
    candidate_bias: Tensor
    output: Tensor
    candidate_x: Tensor | None
    candidate_state: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Those that are there, in order."""
        return [t for t in self if t is not None]


def widen(gru: GRUWeights) -> GRUWeights:
    """The same GRU with its width padded to a multiple of 16 by units of zero weight that nothing reads."""
    width = gru.width
    extra = padded(width) - width
    if extra == 0:
        return gru

    def gate(w: Tensor) -> Tensor:
        recurrent, reads = w[:, :width], w[:, width:]
        return F.pad(torch.cat([F.pad(recurrent, (0, extra)), reads], dim=1), (0, 0, 0, extra))

    return GRUWeights(
        gate(gru.update),
        gate(gru.reset),
        gate(gru.candidate),
        F.pad(gru.candidate_bias, (0, extra)),
        F.pad(gru.output, (0, extra)),
    )


class FoldSettings(NamedTuple):
    """What a fold depends on besides the weights; ``dtype`` is the compute dtype, that of the activations."""

    dtype: torch.dtype
    scale: float
    candidate_input: str


def build_fold(weights: LayerWeights, settings: FoldSettings) -> Fold:
    """The fold of a layer's weights, differentiable in all of them. Products accumulate in fp32 at least.

    The sources may have other dtypes than the fold (fp32 adapters on a bf16 base).

    Raises:
        ValueError: a layer without GRU has no later rounds to fold.
    """
    if weights.gru is None:
        raise ValueError("there is nothing to fold in a layer without GRU (rounds=1)")
    base, router, experts = weights.base.dense(), weights.router, weights.experts
    gru, dtype = widen(weights.gru), settings.dtype
    with torch.autocast(router.device.type, enabled=False):
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # Copies, where a cast may change nothing: a kept fold is written into, and must not be a weight itself.
        out = gru.output.to(dtype, copy=True)  # [D, G']
        columns = gru.input_columns()  # [3G', D], W^y
        candidate_x = candidate_state = None
        if settings.candidate_input == "hidden_state":
            columns, reads_x = columns.split([2 * out.shape[1], out.shape[1]])
            candidate_x = reads_x.to(dtype)
            candidate_state = candidate_x @ out
        columns = columns.to(dtype)
        return Fold(
            gate=base.gate.to(dtype) @ out,
            up=base.up.to(dtype) @ out,
            low_gate=experts.gate_A.flatten(0, 1).to(dtype) @ out,
            low_up=experts.up_A.flatten(0, 1).to(dtype) @ out,
            router=router.to(exact) @ gru.output.to(exact),
            inputs=columns @ base.down.to(dtype),
            inputs_low=columns @ (settings.scale * rounds.wide_B(experts.down_B)).to(dtype),
            inputs_bias=None if base.down_bias is None else columns @ base.down_bias.to(dtype),
            recurrent_gates=gru.recurrent_gates().to(dtype),
            recurrent_candidate=gru.recurrent_candidate().to(dtype, copy=True),
            candidate_bias=gru.candidate_bias.clone(),
            output=out,
            candidate_x=candidate_x,
            candidate_state=candidate_state,
        )

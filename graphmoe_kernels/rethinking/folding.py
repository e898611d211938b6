"""The fold of a layer: its weights as the operators take them, and products that stand in for the base projections.

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
from torch.utils.checkpoint import checkpoint

from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.rethinking.checks import check_weights
from graphmoe_kernels.rethinking.prepared import PreparedExperts, prepare_experts
from graphmoe_kernels.rethinking.weights import BaseMLP, GRUWeights, LayerWeights

ALIGNMENT = 16


def padded(width: int) -> int:
    """``width`` rounded up to a multiple of `ALIGNMENT`."""
    return -(-width // ALIGNMENT) * ALIGNMENT


class RoundsFold(NamedTuple):
    """What the later rounds compute with; G' is the padded GRU width. In the compute dtype, the router's in fp32.

    Attributes:
        gate, up: W_G W_g and W_U W_g (M of the design), [F, G'] each. With mixed experts beside their B, [F, G' + 2nr],
            unless DoRA's vectors come between.
        reread: [2nr + 2G', 2G'], what a GRU step's h and H, side by side, are multiplied with: A W_g of all experts
            reads H, W_z over W_r reads h. One product instead of two, for a few zeros.
        router: R W_g of the routers that read x: [n, G'], [2n, G'] where every linear has one, None without any.
        inputs: W^y W_D (Q), [3G', F]; with ``candidate_input="hidden_state"`` without its last third, [2G', F]. With
            DoRA, whose vectors stand between the two, W^y alone, [3G' or 2G', D].
        inputs_low: W^y s B_D, [3G' or 2G', n*r], or None with DoRA.
        inputs_bias: W^y b_D, [3G' or 2G'], or None with DoRA and for an MLP whose down projection has no bias.
        candidate_weight: the state's columns of W_o, [G', G']; candidate_bias: [G'].
        output: W_g, [D, G'].
        candidate_x, candidate_state: W_o^x [G', D] and W_o^x W_g [G', G'] with ``candidate_input="hidden_state"``.
    """

    gate: Tensor
    up: Tensor
    reread: Tensor
    router: Tensor | None
    inputs: Tensor
    inputs_low: Tensor | None
    inputs_bias: Tensor | None
    candidate_weight: Tensor
    candidate_bias: Tensor
    output: Tensor
    candidate_x: Tensor | None
    candidate_state: Tensor | None


class Fold(NamedTuple):
    """A layer's prepared experts, and the fold of its later rounds if it has any."""

    experts: PreparedExperts
    later: RoundsFold | None

    def tensors(self) -> list[Tensor]:
        """Those that are there, in order."""
        return [t for t in (*self.experts, *(self.later or ())) if t is not None]


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


def build_fold(weights: LayerWeights, settings: FoldSettings, copy: bool = False) -> Fold:
    """The fold of a layer's weights, differentiable in all of them. Products accumulate in fp32 at least.

    The sources may have other dtypes than the fold (fp32 adapters on a bf16 base). With ``copy`` no tensor of the fold
    shares memory with a source: a fold that is kept is written into later.

    Raises:
        TypeError, ValueError: weights that are no layer's, as `graphmoe_kernels.rethink` raises them.
    """
    check_weights(weights)
    with torch.autocast(weights.experts.gate_A.device.type, enabled=False):
        experts = prepare_experts(weights, settings.dtype, settings.scale, copy)
        if weights.gru is None:
            return Fold(experts, None)
        return Fold(experts, _fold_rounds(weights, weights.gru, experts, settings, copy))


def _fold_rounds(
    weights: LayerWeights, gru: GRUWeights, experts: PreparedExperts, settings: FoldSettings, copy: bool
) -> RoundsFold:
    down_bias, router, dtype = weights.base.biases()[2], weights.input_router(), settings.dtype
    gru = widen(gru)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    out = gru.output.to(dtype, copy=copy)  # [D, G']
    width = out.shape[1]
    columns = gru.input_columns()  # [3G', D], W^y
    candidate_x = candidate_state = None
    if settings.candidate_input == "hidden_state":
        columns, reads_x = columns.split([2 * width, width])
        candidate_x = reads_x.to(dtype, copy=copy)
        candidate_state = candidate_x @ out
    columns = columns.to(dtype)
    dora = experts.down_scale is not None
    reads_total = F.pad(experts.low_A @ out, (width, 0))  # [2nr, 2G']
    reads_last = F.pad(gru.recurrent_gates().to(dtype), (0, width))  # [2G', 2G']
    gate, up, inputs = _with_base(weights.base, out, None if dora else columns)
    if weights.down_router is not None and not dora:
        gate, up = torch.cat([gate, experts.gate_B], dim=1), torch.cat([up, experts.up_B], dim=1)
    return RoundsFold(
        gate=gate,
        up=up,
        reread=torch.cat([reads_total, reads_last]),
        router=None if router is None else exact_linear(router.to(exact), gru.output.to(exact).T),
        inputs=columns if inputs is None else inputs,
        inputs_low=None if dora else columns @ experts.down_B,
        inputs_bias=None if dora or down_bias is None else columns @ down_bias.to(dtype),
        candidate_weight=gru.recurrent_candidate().to(dtype, copy=True),
        candidate_bias=gru.candidate_bias.clone() if copy else gru.candidate_bias,
        output=out,
        candidate_x=candidate_x,
        candidate_state=candidate_state,
    )


def _with_base(base: BaseMLP, out: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The products of the base's weights: W_G and W_U with ``out`` [D, G'], and ``columns`` [3G', D] with W_D if given.

    Autograd would keep weights that are made dense for this until the backward pass, all layers' at once; they are made
    again there instead.
    """
    kept = base.stores_dense() or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if kept or not (out.requires_grad or (columns is not None and columns.requires_grad)):
        return _products(base, out, columns)
    products: tuple[Tensor, Tensor, Tensor | None] = checkpoint(
        _products, base, out, columns, use_reentrant=False, preserve_rng_state=False
    )
    return products


def _products(base: BaseMLP, out: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dense, dtype = base.dense(), out.dtype
    inputs = None if columns is None else columns @ dense.down.to(dtype)
    return dense.gate.to(dtype) @ out, dense.up.to(dtype) @ out, inputs

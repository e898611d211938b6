"""The fold of a layer: its weights as the operators take them, and products that stand in for the base projections.

x_t = x_1 + W_g H_t with H_t = h_1 + ... + h_{t-1}, so W x_t = W x_1 + (W W_g) H_t for every W that reads x. And all but
the last y_t are only read by the GRU, so its input is (W^y W_D) c_t + (W^y s B_D) z_t. Both are identities.

The GRU is the padded one (`GRUWeights.padded`), so that the inner dimension of every product suits the hardware.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.experts.operands import GateUp
from graphmoe_kernels.rethinking.checks import check_weights
from graphmoe_kernels.rethinking.down import Down, RoundOutput, add_product
from graphmoe_kernels.rethinking.kinds import CastExperts, LayerWeights
from graphmoe_kernels.rethinking.weights import BaseMLP, GRUWeights, padded
from graphmoe_kernels.structures import tensors_in


class HiddenStateReader(NamedTuple):
    """The candidate's reading of x_t, W_o^x x_t, with ``candidate_input="hidden_state"``.

    Attributes:
        x: W_o^x, [G', D]; total: W_o^x W_g, [G', G'], which reads H.
    """

    x: Tensor
    total: Tensor

    def read(self, x: Tensor, total: Tensor | None) -> Tensor:
        """Give [N, G'] for the first round's x [N, D] and H [N, G'], None in the first round."""
        candidate = F.linear(x, self.x)
        return candidate if total is None else add_product(candidate, total, self.total)


class RoundsFold(NamedTuple):
    """What the later rounds compute with; G' is the padded GRU width. In the compute dtype, the router's in fp32.

    Attributes:
        update: W_G W_g and W_U W_g (M of the design), [F, G'] each, as `CastExperts.fold_update` makes it.
        routers: R W_g of the routers that read x, in the order of `ExpertKind.routers`.
        reader: with what the GRU reads the experts, of `Down.fold`.
        hidden_state: what its candidate reads of x_t instead, if it does.
        reread: [2nr + 2G', 2G'], what a GRU step's h and H, side by side, are multiplied with: A W_g of all experts
            reads H, W_z over W_r reads h. One product instead of two, for a few zeros.
        candidate_weight: the state's columns of W_o, [G', G']; candidate_bias: [G'].
        output: W_g, [D, G'].
    """

    update: GateUp
    routers: tuple[Tensor, ...]
    reader: Any
    hidden_state: HiddenStateReader | None
    reread: Tensor
    candidate_weight: Tensor
    candidate_bias: Tensor
    output: Tensor

    @property
    def reread_widths(self) -> tuple[int, int]:
        """2nr and 2G'."""
        rows, width = self.reread.shape
        return rows - width, width

    @property
    def state_widths(self) -> tuple[int, int]:
        """G', twice: h beside H."""
        width = self.candidate_bias.shape[0]
        return width, width

    def read(self, out: RoundOutput, x: Tensor, total: Tensor | None, base: BaseMLP, down: Down) -> Tensor:
        """Give the GRU's input [N, 3G'] after a round; ``total`` is H [N, G'] of its x_t, None in the first."""
        inputs = down.read(self.reader, out, base)
        if self.hidden_state is None:
            return inputs
        return torch.cat([inputs, self.hidden_state.read(x, total)], dim=1)


class Fold(NamedTuple):
    """A layer's experts in the compute dtype, and the fold of its later rounds if it has any."""

    experts: CastExperts
    later: RoundsFold | None

    def tensors(self) -> list[Tensor]:
        """All of them, in order; the first is in the compute dtype."""
        return tensors_in(self)


class FoldSettings(NamedTuple):
    """What a fold depends on besides the weights; ``dtype`` is the compute dtype, that of the activations."""

    dtype: torch.dtype
    scale: float
    candidate_input: str


def cast_experts(weights: LayerWeights, dtype: torch.dtype, scale: float, copy: bool = False) -> CastExperts:
    """Cast and join a layer's experts for the operators, differentiably; with ``copy`` nothing is shared with them."""
    return weights.experts.cast(weights.base, dtype, scale, copy)


def build_fold(weights: LayerWeights, settings: FoldSettings, copy: bool = False) -> Fold:
    """The fold of a layer's weights, differentiable in all of them. Products accumulate in fp32 at least.

    The sources may have other dtypes than the fold (fp32 adapters on a bf16 base). With ``copy`` no tensor of the fold
    shares memory with a source: a fold that is kept is written into later.

    Raises:
        TypeError, ValueError: weights that are no layer's, as `graphmoe_kernels.rethink` raises them.
    """
    check_weights(weights)
    with without_autocast(weights.experts.lora.gate_A):
        experts = cast_experts(weights, settings.dtype, settings.scale, copy)
        if weights.gru is None:
            return Fold(experts, None)
        return Fold(experts, _fold_rounds(weights, weights.gru, experts, settings, copy))


def _fold_rounds(
    weights: LayerWeights, gru: GRUWeights, experts: CastExperts, settings: FoldSettings, copy: bool
) -> RoundsFold:
    dtype, own, width = settings.dtype, gru.padded(), padded(gru.width)
    output = own.output.to(dtype, copy=copy)  # [D, G']
    columns, hidden_state = own.input_columns, None  # [3G', D], W^y
    if settings.candidate_input == "hidden_state":
        columns, reads_x = columns.split([2 * width, width])
        reads_x = reads_x.to(dtype, copy=copy)
        hidden_state = HiddenStateReader(reads_x, reads_x @ output)
    products, reader = experts.down.fold(weights.base, output, columns.to(dtype), copy)
    reads_total = F.pad(experts.low_A @ output, (width, 0))  # [2nr, 2G']
    reads_last = F.pad(own.recurrent_gates.to(dtype), (0, width))  # [2G', 2G']
    return RoundsFold(
        update=experts.fold_update(products),
        routers=weights.experts.fold_routers(own.output, dtype),
        reader=reader,
        hidden_state=hidden_state,
        reread=torch.cat([reads_total, reads_last]),
        candidate_weight=own.recurrent_candidate.to(dtype, copy=True),
        candidate_bias=own.candidate_bias.clone() if copy else own.candidate_bias,
        output=output,
    )

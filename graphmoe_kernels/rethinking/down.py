"""What comes after a round's SwiGLU: the output, and what the GRU reads of it in a folded round.

Without DoRA all slots share the base's down projection, which runs once on their sum, and a folded round needs none at
all. DoRA scales what the projection gives by a vector of each expert: it then runs once per slot, and the GRU reads the
output itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graphmoe_kernels.dora import scaled_by
from graphmoe_kernels.experts.operands import GateUp
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.weights import ALIGNMENT, BaseMLP


class RoundOutput(NamedTuple):
    """A round's experts before the down projection.

    Attributes:
        hidden: what the base down projection reads, [N, F] each: all slots together, or with DoRA one by one.
        low_down: [N, n*r], what B of the down projection reads.
        changes: with DoRA one for each ``hidden``: by how much more than once its projection counts, [N, D].
        weight_sum: [N, 1], sum_j w_j, or None where it is 1 by construction.
        logits: of all routers, in the order of `ExpertKind.routers`.
        both: [N, F + n*r], the one ``hidden`` beside ``low_down``, where they are its columns, or None.
    """

    hidden: tuple[Tensor, ...]
    low_down: Tensor
    changes: tuple[Tensor, ...]
    weight_sum: Tensor | None
    logits: tuple[Tensor, ...]
    both: Tensor | None = None


class Down(Protocol):
    """The down projection of experts with or without DoRA."""

    def output(self, base: BaseMLP, out: RoundOutput) -> Tensor:
        """Give y [N, D] of a round."""
        ...

    def fold(self, base: BaseMLP, output: Tensor, columns: Tensor, keep: bool) -> tuple[GateUp, Any]:
        """Multiply the base's weights W_G and W_U with W_g [D, G'], and make of W^y [3G' or 2G', D] what `read` takes:
        its product with W_D where there is one. ``keep``: it is for many calls, and for no backward.
        """
        ...

    def read(self, reader: Any, out: RoundOutput, base: BaseMLP) -> Tensor:
        """Give what the GRU reads of a folded round: W^y y, [N, 3G'] or, where the candidate reads x, [N, 2G']."""
        ...


class PlainDown(NamedTuple):
    """Experts without DoRA: y = W_D c + s B_D z + (sum_j w_j) b_D for the combined hidden c.

    Attributes:
        B: s B_D of all experts side by side, [D, n*r].
        bias: [D] or None, the base down projection's.
    """

    B: Tensor
    bias: Tensor | None

    def output(self, base: BaseMLP, out: RoundOutput) -> Tensor:
        with named_range("mlp"):
            y = base.project_out(out.hidden[0])
        with named_range("experts"):
            y = add_product(y, out.low_down, self.B)
        if self.bias is None or out.weight_sum is None:
            return y
        # project_out added the bias once; unnormalised weights do not sum to one
        return y + (out.weight_sum.to(y.dtype) - 1) * self.bias.to(y.dtype)

    def fold(
        self, base: BaseMLP, output: Tensor, columns: Tensor, keep: bool
    ) -> tuple[GateUp, HiddenReader | JoinedReader]:
        *products, inputs = _with_base(base, output, columns)
        inputs_low, bias = columns @ self.B, None if self.bias is None else columns @ self.bias
        if keep and inputs_low.shape[1] % ALIGNMENT == 0:  # else rows would not be aligned
            return GateUp(*products), JoinedReader(torch.cat([inputs, inputs_low], dim=1), bias)
        return GateUp(*products), HiddenReader(inputs, inputs_low, bias)

    def read(self, reader: HiddenReader | JoinedReader, out: RoundOutput, base: BaseMLP) -> Tensor:
        inputs = reader.product(out)
        if reader.inputs_bias is None:
            return inputs
        if out.weight_sum is None:
            return inputs + reader.inputs_bias
        return inputs + out.weight_sum.to(inputs.dtype) * reader.inputs_bias


class ScaledDown(NamedTuple):
    """Experts with DoRA: y is the sum over slots of each one's scaled W_D c.

    Attributes:
        B: s m B_D of all experts side by side, [D, n*r].
        bias: [D] or None, the base down projection's.
        change: DoRA's m / ||W + s B A|| - 1, [n, D], in fp32 at least.
    """

    B: Tensor
    bias: Tensor | None
    change: Tensor

    def output(self, base: BaseMLP, out: RoundOutput) -> Tensor:
        parts = []
        for hidden, change in zip(out.hidden, out.changes, strict=True):
            with named_range("mlp"):
                part = base.project_out(hidden)
            if self.bias is not None:
                part = part - self.bias.to(part.dtype)
            parts.append(scaled_by(part, change))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        with named_range("experts"):
            y = add_product(total, out.low_down, self.B)
        if self.bias is None:
            return y
        bias = self.bias.to(y.dtype)
        return y + (bias if out.weight_sum is None else out.weight_sum.to(y.dtype) * bias)

    def fold(self, base: BaseMLP, output: Tensor, columns: Tensor, keep: bool) -> tuple[GateUp, Tensor]:
        # DoRA's vectors stand between W^y and W_D, so that there is no product of the two: W^y reads y itself.
        return GateUp(*_with_base(base, output)), columns

    def read(self, reader: Tensor, out: RoundOutput, base: BaseMLP) -> Tensor:
        return F.linear(self.output(base, out), reader)


class HiddenReader(NamedTuple):
    """What makes W^y y of what the down projection would read.

    Attributes:
        inputs: W^y W_D (Q), [3G', F]; [2G', F] where the candidate reads x.
        inputs_low: W^y s B_D, [3G' or 2G', n*r].
        inputs_bias: W^y b_D, [3G' or 2G'], or None for an MLP whose down projection has no bias.
    """

    inputs: Tensor
    inputs_low: Tensor
    inputs_bias: Tensor | None

    def product(self, out: RoundOutput) -> Tensor:
        """Give W^y of a round's output without its bias."""
        return add_product(F.linear(out.hidden[0], self.inputs), out.low_down, self.inputs_low)


class JoinedReader(NamedTuple):
    """A `HiddenReader` that is kept: its matrices side by side, so that what is side by side is read by one product.

    Attributes:
        inputs: Q beside W^y s B_D, [3G' or 2G', F + n*r].
        inputs_bias: as there.
    """

    inputs: Tensor
    inputs_bias: Tensor | None

    def product(self, out: RoundOutput) -> Tensor:
        """Give W^y of a round's output without its bias."""
        if out.both is not None:
            return F.linear(out.both, self.inputs)
        hidden, low_down = out.hidden[0], out.low_down
        inputs, inputs_low = self.inputs.split_with_sizes((hidden.shape[1], low_down.shape[1]), dim=1)
        return add_product(F.linear(hidden, inputs), low_down, inputs_low)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x weight^T, written to y: a fresh tensor that nothing else reads."""
    dtype = y.dtype
    if x.dtype is not dtype or weight.dtype is not dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    return y.addmm_(x, weight.t())


def _with_base(base: BaseMLP, output: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """The products of the base's weights: W_G and W_U with ``output`` [D, G'], and ``columns`` [3G', D] with W_D.

    Autograd would keep weights that are made dense for this until the backward pass, all layers' at once; they are made
    again there instead.
    """
    kept = base.stores_dense() or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if kept or not any(t.requires_grad for t in (output, *columns)):
        return _products(base, output, *columns)
    products: tuple[Tensor, ...] = checkpoint(
        _products, base, output, *columns, use_reentrant=False, preserve_rng_state=False
    )
    return products


def _products(base: BaseMLP, output: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    dense, dtype = base.dense(), output.dtype
    inputs = [own @ dense.down.to(dtype) for own in columns]
    return dense.gate.to(dtype) @ output, dense.up.to(dtype) @ output, *inputs

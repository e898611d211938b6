"""The folds across rounds: products of weights that stand in for the base projections of every later round.

x_t = x_1 + W_g H_t with H_t = h_1 + ... + h_{t-1}, so W x_t = W x_1 + (W W_g) H_t for every W that reads x. And all but
the last y_t are only read by the GRU, so its input is (W^y W_D) c_t + (W^y s B_D) z_t. Both are identities.

The GRU is widened to a multiple of 16 with units whose weights are zero: nothing reads them, and the inner dimension
of every product suits the hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.weights import DenseMLP, ExpertWeights, GRUWeights, RethinkingSpec

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


def build_fold(
    base: DenseMLP, router: Tensor, experts: ExpertWeights, gru: GRUWeights, spec: RethinkingSpec, dtype: torch.dtype
) -> Fold:
    """The fold of these weights, differentiable in all of them. Products accumulate in fp32 at least.

    ``dtype`` is the compute dtype, that of the activations; the sources may have others (fp32 adapters on a bf16 base).
    """
    gru = widen(gru)
    with torch.autocast(router.device.type, enabled=False):
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        out = gru.output.to(dtype)  # [D, G']
        columns = gru.input_columns()  # [3G', D]
        candidate_x = candidate_state = None
        if spec.candidate_input == "hidden_state":
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
            inputs_low=columns @ (spec.scale * rounds.wide_B(experts.down_B)).to(dtype),
            inputs_bias=None if base.down_bias is None else columns @ base.down_bias.to(dtype),
            recurrent_gates=gru.recurrent_gates().to(dtype),
            recurrent_candidate=gru.recurrent_candidate().to(dtype),
            candidate_bias=gru.candidate_bias,
            output=out,
            candidate_x=candidate_x,
            candidate_state=candidate_state,
        )


Source = tuple[int, int, torch.dtype, torch.device, tuple[int, ...]]


def fingerprint(tensors: list[Tensor | None]) -> tuple[Source | None, ...]:
    """What tells these tensors, as they are now, from any others: storage, version, dtype, device, shape.

    A write through ``.data`` moves none of it; see `FoldCache.drop`.
    """
    return tuple(
        None if t is None else (t.data_ptr(), t._version, t.dtype, t.device, tuple(t.shape)) for t in tensors
    )


class FoldCache:
    """One layer's fold for inference, rebuilt when any of its sources has changed.

    The sources are held, so that a freed tensor's address cannot come back as another tensor's.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._held: list[Tensor | None] = []
        self._fold: Fold | None = None

    def get(self, sources: list[Tensor | None], settings: tuple[object, ...], build: Callable[[], Fold]) -> Fold:
        """The fold for these ``sources`` under these ``settings``; ``build`` is called if there is none yet."""
        key = (settings, fingerprint(sources))
        if self._fold is None or key != self._key:
            self.drop()
            with torch.no_grad():
                self._fold = build()
            self._key, self._held = key, list(sources)
        return self._fold

    def drop(self) -> None:
        """Forget the fold (after a write that no version counter shows, or to free its memory)."""
        self._key, self._held, self._fold = None, [], None

    def __getstate__(self) -> dict[str, object]:
        """A cache is never pickled or deep-copied with its content: a copy's sources are other tensors."""
        return {"_key": None, "_held": [], "_fold": None}

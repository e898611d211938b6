"""The public expert operators: they check their operands, cast them to one dtype, and run them."""

from __future__ import annotations

from torch import Tensor

from graphmoe_kernels.activations import check_triton_form, get_activation
from graphmoe_kernels.backend import resolve_backend, without_autocast
from graphmoe_kernels.experts import checks
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.run import run_experts, run_swiglu
from graphmoe_kernels.experts.triton.sizes import check_offsets, check_sizes, inner, sizes
from graphmoe_kernels.structures import cast
from graphmoe_kernels.validation import check_number


def expert_swiglu(
    operands: ExpertOperands, *, scale: float, activation: str = "silu", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return hidden = sum_j w_j act(g_j) * u_j and low_down = sum_j w_j A_D,e_j (act(g_j) * u_j) over a token's slots.

    g_j = m_G,e_j * (P_G + H M_G^T + s B_G,e_j a_G,e_j) + b_G, u_j likewise, with P the pre-activations, (H, M) the
    update, a the low-rank activations, m the scale vectors and b the biases: the experts of MixLoRA, with their outputs
    combined before the (linear, shared) down projection. The caller gets y = W_D hidden + s B_D low_down.

    Args:
        operands: see `ExpertOperands`. As to expert ids: on a CPU ``"torch"`` and ``"reference"`` refuse those that are
            none and those that stand twice in a row. ``"torch"`` on a GPU, and Triton, do not read them: there such an
            id makes its token NaN.
        scale: s = alpha / r, which is 1 for few adapters: it has no default.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        backend: see `graphmoe_kernels.backend`. Triton takes F * G and F * r below 2^31, and k times r (rounded up to a
            power of two, at least 16) up to 256.

    Returns:
        hidden [N, F] and low_down [N, n*r] in the dtype of ``pre_activations.gate``. Operands of another float dtype
        are cast to it, all but routing weights and scale vectors. Row strides of activations are free; all else is made
        contiguous.

    Raises:
        TypeError: operands of other types than `ExpertOperands` names, what is no dense tensor of fp64, fp32, fp16 or
            bf16, ids that are no integers, a scale or dropout that is no number.
        ValueError: shapes that do not belong together, F = 0, tensors on several devices, a scale that is not finite,
            dropout outside [0, 1), a bias that wants a gradient, an unknown activation, a backend that cannot run this;
            where ids are read, one outside of 0..n-1 or twice in a row.
    """
    get_activation(activation)
    check_number("scale", scale)
    checks.check_operands(operands)
    gate = operands.pre_activations.gate
    resolved = resolve_backend(backend, "pre_activations.gate", gate)
    if resolved == "triton":
        check_sizes(sizes(operands), inner(operands.update), activation)
    dropout = operands.dropout
    if dropout is not None:
        operands = operands._replace(dropout=None if dropout.rate == 0 else dropout._replace(rate=float(dropout.rate)))
    with without_autocast(gate):
        return run_experts(operands.cast(), float(scale), activation, resolved)


def swiglu(
    pre_activations: GateUp, update: LowRankUpdate | None = None, *, activation: str = "silu", backend: str = "auto"
) -> Tensor:
    """Return hidden = act(P_G + H M_G^T) * (P_U + H M_U^T), [N, F]: what `expert_swiglu` computes without experts.

    The update is added tile by tile and never stored. Experts that are mixed inside a linear come in here: once their
    low-rank activations are multiplied with the routing weights, they are an update that all tokens share.

    Args:
        pre_activations: P, [N, F] each.
        update: H [N, G], M_G and M_U [F, G], or None.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        backend: see `graphmoe_kernels.backend`. Triton takes F * G below 2^31.

    Returns:
        [N, F] in the dtype of ``pre_activations.gate``, to which the others are cast.

    Raises:
        TypeError: operands of other types, what is no dense tensor of fp64, fp32, fp16 or bf16.
        ValueError: shapes that do not belong together, F = 0, tensors on several devices, an unknown activation, a
            backend that cannot run this.
    """
    get_activation(activation)
    checks.check_shared(pre_activations, update)
    gate = pre_activations.gate
    resolved = resolve_backend(backend, "pre_activations.gate", gate)
    if resolved == "triton":
        check_triton_form(activation)
        check_offsets(gate.shape[1], inner(update))
    with without_autocast(gate):
        return run_swiglu(cast(pre_activations, gate.dtype), cast(update, gate.dtype), activation, resolved)

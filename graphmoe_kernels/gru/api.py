"""`gru_step`: what it promises, and what it refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphmoe_kernels.backend import TRITON_DTYPES, resolve_backend, without_autocast
from graphmoe_kernels.gru.run import run_gru_step
from graphmoe_kernels.structures import cast
from graphmoe_kernels.validation import agreed, check_choice, check_floats, check_shapes

CANDIDATE_ACTIVATIONS = ("sigmoid", "tanh")
_NAMES = ("inputs", "recurrent", "state", "total", "candidate_weight", "candidate_bias")


def gru_step(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    *,
    candidate_activation: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """Return one step h -> h' of the rethinking GRU (GraphMoE, Eq. 5 and 6), and the running sum of its states.

    With u = ``inputs`` split in three and v = ``recurrent`` split in two, z = sigmoid(u_z + v_z),
    q = sigmoid(u_r + v_r), c = sigma(u_o + W_o (q * h) + b_o), h' = (1 - z) * h + z * c and H' = H + h'. Gates, state
    update and sum run in fp32 at least; q * h is rounded to the dtype of ``inputs`` before its product.

    The gates' own product with the state is left to the caller, who can merge it with others that read the state. In
    the first round h = 0 and H = 0: ``recurrent``, ``state`` and ``total`` are None, all three.

    Args:
        inputs: [N, 3G], what the gates read from outside, in the order update, reset, candidate. Its dtype is the
            operator's: tensors of another floating dtype are cast to it (the bias is read as it is).
        recurrent: [N, 2G], W_z h beside W_r h, or None.
        state: [N, G], h, or None.
        total: [N, G], H, the sum of the states before h', or None.
        candidate_weight: [G, G], the state's columns of W_o.
        candidate_bias: [G].
        candidate_activation: ``"sigmoid"`` (as the paper writes) or ``"tanh"``.
        backend: see `graphmoe_kernels.backend`.

    Returns:
        [N, 2G] in the dtype of ``inputs``: h' beside H'. One tensor, because one product reads both.

    Raises:
        TypeError: what is no dense tensor of fp64, fp32, fp16 or bf16.
        ValueError: shapes that do not belong together, some but not all of ``recurrent``, ``state`` and ``total``,
            tensors on several devices, an unknown activation or backend.
    """
    check_candidate_activation(candidate_activation)
    check_floats("inputs", inputs)
    backend = resolve_backend(backend, "inputs", inputs)
    _check(inputs, recurrent, state, total, candidate_weight, candidate_bias)
    recurrent, state, total = (cast(tensor, inputs.dtype) for tensor in (recurrent, state, total))
    weight = cast(candidate_weight, inputs.dtype)
    bias = candidate_bias if candidate_bias.dtype in TRITON_DTYPES or backend != "triton" else candidate_bias.float()
    with without_autocast(inputs):
        return run_gru_step(inputs, recurrent, state, total, weight, bias, candidate_activation, backend)


def check_candidate_activation(name: object) -> None:
    """`ValueError` for a name that is no candidate activation's."""
    check_choice("candidate_activation", name, CANDIDATE_ACTIVATIONS)


def _check(*tensors: Any) -> None:
    """The exceptions of `gru_step` that tell of its tensors."""
    inputs, *before, weight, bias = tensors
    missing = [name for name, tensor in zip(_NAMES[1:], before, strict=False) if tensor is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"{' and '.join(missing)} missing: recurrent, state and total are given together, or all None in the first "
            "round"
        )
    check_floats("candidate_bias", bias)
    if bias.dim() != 1 or len(bias) == 0:
        raise ValueError(f"candidate_bias must be [G], the GRU's width of at least 1; got {list(bias.shape)}")
    N = agreed((inputs, 0), *((tensor, 0) for tensor in before))
    G = agreed((bias, 0), (weight, 0), (weight, 1))
    later = (None, None, None) if missing else ((N, 2 * G), (N, G), (N, G))
    shapes = ((N, 3 * G), *later, (G, G), (G,))

    def told() -> str:
        return f"a GRU of width {G} (by candidate_bias and candidate_weight)"

    check_shapes(
        "",
        _NAMES,
        tensors,
        shapes,
        lambda: f"a GRU of width {G} (by candidate_bias and candidate_weight)",
        ("inputs", inputs),
    )

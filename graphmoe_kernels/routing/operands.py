"""What routing gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """What the router decided for N tokens over n experts.

    Attributes:
        routing_weights: [N, k] fp32 (fp64 for fp64 logits), differentiable.
        expert_ids: [N, k] integer (int32 from Triton, else int64), distinct within a row, by falling probability.
        logits: [N, n] fp32 (fp64 where routing ran in it), differentiable.
        tokens_per_expert: [n], how many counted tokens chose each expert; None unless statistics were asked for.
        probability_sums: [n], differentiable; each expert's routing probability summed over the counted tokens, from
            the top-k entries alone (``statistics="topk"``, the paper's Eq. 8) or from the whole softmax (``"full"``).
    """

    routing_weights: Tensor
    expert_ids: Tensor
    logits: Tensor
    tokens_per_expert: Tensor | None = None
    probability_sums: Tensor | None = None

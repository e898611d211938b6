"""What a load-balance loss reads: the sums of one router's rounds, and those of all processes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RoutingStatistics(NamedTuple):
    """What Eq. 8 reads of one router's rounds.

    Attributes:
        tokens_per_expert: [T, n], how many tokens chose each expert; where routing is dense, all of them.
        probability_sums: [T, n], differentiable; each expert's routing probability summed over tokens (the top-k
            entries alone for the paper's loss, the full softmax for the switch form).
        num_tokens: scalar tensor, how many tokens were counted (padding is not).
    """

    tokens_per_expert: Tensor
    probability_sums: Tensor
    num_tokens: Tensor


class GlobalRouting(NamedTuple):
    """One forward's routing on all processes; R routers, one for each time that a router runs in a forward.

    Attributes:
        statistics: of each of the R routers, as of one process with all tokens; the probability sums have the gradient
            that `graphmoe_model.routing.global_routing` describes.
        coefficients: of each of the R routers, the weight of its loss in the model's.
        ran: [R] tensor, on how many processes the router ran.
        share: scalar tensor, the mean weight of the router loss in ``outputs.loss``.
    """

    statistics: list[RoutingStatistics]
    coefficients: list[float]
    ran: Tensor
    share: Tensor

    def detach(self) -> GlobalRouting:
        """Return the same numbers without the graph behind them."""
        own = [each._replace(probability_sums=each.probability_sums.detach()) for each in self.statistics]
        return self._replace(statistics=own)

"""What a load-balance loss reads: the sums of one router's rounds, and those of all processes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RoutingStatistics(NamedTuple):
    """What Eq. 8 reads of one router's rounds.

    Attributes:
        counts: [T, n], tokens that chose each expert; where routing is dense, all of them.
        mass: [T, n], differentiable; the routing probability each expert got, summed over tokens (top-k entries for
            the paper's loss, full softmax for the switch form).
        tokens: scalar tensor, how many tokens were counted (padding is not).
    """

    counts: Tensor
    mass: Tensor
    tokens: Tensor


class GlobalRouting(NamedTuple):
    """One forward's routing on all processes; R routers, one for each time that a router runs in a forward.

    Attributes:
        statistics: [R], as of one process with all tokens; the mass has the gradient that the module describes.
        coefficients: [R], weight of each router's loss in the model's.
        ran: [R] tensor, on how many processes the router ran.
        share: scalar tensor, the mean weight of the router loss in ``outputs.loss``.
    """

    statistics: list[RoutingStatistics]
    coefficients: list[float]
    ran: Tensor
    share: Tensor

    def detach(self) -> GlobalRouting:
        """The same numbers without the graph behind them."""
        return self._replace(statistics=[own._replace(mass=own.mass.detach()) for own in self.statistics])

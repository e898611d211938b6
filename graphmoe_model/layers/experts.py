"""The experts' LoRA pairs as bare stacked parameters, and the routers that choose or mix them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphmoe_kernels import ExpertWeights, LinearRouters, Magnitudes, row_norms


def own_parameter(module: nn.Module, name: str) -> Any:
    """Read a module's parameter past ``nn.Module.__getattr__``, which takes longer than a small product.

    By its dictionary at every call, so that a parameter that was replaced is seen, and by its brackets, in which ZeRO-3
    gathers. What is None, or computed by a parametrisation, is found as it always is.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


class Router(nn.Module):
    """The router's weight [n, in], drawn from N(0, 0.02); its product runs in fp32 whatever the model's dtype."""

    def __init__(self, num_experts: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, in_features) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, n] in fp32 for x [N, in]."""
        return nn.functional.linear(x.float(), self.weight.float())


class LoRAPairs(nn.Module):
    """n LoRA pairs of rank r on one linear: A [n, r, in], B [n, out, r], with DoRA magnitude [n, out].

    A is drawn as ``nn.Linear`` draws its weight (kaiming uniform, a = sqrt 5); B is zero, or drawn too with
    ``zero_B=False`` (for tests that need every term to count). With ``router`` the linear mixes its experts by a router
    of its own, ``router.weight`` [n, in].
    """

    def __init__(
        self,
        num_experts: int,
        rank: int,
        in_features: int,
        out_features: int,
        *,
        zero_B: bool = True,
        dora: bool = False,
        router: bool = False,
    ) -> None:
        super().__init__()
        bound_A, bound_B = 1 / math.sqrt(in_features), 1 / math.sqrt(rank)
        self.A = nn.Parameter(torch.empty(num_experts, rank, in_features).uniform_(-bound_A, bound_A))
        self.B = nn.Parameter(torch.zeros(num_experts, out_features, rank))
        if not zero_B:
            nn.init.uniform_(self.B, -bound_B, bound_B)
        self.magnitude = nn.Parameter(torch.ones(num_experts, out_features)) if dora else None
        self.router = Router(num_experts, in_features) if router else None

    @torch.no_grad()
    def start_magnitudes(self, weight: Tensor, scale: float) -> None:
        """Set the magnitudes to the norms of the rows of W + s B A, so that DoRA changes nothing yet.

        They are kept in fp32 at least: in half precision an optimizer's steps would be too small to change them. A
        ``weight`` [out, in] without data (meta device) leaves them unset, for a checkpoint to fill.
        """
        if self.magnitude is None:
            return
        if weight.is_meta or self.A.is_meta:
            norms = self.magnitude.data.to(torch.promote_types(weight.dtype, torch.float32))
        else:
            norms = row_norms(weight, self.A, self.B, scale)
        self.magnitude = nn.Parameter(norms, requires_grad=self.magnitude.requires_grad)


class MLPExperts(nn.Module):
    """The experts of one MLP: LoRA pairs on gate, up and down.

    With ``routers="layer"`` an expert is the whole MLP with its own pairs on all three; with ``"linear"`` each linear
    mixes its own experts; with None there is one.
    """

    def __init__(
        self,
        num_experts: int,
        rank: int,
        hidden: int,
        intermediate: int,
        *,
        zero_B: bool = True,
        dora: bool = False,
        routers: Literal["layer", "linear"] | None = "layer",
    ) -> None:
        super().__init__()
        self.dora = dora

        def pairs(in_features: int, out_features: int) -> LoRAPairs:
            own = routers == "linear"
            return LoRAPairs(num_experts, rank, in_features, out_features, zero_B=zero_B, dora=dora, router=own)

        self.gate_proj = pairs(hidden, intermediate)
        self.up_proj = pairs(hidden, intermediate)
        self.down_proj = pairs(intermediate, hidden)

    def tensors(self) -> ExpertWeights:
        """Give the parameters as the kernels take them."""
        parts: Any = self._modules
        gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
        magnitudes = None
        if self.dora:
            magnitudes = Magnitudes(*(own_parameter(pairs, "magnitude") for pairs in (gate, up, down)))
        return ExpertWeights(
            own_parameter(gate, "A"),
            own_parameter(gate, "B"),
            own_parameter(up, "A"),
            own_parameter(up, "B"),
            own_parameter(down, "A"),
            own_parameter(down, "B"),
            magnitudes,
        )

    def linear_routers(self) -> LinearRouters:
        """Give the linears' routers as the kernels take them, where every linear has one."""
        parts: Any = self._modules
        pairs = (parts["gate_proj"], parts["up_proj"], parts["down_proj"])
        return LinearRouters(*(own_parameter(own.router, "weight") for own in pairs))


def check_rows(weight: Tensor, name: str, module: str) -> None:
    """`ValueError` for a weight [out, in] on which DoRA is not defined: a zero row has no direction to scale.

    ``module`` is what can be left out: the MLP that the weight is of, or the linear itself.
    """
    if weight.is_meta:
        return
    zero = (weight == 0).all(dim=1).nonzero().flatten().tolist()
    if zero:
        shown = ", ".join(map(str, zero[:5])) + (", ..." if len(zero) > 5 else "")
        raise ValueError(
            f"DoRA on {name}: {len(zero)} of its weight's {weight.shape[0]} rows are zero (row {shown}), and DoRA "
            f"divides by their norm; set use_dora=False, or leave {module} out with exclude_modules or "
            "layers_to_transform"
        )

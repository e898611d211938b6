"""The experts' LoRA pairs as bare stacked parameters, and the router that chooses among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphmoe_kernels import ExpertWeights


class LoRAPairs(nn.Module):
    """n LoRA pairs of rank r on one linear: A [n, r, in] and B [n, out, r].

    A is drawn as ``nn.Linear`` draws its weight (kaiming uniform, a = sqrt 5); B is zero, or drawn too with
    ``zero_B=False`` (for tests that need every term to count).
    """

    def __init__(self, num_experts: int, rank: int, in_features: int, out_features: int, zero_B: bool = True) -> None:
        super().__init__()
        bound_A, bound_B = 1 / math.sqrt(in_features), 1 / math.sqrt(rank)
        self.A = nn.Parameter(torch.empty(num_experts, rank, in_features).uniform_(-bound_A, bound_A))
        self.B = nn.Parameter(torch.zeros(num_experts, out_features, rank))
        if not zero_B:
            nn.init.uniform_(self.B, -bound_B, bound_B)


class MixLoRAExperts(nn.Module):
    """n experts, each a whole gated MLP: the frozen base plus its own LoRA pairs on gate, up and down."""

    def __init__(self, num_experts: int, rank: int, hidden: int, intermediate: int, zero_B: bool = True) -> None:
        super().__init__()
        self.gate_proj = LoRAPairs(num_experts, rank, hidden, intermediate, zero_B)
        self.up_proj = LoRAPairs(num_experts, rank, hidden, intermediate, zero_B)
        self.down_proj = LoRAPairs(num_experts, rank, intermediate, hidden, zero_B)

    def tensors(self) -> ExpertWeights:
        """The parameters as the kernels take them."""
        g, u, d = self.gate_proj, self.up_proj, self.down_proj
        return ExpertWeights(g.A, g.B, u.A, u.B, d.A, d.B)


class Router(nn.Module):
    """The router's weight [n, D], drawn from N(0, 0.02); its product runs in fp32 whatever the model's dtype."""

    def __init__(self, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, n] in fp32 for x [N, D]."""
        return nn.functional.linear(x.float(), self.weight.float())

"""An adapter's strength: PEFT's ``scaling`` for layers of experts, and for DoRA beside them.

PEFT's helpers multiply the s of s B A. At strength c (1 as trained) everything an adapter adds counts c times: B A with
s c in place of s, the GRU's W_g with c W_g, DoRA's magnitude m as ||W|| + c (m - ||W||). What it is trained from is at
c = 0, so there the layer is the base layer; for LoRA's own layers this is what PEFT does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.func import functional_call

from graphmoe_kernels import ExpertWeights, GRUWeights, Magnitudes, row_norms
from graphmoe_model.storage.dequantise import dense_linear, is_quantised
from graphmoe_model.storage.offloading import with_onloaded_weights


class ScaledLayer:
    """The scaling of a layer's adapters, by the methods and the attribute that LoRA's layers have.

    Attributes:
        scaling: adapter name -> s, as it counts now; `set_scale` and PEFT's helpers change it.
        cast_input_dtype_enabled: of ``disable_input_dtype_casting``. Inputs are never cast here: experts are cast to
            the dtype of what the base layer gives.
    """

    scaling: dict[str, float]
    cast_input_dtype_enabled = True

    def _trained_scale(self, adapter_name: str) -> float:
        """s by the adapter's rank and alpha."""
        scale: float = self.adapter(adapter_name).scale  # type: ignore[attr-defined]
        return scale

    def strength(self, adapter_name: str) -> float:
        """Return c, by how much of its trained scale an adapter counts: 1 unless someone has changed ``scaling``."""
        trained = self._trained_scale(adapter_name)
        return 1.0 if self.scaling[adapter_name] == trained else self.scaling[adapter_name] / trained

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength to ``scale``; a layer that does not have the adapter is left alone."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._trained_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by ``scale``."""
        for name in self._scaled():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by ``scale``, or set it back to what it was trained with."""
        for name in self._scaled():
            self.scaling[name] = self._trained_scale(name) if scale is None else self.scaling[name] / scale

    def _scaled(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]  # type: ignore[attr-defined]


def scaled_magnitude(magnitude: Tensor, weight: Tensor, A: Tensor, B: Tensor, strength: float) -> Tensor:
    """Return ||W|| + c (m - ||W||) for magnitudes m [n, out] of experts A [n, r, in], B [n, out, r] on W [out, in]."""
    neutral = row_norms(weight, A, B, 0.0).to(magnitude.dtype)  # to the bit those by which `dora_scale` divides
    return torch.lerp(neutral, magnitude, strength)


def scaled_experts(experts: ExpertWeights, dense: tuple[Tensor, Tensor, Tensor], strength: float) -> ExpertWeights:
    """Scale the magnitudes of an MLP's experts (`scaled_magnitude`), if they have any.

    Args:
        experts: of gate, up and down.
        dense: the base's weights, in the same order.
        strength: c.
    """
    if experts.magnitudes is None:
        return experts
    gate_A, gate_B, up_A, up_B, down_A, down_B = experts.pairs
    pairs = ((gate_A, gate_B), (up_A, up_B), (down_A, down_B))
    gate, up, down = (
        scaled_magnitude(magnitude, weight, *pair, strength)
        for magnitude, weight, pair in zip(experts.magnitudes, dense, pairs, strict=True)
    )
    return experts._replace(magnitudes=Magnitudes(gate, up, down))


def scaled_gru(gru: GRUWeights, strength: float) -> GRUWeights:
    """Scale W_g, by which the rounds reach the hidden state; the GRU's own state stays as it is."""
    return gru._replace(output=strength * gru.output)


class ScaledDora(DoraLinearVariant):
    """DoRA on one of LoRA's own linears, whose magnitude follows the scaling, as that of the experts does.

    PEFT leaves it as trained, so that at scaling 0 the layer would compute m / ||W|| times the base.
    """

    @staticmethod
    @with_onloaded_weights  # it reads W, which accelerate brings for the base's own call alone
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """As PEFT's, with ||W|| + c (m - ||W||) in place of m where the strength c is not 1.

        A quantised linear is read by `graphmoe_model.dequantise`: PEFT's helper would change it in every forward.
        """
        rank = module.r[active_adapter]
        trained = module.lora_alpha[active_adapter] / (math.sqrt(rank) if module.use_rslora[active_adapter] else rank)
        scaling = module.scaling[active_adapter]
        base_layer = module.get_base_layer()
        if scaling == trained and not is_quantised(base_layer):
            return DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        dropout = module.lora_dropout[active_adapter]
        drops = module.training and not isinstance(dropout, nn.Identity)
        dora, base_layer = module.lora_magnitude_vector[active_adapter], dense_linear(base_layer, x.dtype)
        magnitude = dora.weight
        if scaling != trained:
            weight = base_layer.weight
            neutral = dora.get_weight_norm(weight, weight.new_zeros(()), 0.0).detach().to(magnitude.dtype)
            magnitude = torch.lerp(neutral, magnitude, scaling / trained)
        settings = {
            "lora_A": module.lora_A[active_adapter],
            "lora_B": module.lora_B[active_adapter],
            "scaling": scaling,
            "base_layer": base_layer,
            "base_result": None if drops else result,
        }
        return result + functional_call(
            dora, {"weight": magnitude}, dropout(x) if drops else x, {**settings, "adapter_name": active_adapter}
        )


def scale_dora(layer: LoraLayer, adapter_name: str) -> None:
    """Let an adapter's DoRA on a linear follow the scaling (`ScaledDora`)."""
    if type(layer.lora_variant.get(adapter_name)) is DoraLinearVariant:
        layer.lora_variant[adapter_name] = ScaledDora()

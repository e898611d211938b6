"""The layers of an exported model: frozen, with one adapter each and no trace of how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphmoe_inference.folder import ExportedModel, LinearExport, MLPExport
from graphmoe_kernels import (
    ChosenExperts,
    DenseMLP,
    ExpertKind,
    ExpertWeights,
    FoldCache,
    FoldSettings,
    GRUWeights,
    LayerWeights,
    LinearExperts,
    LinearRouters,
    Magnitudes,
    MixedExperts,
    RethinkingSpec,
    SingleExpert,
    mix_linear,
    prepare_linear,
    rethink,
)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GRU = ("update_gate.weight", "reset_gate.weight", "candidate.weight", "candidate.bias", "output_proj.weight")
Tensors = Mapping[str, Tensor]  # an adapter's, of one module, by the names of its checkpoint


class Frozen(nn.Module):
    """Has an adapter's tensors, frozen, under the names that they were exported by."""

    def __init__(self, tensors: Tensors, names: list[str]) -> None:
        super().__init__()
        missing, further = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
        if missing or further:
            raise ValueError(f"tensors that are missing: {missing}; that do not belong here: {further}")
        for name in names:
            self.register_parameter(_stored(name), nn.Parameter(tensors[name], requires_grad=False))

    def tensor(self, name: str) -> Any:
        """Return the tensor that was exported by a name."""
        return self._parameters[_stored(name)]

    def prepare(self) -> None:
        """Compute what is kept between forwards, before the first; nothing, where a layer keeps nothing."""


class RethinkingMLP(Frozen):
    """A gated MLP with T rounds of experts: y = layer(x) for x [..., D] (GraphMoE, Algorithm 1).

    Args:
        mlp: the base's MLP.
        exported: the adapter's settings.
        own: what is on this MLP.
        tensors: by the names of `tensor_names`.

    Raises:
        ValueError: tensors that are missing or too many.
    """

    def __init__(self, mlp: nn.Module, exported: ExportedModel, own: MLPExport, tensors: Tensors) -> None:
        super().__init__(tensors, self.tensor_names(exported))
        self.base, self.exported, self.names = mlp, exported, own
        self.spec = settings(exported, own.scale, own.num_experts, own.activation)
        self._fold = FoldCache(self.weights)

    @staticmethod
    def tensor_names(exported: ExportedModel) -> list[str]:
        """List the names of an MLP's tensors."""
        names = ["router.weight"] if exported.routers == "layer" else []
        for projection in PROJECTIONS:
            names += [f"experts.{projection}.{part}" for part in ("A", "B")]
            names += [f"experts.{projection}.router.weight"] if exported.routers == "linear" else []
            names += [f"experts.{projection}.magnitude"] if exported.use_dora else []
        return names + ([f"gru.{name}" for name in GRU] if exported.rounds > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        """y [..., D] for x [..., D]."""
        y = rethink(
            x if x.dim() == 2 else x.reshape(-1, x.shape[-1]),  # [N, D]
            self.weights(),
            self.spec,
            fold=self.exported.fold,
            cache=self._fold,
            backend=self.exported.backend,
        ).y
        return y if x.dim() == 2 else y.view(x.shape)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the fold now rather than in the first forward; nothing where rounds are never folded."""
        if self.exported.fold != "never":
            dtype = self.dense().down.dtype
            self._fold.get(self.weights(), FoldSettings(dtype, self.spec.scale, self.spec.candidate_input))

    def weights(self) -> LayerWeights:
        """The base and the adapter, as the kernels take them."""
        gru = GRUWeights(*(self.tensor(f"gru.{name}") for name in GRU)) if self.exported.rounds > 1 else None
        return LayerWeights(self.dense(), self._experts(), gru)

    def dense(self) -> DenseMLP:
        """The base's weights."""
        parts: Any = self.base._modules
        down = parts[self.names.down]
        if self.names.gate != self.names.up:
            gate, up = parts[self.names.gate], parts[self.names.up]
            return DenseMLP(gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
        both = parts[self.names.gate]
        gates, ups = both.weight.chunk(2)
        gate_bias, up_bias = (None, None) if both.bias is None else both.bias.chunk(2)
        return DenseMLP(gates, ups, down.weight, gate_bias, up_bias, down.bias)

    def _experts(self) -> ExpertKind:
        gate, up, down = ((self.tensor(f"experts.{n}.A"), self.tensor(f"experts.{n}.B")) for n in PROJECTIONS)
        magnitudes = None
        if self.exported.use_dora:
            magnitudes = Magnitudes(*(self.tensor(f"experts.{name}.magnitude") for name in PROJECTIONS))
        lora = ExpertWeights(*gate, *up, *down, magnitudes)
        if self.exported.routers == "layer":
            return ChosenExperts(lora, self.tensor("router.weight"))
        if self.exported.routers is None:
            return SingleExpert(lora)
        return MixedExperts(lora, LinearRouters(*(self.tensor(f"experts.{n}.router.weight") for n in PROJECTIONS)))


class RoutedLinear(Frozen):
    """A linear with experts of its own: y = W x + b + s sum_i p_i(x) B_i A_i x (MoLA, Eq. 2).

    Args:
        linear, exported, own, tensors: as of `RethinkingMLP`.

    Raises:
        ValueError: tensors that are missing or too many.
    """

    def __init__(self, linear: nn.Module, exported: ExportedModel, own: LinearExport, tensors: Tensors) -> None:
        super().__init__(tensors, self.tensor_names(exported))
        assert own.num_experts is not None
        self.base, self.exported = linear, exported
        self.spec = settings(exported, own.scale, own.num_experts)
        self._prepared = FoldCache(self._experts, list, self._prepare)

    @staticmethod
    def tensor_names(exported: ExportedModel) -> list[str]:
        """List the names of a linear's tensors."""
        return ["A", "B", "router.weight", *(["magnitude"] if exported.use_dora else [])]

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        y = self.base(x)
        prepared = self._prepared.get(self._sources(), self._settings(y.dtype))
        mixed, _ = mix_linear(
            y.reshape(-1, y.shape[-1]),  # [N, out]
            x.reshape(-1, x.shape[-1]),  # [N, in]
            self.tensor("router.weight"),
            prepared,
            self.spec.router,
            backend=self.exported.backend,
        )
        return mixed.view(y.shape)

    @torch.no_grad()
    def prepare(self) -> None:
        """Join and cast the experts now rather than in the first forward."""
        weight: Any = self.base.weight
        self._prepared.get(self._sources(), self._settings(weight.dtype))

    def _settings(self, dtype: torch.dtype) -> FoldSettings:
        return FoldSettings(dtype, self.spec.scale, self.spec.candidate_input)

    def _experts(self) -> LinearExperts:
        base: Any = self.base
        of_base = (self.tensor("magnitude"), base.weight, base.bias) if self.exported.use_dora else ()
        return LinearExperts(self.tensor("A"), self.tensor("B"), *of_base)

    def _sources(self) -> list[Tensor]:
        return self._experts().sources()

    def _prepare(self, sources: list[Tensor], given: FoldSettings, copy: bool = False) -> Any:
        del sources  # they tell when it is due
        return prepare_linear(self._experts(), given, copy)


class LoRALinear(Frozen):
    """A linear with plain LoRA, y = W x + b + s B A x, or DoRA, computed in the order in which PEFT computes it.

    With DoRA ``dora_scale`` is m / ||W + s B A||_row, and y = W x + b + (dora_scale - 1) W x + dora_scale s B A x.

    Args:
        linear, exported, own: as of `RethinkingMLP`.
        tensors: ``A`` [r, in], ``B`` [out, r] and, with DoRA, ``dora_scale`` [1, out].

    Raises:
        ValueError: tensors that are missing or too many.
    """

    def __init__(self, linear: nn.Module, exported: ExportedModel, own: LinearExport, tensors: Tensors) -> None:
        super().__init__(tensors, self.tensor_names(exported))
        self.base, self.scale, self.dora = linear, own.scale, exported.use_dora

    @staticmethod
    def tensor_names(exported: ExportedModel) -> list[str]:
        """List the names of a linear's tensors."""
        return ["A", "B", *(["dora_scale"] if exported.use_dora else [])]

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        result = self.base(x)
        A, B = self.tensor("A"), self.tensor("B")
        low = F.linear(F.linear(x.to(A.dtype), A), B)
        if not self.dora:
            return (result + low * self.scale).to(result.dtype)
        dora_scale, bias = self.tensor("dora_scale"), self.base.bias
        plain: Any = result if bias is None else result - bias
        return (result + ((dora_scale - 1) * plain + dora_scale * low * self.scale)).to(result.dtype)


def settings(exported: ExportedModel, scale: float, num_experts: int, activation: str = "silu") -> RethinkingSpec:
    """The kernels' settings of a layer."""
    return RethinkingSpec(
        rounds=exported.rounds,
        top_k=num_experts if exported.dense else exported.top_k,
        scale=scale,
        activation=activation,
        normalize=exported.norm_topk_prob,
        candidate_input=exported.candidate_input,
        candidate_activation=exported.candidate_activation,
    )


def _stored(name: str) -> str:
    """A parameter's name without dots, which ``nn.Module`` does not take in one."""
    return name.replace(".", "_")

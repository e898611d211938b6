"""`FusedGraphMoEFFN`: takes the place of a gated MLP and runs T rounds of LoRA experts over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graphmoe_kernels import (
    BaseMLP,
    ChosenExperts,
    ExpertKind,
    FoldCache,
    LayerWeights,
    MixedExperts,
    SingleExpert,
    fold_sources,
    rethink,
)
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.base_mlp import FusedMLP, SeparateMLP, dense_weights, down_projection, wrap_mlp
from graphmoe_model.layers.experts import MLPExperts, Router, check_rows, own_parameter
from graphmoe_model.layers.gru import RethinkingGRU
from graphmoe_model.layers.mlp_checks import check_mlp, dropout_rate
from graphmoe_model.layers.recomputation import Run
from graphmoe_model.layers.routed_layer import RoutedLayer, experts_of_layer
from graphmoe_model.layers.scaling import scaled_experts, scaled_gru
from graphmoe_model.storage.dequantise import stored_tensors
from graphmoe_model.storage.weight_management import WeightManager, allowed_fold, gathered_weights

# The routers' names relative to the layer, in the order of `RethinkingOutput.router_logits`.
ROUTER_NAMES: dict[str | None, tuple[str, ...]] = {
    "layer": ("",),
    "linear": ("gate_proj", "up_proj", "down_proj"),
    None: (),
}


class GraphMoEAdapter(nn.Module):
    """The trainable part of one layer: experts with their routers and (for more than one round) the GRU.

    Attributes:
        router_names: of its routers relative to the layer, in the order of `RethinkingOutput.router_logits`.
    """

    def __init__(
        self,
        config: GraphMoEConfig,
        hidden: int,
        intermediate: int,
        num_experts: int,
        r: int | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.rank = config.r if r is None else r
        self._scale = config.scaling(r, alpha)
        self.num_experts = num_experts
        neutral, routers = bool(config.init_lora_weights), config.base_method.routers
        self.router_names, self._read_experts = ROUTER_NAMES[routers], _READERS[routers]
        self.router = Router(num_experts, hidden) if routers == "layer" else None
        self.experts = MLPExperts(
            num_experts, self.rank, hidden, intermediate, zero_B=neutral, dora=config.use_dora, routers=routers
        )
        self.gru: RethinkingGRU | None = None
        if config.rounds > 1:
            self.gru = RethinkingGRU(hidden, config.gru_width(hidden), zero_output=neutral)

    def extra_repr(self) -> str:
        """Say what is in it, for ``print(model)``."""
        return (
            f"{self.config.title}, num_experts={self.num_experts}, r={self.rank}, top_k={self.config.top_k}, "
            f"rounds={self.rounds}, scale={self.scale:g}"
        )

    @property
    def scale(self) -> float:
        """s, as trained; a layer's ``scaling`` says how it counts now."""
        return self._scale

    @property
    def rounds(self) -> int:
        """T."""
        return self.config.rounds

    def trained(self) -> Tensor:
        """One of its parameters."""
        experts: Any = self._modules["experts"]
        return own_parameter(experts._modules["down_proj"], "B")

    def weights(self, base: BaseMLP) -> LayerWeights:
        """Give the parameters over ``base`` as the kernels take them."""
        gru: Any = self._modules.get("gru")
        return LayerWeights(base, self._read_experts(self), None if gru is None else gru.tensors())


def _chosen_experts(adapter: GraphMoEAdapter) -> ExpertKind:
    parts: Any = adapter._modules
    return ChosenExperts(parts["experts"].tensors(), own_parameter(parts["router"], "weight"))


def _mixed_experts(adapter: GraphMoEAdapter) -> ExpertKind:
    experts: Any = adapter._modules["experts"]
    return MixedExperts(experts.tensors(), experts.linear_routers())


def _single_expert(adapter: GraphMoEAdapter) -> ExpertKind:
    experts: Any = adapter._modules["experts"]
    return SingleExpert(experts.tensors())


_READERS: dict[str | None, Callable[[GraphMoEAdapter], ExpertKind]] = {
    "layer": _chosen_experts,
    "linear": _mixed_experts,
    None: _single_expert,
}


class FusedGraphMoEFFN(RoutedLayer):
    """A gated MLP of a Transformers model with LoRA experts and self-rethinking: y = ffn(x) for x [..., D].

    The MLP itself is kept, frozen, as ``base_layer``; adapters live in ``lora_graphmoe`` by name. A fresh
    adapter leaves the MLP's output as it was.

    In evaluation, products of weights (`graphmoe_kernels.Fold`) are computed once and kept until a weight changes;
    nothing is kept where FSDP, ZeRO-3 or accelerate's offloading manages the weights (`WeightManager`). Three writes
    cannot be seen, and want `refold` after them: values written through ``.data`` or through a NumPy view, and writes
    to a parameter that was created inside ``torch.inference_mode``.

    A dropout that the MLP itself has after its down projection (Seed-OSS) stays where it is, on the layer's output y_T,
    once. The GRU reads the other rounds' y_t as they are: a mask belongs to what is added to the residual stream.

    Args:
        mlp: any MLP with gate_proj/up_proj/down_proj or gate_up_proj/down_proj, and act_fn or activation_fn, or with
            the parts under the names of another of `graphmoe_model.layers.mlp_layouts.LAYOUTS`.
        config: a `GraphMoEConfig`.
        adapter_name: the name of the adapter made from ``config``.
        kwargs: further arguments of `update_layer`.

    Raises:
        TypeError: the MLP is of a kind that cannot be adapted (see `graphmoe_model.layers.mlp_checks.check_mlp`), or
            wrapped already, or ``config`` is no `GraphMoEConfig`.
        ValueError: its activation is unknown, the GRU's width would be 0, DoRA on a weight with a zero row, or
            ``config.num_experts`` differs by layer and no ``num_experts`` is given.
    """

    width_name = "MLP's hidden size"

    def __init__(self, mlp: nn.Module, config: GraphMoEConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        if isinstance(mlp, BaseTunerLayer):
            raise TypeError(f"this MLP is wrapped already ({type(mlp).__name__}); use update_layer to add an adapter")
        traits = check_mlp(mlp)
        super().__init__(mlp, config, adapter_name)
        self.traits, self._wrapped = traits, wrap_mlp(mlp)
        self.in_features = self.out_features = traits.hidden
        self.update_layer(adapter_name, config, **kwargs)

    def update_layer(
        self,
        adapter_name: str,
        config: GraphMoEConfig,
        r: int | None = None,
        lora_alpha: float | None = None,
        num_experts: int | None = None,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            r, lora_alpha: in place of the config's (rank and alpha patterns).
            num_experts: in place of the config's, which may differ by layer.
        """
        hidden, intermediate = self.traits.hidden, self.traits.intermediate
        with gathered_weights(self.base_layer):
            weights = dense_weights(self.base_layer) if config.use_dora else {}
            for name, weight in weights.items():
                check_rows(weight, f"{type(self.base_layer).__name__}.{name}", "this MLP")
            n = experts_of_layer(config, num_experts)
            adapter = GraphMoEAdapter(config, hidden, intermediate, n, r, lora_alpha)
            fold = FoldCache(partial(self._weights, adapter_name), partial(self._fold_sources, adapter_name))
            self._add_adapter(adapter_name, adapter, fold, config)
            for name, weight in weights.items():
                getattr(adapter.experts, name).start_magnitudes(weight, adapter.scale)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapted(
        self, x: Tensor, name: str, adapter: GraphMoEAdapter, manager: WeightManager, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        if args or kwargs:
            more = [type(each).__name__ for each in args] + [f"{name}=" for name in kwargs]
            raise TypeError(f"{type(self).__name__} takes x alone, as the MLP does; it got {', '.join(more)} too")
        config = adapter.config
        output = rethink(
            x if x.dim() == 2 else x.reshape(-1, x.shape[-1]),  # [N, D]
            self._weights(name),
            self._spec(name, adapter),
            fold=allowed_fold(manager, config.fold),
            cache=None if self.training else self._kept_fold(name, manager),
            backend=config.backend,
        )
        y, dropout = output.y, self._output_dropout()
        if dropout > 0:
            y = F.dropout(y, dropout)
        return (y if x.dim() == 2 else y.view(x.shape)), output.router_logits

    def _output_linear(self) -> Any:
        return self._base().linears()[-1]

    def _activation(self) -> str:
        return self.traits.activation

    def _base(self) -> SeparateMLP | FusedMLP:
        """The MLP as the kernels' `BaseMLP`; made once for each module that is the base."""
        base = wrap_mlp(self._modules["base_layer"], self._wrapped)  # type: ignore[arg-type]
        if base is not self._wrapped:  # written alone where it changes: a compiled forward writes nothing
            self._wrapped = base
        return base

    def _output_dropout(self) -> float:
        """The rate of the MLP's own dropout on its output; 0 where it has none, or is in evaluation mode."""
        name = self.traits.output_dropout
        return dropout_rate(self.base_layer, name) if name is not None and self.base_layer.training else 0.0

    def run(self) -> Run:
        """What a forward depends on now besides tensors."""
        run = super().run()
        return run._replace(dropout=run.dropout or self._output_dropout())

    def _weights(self, adapter_name: str) -> LayerWeights:
        """The base and an adapter's parameters, as the kernels take them and as they count now (`ScaledLayer`)."""
        weights, strength = self._stored(adapter_name), self.strength(adapter_name)
        if strength == 1:
            return weights
        experts: Any = weights.experts
        if experts.lora.magnitudes is not None:
            dense = weights.base.dense()
            lora = scaled_experts(experts.lora, (dense.gate, dense.up, dense.down), strength)
            experts = experts._replace(lora=lora)
        return weights._replace(experts=experts, gru=weights.gru and scaled_gru(weights.gru, strength))

    def _stored(self, adapter_name: str) -> LayerWeights:
        adapter: GraphMoEAdapter = self.adapter(adapter_name)
        return adapter.weights(self._base())

    def _fold_sources(self, adapter_name: str, weights: LayerWeights) -> list[Tensor]:
        """What a kept fold is compared with: the parameters, not what a strength made of them in this forward."""
        return fold_sources(weights if self.strength(adapter_name) == 1 else self._stored(adapter_name))

    def _read_by_forward(self, adapter_name: str) -> list[Tensor]:
        stored = self._stored(adapter_name)
        adapter = [*stored.experts.lora.tensors(), *stored.experts.routers(), *(stored.gru or ())]
        return [*adapter, *(t for linear in self._base().linears() for t in stored_tensors(linear))]

    def __getattr__(self, name: str) -> Any:
        """As ``nn.Module``; who looks for the MLP's projections here is told where they are."""
        if name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
            raise AttributeError(
                f"FusedGraphMoEFFN has no {name} of its own: the MLP is its base_layer. If this comes from a "
                "forward that Liger-Kernel put on the layer, apply its patches without swiglu/geglu."
            )
        return super().__getattr__(name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return super()._get_base_layer_device_and_dtype(down_projection(base_layer))

"""`FusedGraphMoEFFN`: takes the place of a gated MLP and runs T rounds of LoRA experts over it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graphmoe_kernels import FoldCache, LayerWeights, LinearRouters, fold_sources, rethink
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.base_mlp import dense_weights, down_projection, wrap_mlp
from graphmoe_model.layers.experts import MLPExperts, Router, check_rows
from graphmoe_model.layers.gru import RethinkingGRU
from graphmoe_model.layers.mlp_checks import check_mlp, dropout_rate
from graphmoe_model.layers.recomputation import Run
from graphmoe_model.layers.routed_layer import RoutedLayer, experts_of_layer
from graphmoe_model.layers.scaling import scaled_experts, scaled_gru
from graphmoe_model.storage.dequantise import input_dtype, stored_tensors
from graphmoe_model.storage.offloading import with_onloaded_weights
from graphmoe_model.storage.weight_management import allowed_fold, gathered_weights

# The routers' names relative to the layer, in the order of `RethinkingOutput.router_logits`.
ROUTER_NAMES = {"layer": ("",), "linear": ("gate_proj", "up_proj", "down_proj"), None: ()}


class GraphMoEAdapter(nn.Module):
    """The trainable part of one layer: experts with their routers and (for more than one round) the GRU."""

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
        self.router = Router(num_experts, hidden) if routers == "layer" else None
        self.experts = MLPExperts(
            num_experts, self.rank, hidden, intermediate, zero_B=neutral, dora=config.use_dora, routers=routers
        )
        self.gru: RethinkingGRU | None = None
        if config.rounds > 1:
            self.gru = RethinkingGRU(hidden, config.gru_width(hidden), zero_output=neutral)

    @property
    def scale(self) -> float:
        """s, as trained; a layer's ``scaling`` says how it counts now."""
        return self._scale

    def routers(self) -> Tensor | LinearRouters | None:
        """As the kernels take them."""
        return self.experts.routers() if self.router is None else self.router.weight


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

    def __init__(self, mlp: nn.Module, config: GraphMoEConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        if isinstance(mlp, BaseTunerLayer):
            raise TypeError(f"this MLP is wrapped already ({type(mlp).__name__}); use update_layer to add an adapter")
        traits = check_mlp(mlp)
        super().__init__(mlp, config, adapter_name)
        self.traits = traits
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

    @with_onloaded_weights
    def forward(self, x: Tensor) -> Tensor:
        """y [..., D] for x [..., D] of a floating dtype, on the MLP's device.

        A non-finite x gives a non-finite y for its token and leaves the other tokens alone.

        Raises:
            TypeError: x is not floating point, or of another dtype than the MLP's plain weights outside of autocast; in
                training, a linear of the MLP passes no gradient to its input.
            ValueError: x has another width or is on another device.
            RuntimeError: FSDP or tensor parallelism was applied to a part of the layer.
        """
        name = self.counted_name()
        if name is None:
            return self.base_layer(x)
        down = down_projection(self.base_layer)
        adapter: GraphMoEAdapter = self.lora_graphmoe[name]  # type: ignore[assignment]
        manager = self._manager(down, adapter.experts.down_proj.B, name)
        self._check_x(x, stored_tensors(down)[0], input_dtype(down), self.traits.hidden, "MLP's hidden size")
        config = adapter.config
        output = rethink(
            x.reshape(-1, x.shape[-1]),  # [N, D]
            self._weights(name),
            config.spec(self.scaling[name], adapter.num_experts, self.traits.activation, training=self.training),
            fold=allowed_fold(manager, config.fold),
            cache=None if self.training else self._kept_fold(name, manager),
            backend=config.backend,
        )
        logits = dict(zip(ROUTER_NAMES[config.base_method.routers], output.router_logits, strict=True))
        y = F.dropout(output.y, self._output_dropout())
        return self._finish(y.view(*x.shape[:-1], y.shape[-1]), x, logits)

    def router_shapes(self) -> dict[str, tuple[int, int]]:
        """[T, n] of each of the active adapter's routers, by name relative to the layer."""
        adapter: GraphMoEAdapter = self.lora_graphmoe[self.active_name()]  # type: ignore[assignment,index]
        names = ROUTER_NAMES[adapter.config.base_method.routers]
        return dict.fromkeys(names, (adapter.config.rounds, adapter.num_experts))

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
        experts = weights.experts
        if experts.magnitudes is not None:
            dense = weights.base.dense()
            experts = scaled_experts(experts, (dense.gate, dense.up, dense.down), strength)
        return weights._replace(experts=experts, gru=weights.gru and scaled_gru(weights.gru, strength))

    def _stored(self, adapter_name: str) -> LayerWeights:
        adapter: GraphMoEAdapter = self.lora_graphmoe[adapter_name]  # type: ignore[assignment]
        gru = None if adapter.gru is None else adapter.gru.tensors()
        return LayerWeights(wrap_mlp(self.base_layer), adapter.routers(), adapter.experts.tensors(), gru)

    def _fold_sources(self, adapter_name: str, weights: LayerWeights) -> list[Tensor]:
        """What a kept fold is compared with: the parameters, not what a strength made of them in this forward."""
        return fold_sources(weights if self.strength(adapter_name) == 1 else self._stored(adapter_name))

    def _read_by_forward(self, adapter_name: str) -> list[Tensor]:
        stored = self._stored(adapter_name)
        adapter = [t for t in (*stored.experts, *stored.routers(), *(stored.gru or ())) if t is not None]
        return [*adapter, *(t for linear in wrap_mlp(self.base_layer).linears() for t in stored_tensors(linear))]

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

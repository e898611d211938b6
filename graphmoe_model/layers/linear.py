"""`RoutedLoRALinear`: takes the place of a linear layer and mixes LoRA experts into it by a router of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graphmoe_kernels import FoldCache, FoldSettings, LinearExperts, PreparedLinear, mix_linear, prepare_linear
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.experts import LoRAPairs, check_rows, own_parameter
from graphmoe_model.layers.routed_layer import RoutedLayer, experts_of_layer
from graphmoe_model.layers.scaling import scaled_magnitude
from graphmoe_model.storage.dequantise import (
    check_dense,
    dense_weight,
    is_linear,
    run_linear,
    stored_tensors,
)
from graphmoe_model.storage.weight_management import WeightManager, check_unsharded, gathered_weights


class LinearAdapter(LoRAPairs):
    """The trainable part of one linear: A, B, ``router.weight``, with DoRA ``magnitude``."""

    def __init__(
        self, config: GraphMoEConfig, in_features: int, out_features: int, num_experts: int, r: int, scale: float
    ) -> None:
        super().__init__(
            num_experts,
            r,
            in_features,
            out_features,
            zero_B=bool(config.init_lora_weights),
            dora=config.use_dora,
            router=True,
        )
        self.config = config
        self.num_experts = num_experts
        self.router_names, self.rounds = ("",), 1
        self._scale = scale

    @property
    def scale(self) -> float:
        """s, as trained; a layer's ``scaling`` says how it counts now."""
        return self._scale

    def trained(self) -> Tensor:
        """One of its parameters."""
        return own_parameter(self, "B")


class RoutedLoRALinear(RoutedLayer):
    """A linear layer with plug-in experts: y = W x + b + s sum_i p_i(x) B_i A_i x for x [..., in] (MoLA, Eq. 2).

    The linear is kept, frozen, as ``base_layer``; adapters live in ``lora_graphmoe`` by name. A fresh adapter leaves
    the linear's output as it was.

    Args:
        linear: a module with ``in_features``, ``out_features`` and a weight [out, in], quantised or not.
        config: a `GraphMoEConfig` of a method with experts on the attention (``method="mola"``).
        adapter_name: the name of the adapter made from ``config``.
        kwargs: further arguments of `update_layer`.

    Raises:
        TypeError: the module is no linear layer, or wrapped already, or ``config`` is no `GraphMoEConfig`.
        ValueError: the config's method has no experts outside of MLPs, DoRA on a weight with a zero row, or
            ``config.num_experts`` differs by layer and no ``num_experts`` is given.
    """

    width_name = "linear's input size"

    def __init__(self, linear: nn.Module, config: GraphMoEConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        check_linear(linear)
        super().__init__(linear, config, adapter_name)
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
        self.update_layer(adapter_name, config, **kwargs)

    def update_layer(
        self,
        adapter_name: str,
        config: GraphMoEConfig,
        r: int | None = None,
        lora_alpha: float | None = None,
        num_experts: int | None = None,
    ) -> None:
        """Add an adapter; arguments as in `FusedGraphMoEFFN.update_layer`."""
        if config.base_method.attention != "experts":
            raise ValueError(
                f"method={config.method!r} puts no experts on single linears; method='mola' does, and 'lora' and "
                "'mixlora' put LoRA on attention projections"
            )
        n, rank = experts_of_layer(config, num_experts), config.r if r is None else r
        scale = config.scaling(r, lora_alpha)
        with gathered_weights(self.base_layer):
            if config.use_dora:
                check_rows(dense_weight(self.base_layer), type(self.base_layer).__name__, "this linear")
            adapter = LinearAdapter(config, self.in_features, self.out_features, n, rank, scale)
            cache = FoldCache(partial(self._sources, adapter_name), list, partial(self._prepare, adapter_name))
            self._add_adapter(adapter_name, adapter, cache, config)
            if config.use_dora:
                adapter.start_magnitudes(dense_weight(self.base_layer), scale)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapted(
        self, x: Tensor, name: str, adapter: LinearAdapter, manager: WeightManager, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        config, spec = adapter.config, self._spec(name, adapter)
        y = run_linear(self.base_layer, x, *args, **kwargs)
        mixed, routing = mix_linear(
            y.reshape(-1, y.shape[-1]),  # [N, out]
            x.reshape(-1, x.shape[-1]),  # [N, in]
            own_parameter(adapter.router, "weight"),  # type: ignore[arg-type]
            self._prepared(name, adapter, y.dtype, manager),
            spec.router,
            dropout=spec.dropout,
            backend=config.backend,
        )
        return mixed.view(y.shape), ((routing.logits,),)

    def _output_linear(self) -> Any:
        return self.base_layer

    def _activation(self) -> str:
        return "silu"  # no activation follows a linear; the kernels' settings have one all the same

    def _prepared(
        self, name: str, adapter: LinearAdapter, dtype: torch.dtype, manager: WeightManager
    ) -> PreparedLinear:
        """The adapter as the kernels take it; kept between forwards where no gradient can reach it."""
        sources = self._sources(name)
        settings = FoldSettings(dtype, self.scaling[name], adapter.config.candidate_input)
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        cache = None if self.training or differentiable else self._kept_fold(name, manager)
        if cache is None:
            return self._prepare(name, sources, settings)
        kept: PreparedLinear = cache.get(sources, settings)
        return kept

    def _read_by_forward(self, adapter_name: str) -> list[Tensor]:
        return [*self.lora_graphmoe[adapter_name].parameters(), *stored_tensors(self.base_layer)]

    def _prepare(
        self, adapter_name: str, sources: list[Tensor], settings: FoldSettings, copy: bool = False
    ) -> PreparedLinear:
        """What `_prepared` keeps. The sources only tell when it is due, so no forward dequantises for nothing."""
        return prepare_linear(self._experts(adapter_name), settings, copy)

    def _experts(self, adapter_name: str) -> LinearExperts:
        """The adapter's parameters as they count now (`graphmoe_model.scaling`), with what DoRA reads of the base."""
        adapter: LinearAdapter = self.lora_graphmoe[adapter_name]  # type: ignore[assignment]
        if adapter.magnitude is None:
            return LinearExperts(adapter.A, adapter.B)
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        weight, magnitude, strength = dense_weight(self.base_layer), adapter.magnitude, self.strength(adapter_name)
        if strength != 1:
            magnitude = scaled_magnitude(magnitude, weight, adapter.A, adapter.B, strength)  # type: ignore[assignment]
        return LinearExperts(adapter.A, adapter.B, magnitude, weight, bias)

    def _sources(self, adapter_name: str) -> list[Tensor]:
        """The stored tensors that an adapter's experts are prepared from."""
        adapter: LinearAdapter = self.lora_graphmoe[adapter_name]  # type: ignore[assignment]
        if adapter.magnitude is None:
            return [adapter.A, adapter.B]
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        of_base = [*stored_tensors(self.base_layer), *([] if bias is None else [bias])]
        return [adapter.A, adapter.B, adapter.magnitude, *of_base]


def check_linear(module: nn.Module) -> None:
    """`TypeError` for a module that cannot take experts: anything but a whole linear layer that nothing wraps."""
    kind = type(module).__name__
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"this linear is wrapped by another adapter ({kind}), which takes no experts; unload that one first"
        )
    if not is_linear(module):
        raise TypeError(f"{kind} is not a linear layer with a weight of its own; experts go on linear layers and MLPs")
    check_unsharded(module, f"this {kind}")
    check_dense(module, "this linear")

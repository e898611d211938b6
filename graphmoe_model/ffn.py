"""`FusedGraphMoEFFN`: takes the place of a gated MLP and runs T rounds of routed LoRA experts over it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from graphmoe_kernels import FoldCache, LayerWeights, rethink
from graphmoe_model.base_mlp import check_mlp, wrap_mlp
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.experts import MixLoRAExperts, Router
from graphmoe_model.gru import RethinkingGRU
from graphmoe_model.routing_record import RoutingContext, RoutingRecord

NOT_MERGEABLE = (
    "GraphMoE adapters cannot be merged into the base MLP: which experts run depends on the input, and later "
    "rounds are nonlinear in it. Keep the adapter (its folds are cached for inference), or unload() it."
)


class GraphMoEAdapter(nn.Module):
    """The trainable part of one layer: router, experts and (for more than one round) the GRU."""

    def __init__(
        self,
        config: GraphMoEConfig,
        hidden: int,
        intermediate: int,
        r: int | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.rank = config.r if r is None else r
        self.scale = config.scaling(r, alpha)
        neutral = bool(config.init_lora_weights)
        self.router = Router(config.num_experts, hidden)
        self.experts = MixLoRAExperts(config.num_experts, self.rank, hidden, intermediate, zero_B=neutral)
        self.gru: RethinkingGRU | None = None
        if config.rounds > 1:
            self.gru = RethinkingGRU(hidden, config.gru_width(hidden), zero_output=neutral)


class FusedGraphMoEFFN(nn.Module, BaseTunerLayer):
    """A gated MLP of a Transformers model with self-rethinking LoRA experts: y = ffn(x) for x [..., D].

    The MLP itself is kept, frozen, as ``base_layer``; adapters live in ``lora_graphmoe`` by name. A fresh
    adapter leaves the MLP's output as it was.

    In evaluation, products of weights (`graphmoe_kernels.Fold`) are computed once and kept until a weight
    changes. Three writes cannot be seen, and want `refold` after them: values written through ``.data`` or through
    a NumPy view, and writes to a parameter that was created inside ``torch.inference_mode``.

    Args:
        mlp: any MLP with gate_proj/up_proj/down_proj or gate_up_proj/down_proj, and act_fn or activation_fn.
        config: a `GraphMoEConfig`.
        adapter_name: the name of the adapter made from ``config``.

    Raises:
        TypeError: the MLP is of a kind that cannot be adapted (see `graphmoe_model.base_mlp.check_mlp`), or
            wrapped already, or ``config`` is no `GraphMoEConfig`.
        ValueError: its activation is unknown, or the GRU's width would be 0.
    """

    adapter_layer_names = ("lora_graphmoe",)

    def __init__(self, mlp: nn.Module, config: GraphMoEConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(config, GraphMoEConfig):
            raise TypeError(f"config must be a GraphMoEConfig, got {type(config).__name__}")
        if isinstance(mlp, BaseTunerLayer):
            raise TypeError(f"this MLP is wrapped already ({type(mlp).__name__}); use update_layer to add an adapter")
        self.sizes = check_mlp(mlp)
        self.base_layer = mlp
        self.lora_graphmoe = nn.ModuleDict()
        self.routing_context = RoutingContext()
        self.routing: RoutingRecord | None = None
        self._folds: dict[str, FoldCache] = {}
        mlp.requires_grad_(False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, **kwargs)

    def update_layer(
        self, adapter_name: str, config: GraphMoEConfig, r: int | None = None, lora_alpha: float | None = None
    ) -> None:
        """Add an adapter; ``r`` and ``lora_alpha`` stand in for the config's (rank and alpha patterns)."""
        adapter = GraphMoEAdapter(config, self.sizes.hidden, self.sizes.intermediate, r, lora_alpha)
        self.lora_graphmoe[adapter_name] = adapter
        self._folds[adapter_name] = FoldCache(partial(self._weights, adapter_name))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., D] for x [..., D] of a floating dtype, on the MLP's device.

        A non-finite x gives a non-finite y for its token and leaves the other tokens alone.

        Raises:
            TypeError: x is not floating point, or of another dtype than the MLP's weights outside of autocast.
            ValueError: x has another width or is on another device.
        """
        name = self._active_name()
        if name is None:
            return self.base_layer(x)
        self._check_input(x)
        adapter: GraphMoEAdapter = self.lora_graphmoe[name]  # type: ignore[assignment]
        record = self._records(adapter.config)
        spec = adapter.config.spec(self.sizes.activation, adapter.scale, 8, training=self.training, statistics=record)
        mask = self._token_mask(x) if record else None
        output = rethink(
            x.reshape(-1, x.shape[-1]),  # [N, D]
            self._weights(name),
            spec,
            fold=adapter.config.fold,
            cache=None if self.training else self._folds[name],
            token_mask=mask,
            backend=adapter.config.backend,
        )
        if output.counts is not None and output.mass is not None:
            tokens = mask.sum() if mask is not None else torch.full((), x.numel() // x.shape[-1], device=x.device)
            self.routing_context.record(self, RoutingRecord(output.counts, output.mass, tokens))
        return output.y.view(*x.shape[:-1], output.y.shape[-1])

    def refold(self) -> None:
        """Forget the cached folds; the next forward in evaluation builds them anew."""
        for cache in self._folds.values():
            cache.drop()

    def train(self, mode: bool = True) -> FusedGraphMoEFFN:
        """As ``nn.Module.train``; drops the cached folds, also on eval()."""
        self.refold()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedGraphMoEFFN:
        # `.to(...)` gives the weights other storage; a fold that holds the old one would keep it in memory.
        self.refold()
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its folds; the next one by name becomes active if it was."""
        self._folds.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the layer is not a linear map of its input, so no MLP weights can hold it."""
        raise NotImplementedError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Refused, as nothing can have been merged."""
        raise NotImplementedError("GraphMoE adapters are never merged, so there is nothing to unmerge")

    def _active_name(self) -> str | None:
        """The adapter to run, or None for the base MLP alone."""
        if self.disable_adapters:
            return None
        present = [name for name in self.active_adapters if name in self.lora_graphmoe]
        if len(present) > 1:
            raise ValueError(
                f"one GraphMoE adapter can be active at a time, got {', '.join(present)}: rounds of different "
                "adapters do not add up; activate one with set_adapter"
            )
        return present[0] if present else None

    def _weights(self, adapter_name: str) -> LayerWeights:
        """The base and an adapter's parameters as they are now, as the kernels take them."""
        adapter: GraphMoEAdapter = self.lora_graphmoe[adapter_name]  # type: ignore[assignment]
        gru = None if adapter.gru is None else adapter.gru.tensors()
        return LayerWeights(wrap_mlp(self.base_layer), adapter.router.weight, adapter.experts.tensors(), gru)

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}; pass hidden states, not token ids")
        if x.shape[-1] != self.sizes.hidden:
            raise ValueError(
                f"x must have the MLP's hidden size {self.sizes.hidden} as its last dimension, got {list(x.shape)}"
            )
        weight: Tensor = self.base_layer.down_proj.weight  # type: ignore[union-attr, assignment]
        device, dtype = weight.device, weight.dtype
        if device.type == "meta":
            raise ValueError(
                "this layer's weights hold no data (meta device): weights offloaded to CPU or disk are not "
                "supported; load the model with a device_map that keeps decoder layers on a device"
            )
        if x.device != device:
            raise ValueError(f"x is on {x.device}, the layer on {device}; move one of them")
        if dtype.is_floating_point and x.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"x is {x.dtype}, the MLP's weights are {dtype}; cast one of them or use torch.autocast")

    def _records(self, config: GraphMoEConfig) -> bool:
        return self.routing_context.collecting or (self.training and config.router_aux_loss_coef > 0)

    def _token_mask(self, x: Tensor) -> Tensor | None:
        """The batch's padding mask for the tokens of x, flattened to [N], or None if all count."""
        mask = self.routing_context.token_mask
        if mask is None or x.dim() != 3:
            return None
        if mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
            return None
        return mask[:, -x.shape[1] :].reshape(-1).bool().to(x.device)

    def __getattr__(self, name: str) -> Any:
        """As ``nn.Module``; who looks for the MLP's projections here is told where they are."""
        if name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
            raise AttributeError(
                f"FusedGraphMoEFFN has no {name} of its own: the MLP is its base_layer. If this comes from a "
                "forward that Liger-Kernel put on the layer, apply its patches without swiglu/geglu."
            )
        return super().__getattr__(name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return super()._get_base_layer_device_and_dtype(base_layer.down_proj)

"""What a wrapped MLP and a wrapped linear have in common: adapters by name, records of their routing, kept folds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn

from graphmoe_kernels import FoldCache, RethinkingSpec
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.recomputation import Repeats, Run, same_run
from graphmoe_model.layers.refusals import NO_DATA_PARALLEL, not_mergeable
from graphmoe_model.layers.scaling import ScaledLayer
from graphmoe_model.routing.global_routing import sum_over_processes
from graphmoe_model.routing.record import RoutingContext, RoutingRecord
from graphmoe_model.storage.dequantise import input_dtype, keep_unpacked, stored_device
from graphmoe_model.storage.offloading import is_offloaded, onloaded_for_forward
from graphmoe_model.storage.weight_management import (
    WeightManager,
    check_nothing_wrapped,
    check_whole,
    keeps_folds,
    weight_manager,
)

if TYPE_CHECKING:
    from graphmoe_model.routing.router_loss_hooks import RouterLossHooks


class RoutedLayer(ScaledLayer, nn.Module, BaseTunerLayer):
    """A frozen ``base_layer`` with routed adapters in ``lora_graphmoe``, one of which is active.

    Attributes:
        routing_context: where its routers' records go; shared by all layers of a model.
        router_loss_hooks: those of the model around it, or None for a layer on its own.
        repeats: its forwards that checkpointing ran again in the last backward pass that did.
    """

    in_features: int
    width_name: str  # what messages call in_features
    adapter_layer_names = ("lora_graphmoe",)
    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, config: GraphMoEConfig, adapter_name: str) -> None:
        super().__init__()
        if not isinstance(config, GraphMoEConfig):
            raise TypeError(f"config must be a GraphMoEConfig, got {type(config).__name__}")
        self.base_layer = base_layer
        self.lora_graphmoe = nn.ModuleDict()
        self.scaling = {}
        self.routing_context = RoutingContext()
        self.router_loss_hooks: RouterLossHooks | None = None
        self.repeats = Repeats()
        self._folds: dict[str, FoldCache] = {}
        self._specs: dict[str, tuple[tuple[Any, ...], RethinkingSpec]] = {}  # by adapter, with what they were made of
        self._under_fsdp = False
        base_layer.requires_grad_(False)
        keep_unpacked(base_layer)
        self._active_adapter = adapter_name

    def _add_adapter(self, adapter_name: str, adapter: nn.Module, fold: FoldCache, config: GraphMoEConfig) -> None:
        """Enter an adapter, where the base is."""
        self.lora_graphmoe[adapter_name] = adapter
        self.scaling[adapter_name] = self._trained_scale(adapter_name)
        self._folds[adapter_name] = fold
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def refold(self) -> None:
        """Forget the cached folds; the next forward in evaluation builds them anew."""
        for cache in self._folds.values():
            cache.drop()

    def train(self, mode: bool = True) -> RoutedLayer:
        """As ``nn.Module.train``; drops the cached folds, also on eval()."""
        self.refold()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> RoutedLayer:
        """Refused: ``nn.DataParallel`` calls this for each of its copies."""
        raise RuntimeError(NO_DATA_PARALLEL)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedLayer:
        # `.to(...)` gives the weights other storage; a fold that holds the old one would keep it in memory.
        self.refold()
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its folds; the next one by name becomes active if it was."""
        self._folds.pop(adapter_name, None)
        self._specs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        if self.router_loss_hooks is not None:
            self.router_loss_hooks.remove_if_unused()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a layer that routes or rethinks is no linear map of its input, so no base weights can hold it."""
        names = self.active_adapters if adapter_names is None else adapter_names
        raise NotImplementedError(not_mergeable(self.adapter(name).config for name in names if name in self.scaling))

    def unmerge(self) -> None:
        """Refused, as nothing can have been merged."""
        raise NotImplementedError("GraphMoE adapters are never merged, so there is nothing to unmerge")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out] for x [..., in] of a floating dtype, on the base layer's device.

        A non-finite x gives a non-finite y for its token and leaves the other tokens alone.

        Raises:
            TypeError: x is not floating point, or of another dtype than the base's plain weights outside of autocast;
                in training, a linear of the base passes no gradient to its input.
            ValueError: x has another width or is on another device.
            RuntimeError: FSDP or tensor parallelism was applied to a part of the layer, or parameters that get
                gradients are offloaded.
        """
        if is_offloaded(self):
            with onloaded_for_forward(self):
                return self._forward(x, *args, offloaded=True, **kwargs)
        return self._forward(x, *args, offloaded=False, **kwargs)

    def _forward(self, x: Tensor, *args: Any, offloaded: bool, **kwargs: Any) -> Tensor:
        """`forward` with all weights on their device."""
        name = self.counted_name()
        if name is None:
            return self.base_layer(x, *args, **kwargs)
        adapter = self.adapter(name)
        linear = self._output_linear()
        self._check_x(x, linear)
        manager = self._manager(linear, adapter.trained(), name, offloaded)
        y, logits = self._adapted(x, name, adapter, manager, *args, **kwargs)
        return self._finish(y, x, adapter, logits)

    def _adapted(
        self, x: Tensor, name: str, adapter: Any, manager: WeightManager, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        """y [..., out] of the adapter called ``name``, and its routers' logits: by router, then by round, [N, n] each.

        Args:
            x: [..., in], checked.
            name: of the active adapter.
            adapter: that adapter.
            manager: who manages the layer's weights.
            args, kwargs: for the base layer.
        """
        raise NotImplementedError

    def _output_linear(self) -> Any:
        """The base's linear that gives its output."""
        raise NotImplementedError

    def adapter(self, name: str) -> Any:
        """The trainable part called ``name``; past ``nn.Module.__getattr__``, as every forward asks."""
        return self._modules["lora_graphmoe"]._modules[name]  # type: ignore[union-attr]

    def active_name(self) -> str | None:
        """The adapter to run, or None for the base layer alone; ``ValueError`` if there is more than one."""
        if self.disable_adapters:
            return None
        adapters = self._modules["lora_graphmoe"]._modules  # type: ignore[union-attr]
        present = [name for name in self.active_adapters if name in adapters]
        if len(present) > 1:
            raise ValueError(
                f"one GraphMoE adapter can be active at a time, got {', '.join(present)}: rounds of different "
                "adapters do not add up; activate one with set_adapter"
            )
        return present[0] if present else None

    def counted_name(self) -> str | None:
        """The active adapter unless its scaling is 0, where the layer is the base layer (also without a gradient)."""
        name = self.active_name()
        return None if name is None or self.scaling[name] == 0 else name

    def active_config(self) -> GraphMoEConfig | None:
        """The active adapter's configuration."""
        name = self.active_name()
        return None if name is None else self.adapter(name).config

    def run(self) -> Run:
        """What a forward depends on now besides tensors."""
        name, config = self.active_name(), self.active_config()
        if name is None or config is None:
            return Run(None, 0.0, 1.0)
        return Run(name, config.lora_dropout if self.training else 0.0, self.scaling[name])

    def _finish(self, y: Tensor, x: Tensor, adapter: Any, logits: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        """y, once a forward on x [..., in] has left its routers' logits ([N, n], by router and round) behind."""
        config, context = adapter.config, self.routing_context
        trains = self.training and config.router_aux_loss_coef > 0
        if logits and (trains or context.loads):
            mask = context.token_mask(x)
            named = zip(adapter.router_names, logits, strict=True)
            records = [self._routing_record(adapter, name, rounds, mask) for name, rounds in named]
            alone = context.record(self, records, trains=trains)
            if alone is not None:
                sum_over_processes(alone, [self])
        return same_run(y, self)

    def _spec(self, name: str, adapter: Any) -> RethinkingSpec:
        """The active adapter's settings for the kernels as they are now; the same object as long as they are the same.

        By that `graphmoe_kernels.rethink` knows that it has checked them.
        """
        config, scale = adapter.config, self.scaling[name]
        if torch.compiler.is_compiling():
            return config.spec(scale, adapter.num_experts, self._activation(), training=self.training)
        key = (
            *(scale, self.training, config.rounds, config.top_k, config.norm_topk_prob, config.method),
            *(config.candidate_input, config.candidate_activation, config.lora_dropout, adapter.num_experts),
        )
        kept = self._specs.get(name)
        if kept is None or kept[0] != key:
            spec = config.spec(scale, adapter.num_experts, self._activation(), training=self.training)
            kept = self._specs[name] = key, spec
        return kept[1]

    def _activation(self) -> str:
        """The kernels' name of the base's activation."""
        raise NotImplementedError

    def router_shapes(self) -> dict[str, tuple[int, int]]:
        """[T, n] of each of the active adapter's routers, by name relative to the layer."""
        adapter = self.adapter(self.active_name())  # type: ignore[arg-type]
        return dict.fromkeys(adapter.router_names, (adapter.rounds, adapter.num_experts))

    def _routing_record(
        self, adapter: Any, router: str, logits: tuple[Tensor, ...], token_mask: Tensor | None
    ) -> RoutingRecord:
        config = adapter.config
        return RoutingRecord(
            logits,
            token_mask,
            top_k=logits[0].shape[1] if config.base_method.dense else config.top_k,
            form="topk" if config.router_aux_loss == "paper" else "full",
            backend=config.backend,
            coefficient=config.router_aux_loss_coef,
            trains=any(p.requires_grad for name, p in adapter.named_parameters() if "router" in name.split(".")),
            layer=self,
            router=router,
        )

    def _manager(self, linear: nn.Module, trained: Tensor, adapter_name: str, offloaded: bool) -> WeightManager:
        """Who manages this layer's weights at present; ``linear`` and further ones are as in `weight_manager`.

        Raises:
            RuntimeError: a part of the layer is split over processes by itself.
        """
        manager = weight_manager(self, linear, trained, offloaded)
        if manager is not WeightManager.ZERO3 and distributed.is_available() and distributed.is_initialized():
            check_whole(self, self._read_by_forward(adapter_name))
        if manager is WeightManager.FSDP and not self._under_fsdp:
            check_nothing_wrapped(self)
            self._under_fsdp = True  # what FSDP has once begun to run is not wrapped any further
        return manager

    def _kept_fold(self, adapter_name: str, manager: WeightManager) -> FoldCache | None:
        """Where an adapter's fold is kept between forwards; None if it must not be."""
        cache = self._folds[adapter_name]
        if keeps_folds(manager):
            return cache
        if not torch.compiler.is_compiling():
            cache.drop()  # it would keep the memory of weights that were managed only after it was built
        return None

    def _read_by_forward(self, adapter_name: str) -> list[Tensor]:
        """The parameters that a forward reads itself, those of the base included."""
        raise NotImplementedError

    def _check_x(self, x: Tensor, linear: nn.Module) -> None:
        """`TypeError` or `ValueError` for an x that the base layer, with this ``linear`` in it, does not take."""
        width = self.in_features
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of hidden states [..., {width}], got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}; pass hidden states, not token ids")
        if x.shape[-1] != width:
            raise ValueError(f"x must have the {self.width_name} {width} as its last dimension, got {list(x.shape)}")
        device, dtype = stored_device(linear), input_dtype(linear)
        if device.type == "meta":
            raise ValueError(
                "this layer's weights hold no data (meta device), and no hook of accelerate's brings them; load them "
                "first (from_pretrained without init_empty_weights; load_state_dict(..., assign=True))"
            )
        if x.device != device:
            raise ValueError(f"x is on {x.device}, the layer on {device}; move one of them")
        if dtype is not None and x.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"x is {x.dtype}, the layer's weights are {dtype}; cast one of them or use torch.autocast")


def experts_of_layer(config: GraphMoEConfig, num_experts: int | None) -> int:
    """n for one layer: as given, or the config's own number.

    Raises:
        ValueError: neither says it (the config has a list or a pattern), or it is below the config's top_k.
    """
    if num_experts is None:
        if not isinstance(config.num_experts, int):
            raise ValueError(
                f"the config's num_experts={config.num_experts!r} differs by layer, so say how many this one has: "
                "FusedGraphMoEFFN(mlp, config, num_experts=4); get_peft_model does that for the layers of a model"
            )
        return config.num_experts
    if num_experts < config.top_k and not config.base_method.dense:
        raise ValueError(f"num_experts={num_experts} is below the config's top_k={config.top_k}")
    return num_experts

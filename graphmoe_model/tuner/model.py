"""GraphMoE as a PEFT method: routed experts with rethinking on MLPs, LoRA on attention projections."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from graphmoe_model.checkpoints import check_source, fitting_state, loaded_in_place, own_tensors, saved_key
from graphmoe_model.config import GraphMoEConfig, rank_and_alpha
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_model.layers.refusals import not_mergeable
from graphmoe_model.layers.routed_layer import RoutedLayer
from graphmoe_model.layers.scaling import scale_dora
from graphmoe_model.routing.router_loss_hooks import (
    attach_router_loss,
    check_router_loss,
    detach_router_loss,
    find_hooks,
)
from graphmoe_model.routing.trainer_view import routed_config
from graphmoe_model.storage.dequantise import check_gradients, keep_unpacked, same_parameter
from graphmoe_model.storage.offloading import onloaded
from graphmoe_model.tuner.adapter_names import check_adapter_name, check_first_name
from graphmoe_model.tuner.decoder_layers import is_mlp
from graphmoe_model.tuner.selection import check_selected, experts_by_name
from graphmoe_model.tuner.targets import check_targets, default_targets
from graphmoe_model.undo import ModelState

_GENERATING_TASKS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)


class GraphMoEModel(LoraModel):
    """The tuner behind ``get_peft_model(model, GraphMoEConfig(...))``.

    Attention projections get LoRA layers by ``LoraModel``'s own machinery, gated MLPs become
    `FusedGraphMoEFFN`. Without ``target_modules`` both are found from the model's modules
    (`graphmoe_model.tuner.decoder_layers`).

    What LoRA can and this method cannot do raises an error before anything has changed: merging, weighted
    sums of adapters, more than one active adapter, batches that mix adapters.
    """

    prefix = "lora_"
    tuner_layer_cls: Any = (LoraLayer, RoutedLayer)  # PEFT only ever passes it to isinstance

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        check_first_name(model, adapter_name)
        if isinstance(peft_config, dict):  # as PeftModel gives it, whose class for this task fails after attaching
            task = peft_config[adapter_name].task_type
            if task in _GENERATING_TASKS and not hasattr(model, "prepare_inputs_for_generation"):
                raise ValueError(
                    f"task_type={TaskType(task).value!r} is for models that generate, and this {type(model).__name__} "
                    "cannot (it has no prepare_inputs_for_generation); leave task_type out, or load the model with its "
                    "head (AutoModelForCausalLM)"
                )
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Check as for LoRA: PEFT knows the modules on which LoRA would be ignored by the model type."""
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)  # type: ignore[arg-type]
        for name, other in self.peft_config.items():
            if not isinstance(other, GraphMoEConfig):
                raise ValueError(
                    f"GraphMoE cannot be combined with the {type(other).__name__} adapter {name!r} on this "
                    "model; unload() that one first"
                )
            if other is config:
                other.check()

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, GraphMoEConfig)
        if peft_config.target_modules is None:
            targets: Any = default_targets(self.model, peft_config)  # a set, as PEFT itself makes it
            peft_config.target_modules = targets
        else:
            check_targets(self.model, peft_config)
        self._by_layer = experts_by_name(self.model, peft_config)
        check_selected(self.model, peft_config, self._by_layer, list(self.peft_config))
        check_router_loss(self.model, peft_config)  # last: that the base's MLPs are sparse says more
        if not peft_config.inference_mode:
            check_gradients(self.model)
        return peft_config

    def _create_and_replace(  # type: ignore[override]  # LoraModel's differs from BaseTuner's
        self, lora_config: PeftConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        with onloaded(target):  # the adapter goes where its base's weights are, and offloaded ones are nowhere
            self._adapt(lora_config, adapter_name, target, *args, **kwargs)

    def _adapt(
        self,
        lora_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(lora_config, GraphMoEConfig)
        if not is_mlp(target) and lora_config.base_method.attention == "lora":
            with same_parameter(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target):
                super()._create_and_replace(
                    lora_config,
                    adapter_name,
                    target,
                    target_name,
                    parent,
                    current_key,
                    parameter_name=parameter_name,
                )
            scale_dora(parent.get_submodule(target_name), adapter_name)  # type: ignore[arg-type]
            return
        r, alpha = rank_and_alpha(lora_config, current_key)
        settings: dict[str, Any] = {"r": r, "lora_alpha": alpha, "num_experts": self._num_experts(current_key)}
        if isinstance(target, FusedGraphMoEFFN | RoutedLoRALinear):
            target.update_layer(adapter_name, lora_config, **settings)
            return
        layer: RoutedLayer
        try:
            if is_mlp(target):
                layer = FusedGraphMoEFFN(target, lora_config, adapter_name, **settings)
            else:
                layer = RoutedLoRALinear(target, lora_config, adapter_name, **settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _num_experts(self, name: str) -> int | None:
        """Return n of the decoder layer that a module is in, where it differs by layer in the adapter."""
        for layer, count in self._by_layer.items():
            if name.startswith(f"{layer}."):
                return count
        return None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one; ``ValueError`` for more than one."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"one GraphMoE adapter can be active at a time, got {', '.join(adapter_name)}: rounds of "
                "different adapters do not add up"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, another one becomes so in all layers.

        PEFT lets the first adapted layer decide which, and none is where that layer has no other adapter.
        """
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            self.set_adapter((self.active_adapters or sorted(self.peft_config))[0])

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to average adapters: averaged routers, experts and GRUs compute no average of the outputs."""
        raise NotImplementedError(
            "GraphMoE adapters cannot be combined by weights: routing and rethinking are nonlinear in them; train one "
            "adapter on the data of both, switch between them with set_adapter, or average the logits of two forwards"
        )

    def _check_merge_allowed(self) -> None:
        """Refuse to merge, where PEFT asks before it merges the first layer."""
        raise NotImplementedError(not_mergeable([self.peft_config[name] for name in self.active_adapters]))

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (a batch that mixes adapters) is not supported by GraphMoE; run one batch per "
                "adapter, with set_adapter before each"
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter as PEFT does, the first or a further one; the model's loss then has the router loss in it.

        Whatever is refused, by this package or by PEFT, leaves the model and the configuration as they were.
        """
        state = ModelState(self.model, self, self.peft_config[adapter_name])
        try:
            check_adapter_name(self.model, adapter_name, self.peft_config)
            keep_unpacked(self.model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            attach_router_loss(self.model)
        except BaseException:
            state.restore()
            self.peft_config.pop(adapter_name, None)  # PEFT enters the config first; a refused one must not stay
            if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
                vars(self.model).pop("_hf_peft_config_loaded", None)  # set by Transformers before it calls PEFT
            raise

    @property
    def config(self) -> Any:
        """Return the base model's configuration, as trainers read it: with the active adapter's routers."""
        config, hooks = self.model.config, find_hooks(self.model)
        if hooks is None or not isinstance(config, PreTrainedConfig):
            return config  # a dict or a dataclass, say, which PEFT reads as such
        return routed_config(config, hooks)

    def unload(self) -> nn.Module:
        """Give the base model back with the modules and values it had before any adapter, still frozen.

        Copies that ``modules_to_save`` trained go with the adapter; save it first to keep them.
        """
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])  # PEFT would leave the active adapter's copy in the module's place
        model = super().unload()
        detach_router_loss(model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Name a tensor as checkpoints do, also without what wrappers (activation checkpointing) put into names."""
        return saved_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # PEFT passes all of them by name
        cls, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Select an adapter's tensors as PEFT does for any method but LoRA.

        For LoRA it saves DoRA's magnitudes as ``lora_magnitude_vector`` without ``.weight``: by that name
        Transformers' own loader would leave them at their start, and say nothing.
        """
        return own_tensors(model, adapter_name, state_dict)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise ValueError(
            "path_initial_model_for_weight_conversion is for LoRA initialisations that change the base model "
            "(PiSSA, CorDA, OLoRA); GraphMoE has none: leave it out"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_source()
        return loaded_in_place(model, fitting_state(model, adapter_name, state_dict))

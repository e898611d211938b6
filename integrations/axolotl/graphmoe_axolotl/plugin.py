"""The plugin: tells Axolotl of ``adapter: graphmoe``, and attaches or loads the adapter when its model is there."""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model

from graphmoe_axolotl.settings import ADAPTER, KEYS, OPTIONS, adapter_config, given_settings, yaml_names
from graphmoe_model import GraphMoEConfig, RouterLossCallback


class GraphMoEPlugin(BasePlugin):
    """Trains GraphMoE, MixLoRA, LoRAMoE and MoLA where a YAML file says ``adapter: graphmoe``."""

    def get_input_args(self) -> str:
        """Name the pydantic model of the plugin's keys."""
        return "graphmoe_axolotl.GraphMoEArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name the adapter; it is not loaded as LoRA is, and has no merge for ReLoRA's restarts."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False, relora=False)]

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse options outside their block: Axolotl's schema drops what it does not know without a word.

        Raises:
            ValueError: an option of the block ``graphmoe`` beside it.
        """
        lost = [key for key in cfg if str(key).removeprefix(f"{ADAPTER}_") in OPTIONS]
        if lost and cfg.get("adapter") == ADAPTER:
            raise ValueError(f"{', '.join(lost)}: Axolotl drops options here; write them in the block {ADAPTER}:")

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        """Attach a new adapter to the model, or load the one in ``lora_model_dir``.

        Args:
            model: the base model.
            cfg: Axolotl's configuration, parsed.
            inference: whether the adapter is frozen.
            config_only: make the configuration alone (TRL's trainers attach it); the model is then None.

        Returns:
            The PEFT model and its configuration; None where ``adapter`` is another one.

        Raises:
            ValueError: a key does not fit, or a saved adapter is of another kind or made with other settings.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = adapter_config(cfg, _task_type(model))
        if config_only:
            return None, config
        # PEFT's own default is True: adapters are trained in fp32 on a base in bf16.
        autocast = True if cfg.peft_autocast_adapter_dtype is None else cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            config = _saved_config(cfg)
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, autocast_adapter_dtype=autocast
            )
        else:
            with yaml_names():  # names that select nothing are found with the model alone
                model = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            model.print_trainable_parameters()
        return model, config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Put ``aux_loss`` into the logs, where there is a router loss."""
        if cfg.adapter != ADAPTER or cfg.rl or not model.peft_config["default"].router_aux_loss_coef:
            return []
        return [RouterLossCallback()]


def _task_type(model: Any) -> str:
    name = type(model).__name__
    kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next((task for kind, task in kinds.items() if kind in name), "CAUSAL_LM")


def _saved_config(cfg: Any) -> GraphMoEConfig:
    """Read the configuration of a saved adapter, which holds; ``ValueError`` if the YAML file says something else."""
    saved = PeftConfig.from_pretrained(cfg.lora_model_dir)
    if not isinstance(saved, GraphMoEConfig):
        raise ValueError(
            f"lora_model_dir={cfg.lora_model_dir!r} is an adapter of type {saved.peft_type}, and adapter is {ADAPTER}; "
            "name one that GraphMoE saved, or set adapter to the one that fits"
        )
    given = given_settings(cfg)
    if not given.get("lora_dropout"):  # Axolotl writes 0.0 where the file has none
        given.pop("lora_dropout", None)
    made = GraphMoEConfig(**given)  # as the saved one was: names in sets, defaults filled in
    pairs = {KEYS.get(name, name): (getattr(made, name), getattr(saved, name)) for name in given}
    other = [f"{key}={here!r}, saved {there!r}" for key, (here, there) in pairs.items() if here != there]
    if other:
        raise ValueError(
            f"the adapter in lora_model_dir={cfg.lora_model_dir!r} was made with other settings: {'; '.join(other)}. "
            "Leave these keys out, or give the saved values"
        )
    return saved

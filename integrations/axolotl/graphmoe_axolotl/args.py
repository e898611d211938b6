"""The block ``graphmoe:`` of a YAML file, checked as Axolotl reads the file: before a model is loaded."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from graphmoe_axolotl.settings import ADAPTER, OPTIONS, adapter_config

_NOT_LOADED = ("dpo", "ipo", "kto")  # Axolotl's load_adapter is asked for the configuration alone


class GraphMoEArgs(BaseModel):
    """What the plugin adds to Axolotl's schema; Axolotl makes one class of both, so the other keys are seen here."""

    graphmoe: dict[str, Any] | None = Field(
        default=None, description=f"Options of adapter: graphmoe; LoRA's keep Axolotl's keys. {', '.join(OPTIONS)}"
    )

    @model_validator(mode="after")
    def check_graphmoe(self) -> GraphMoEArgs:
        """Check every key that the adapter reads; ``ValueError`` names the first that does not fit."""
        cfg = vars(self)
        adapter = cfg.get("adapter")
        if adapter != ADAPTER:
            if self.graphmoe is not None:
                raise ValueError(
                    f"the block {ADAPTER}: is there, but adapter is {adapter!r}; write adapter: {ADAPTER}, or leave "
                    "the block out"
                )
            return self
        config = adapter_config(cfg)
        if cfg.get("rl"):
            self._check_rl(cfg, config.router_aux_loss_coef)
        if cfg.get("gradient_checkpointing"):
            self._check_checkpointing(cfg, config.router_aux_loss_coef)
        return self

    def _check_rl(self, cfg: dict[str, Any], coefficient: float) -> None:
        """Refuse what Axolotl's TRL (1.9) cannot do: it ends in an error about ``aux_loss``."""
        rl = str(getattr(cfg["rl"], "value", cfg["rl"]))
        if coefficient:
            raise ValueError(
                f"rl: {rl} does not work with the router loss: Axolotl's version of TRL finds none in the model's "
                f"outputs; set {ADAPTER}.router_aux_loss_coef: 0"
            )
        if cfg.get("lora_model_dir") and rl in _NOT_LOADED:
            raise ValueError(
                f"lora_model_dir={cfg['lora_model_dir']!r} would be ignored: with rl: {rl} Axolotl makes a new "
                "adapter; leave it out, or train the loaded adapter by TRL's own trainer"
            )

    def _check_checkpointing(self, cfg: dict[str, Any], coefficient: float) -> None:
        """Take the non-reentrant kind unless told otherwise: Axolotl's own gives the router loss no gradient."""
        kwargs = dict(cfg.get("gradient_checkpointing_kwargs") or {})
        if kwargs.get("use_reentrant") and coefficient:
            raise ValueError(
                f"gradient_checkpointing_kwargs={kwargs} gives the router loss no gradient; set use_reentrant: false, "
                f"or {ADAPTER}.router_aux_loss_coef: 0"
            )
        self.gradient_checkpointing_kwargs = {"use_reentrant": False} | kwargs

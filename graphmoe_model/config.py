"""The one configuration of the method: experts, rethinking, router loss, folds and backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any

from peft import LoraConfig

from graphmoe_kernels.backend import check_backend
from graphmoe_kernels.gru import CANDIDATE_ACTIVATIONS
from graphmoe_kernels.rethinking import CANDIDATE_INPUTS, FOLD_MODES, RethinkingSpec

METHODS = ("mixlora",)
ROUTER_AUX_LOSSES = ("paper", "switch")

# The fields of LoraConfig that this method implements; any other one must keep its default.
SUPPORTED_LORA_FIELDS = frozenset(
    [
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"),
    ]
)


class GraphMoEPeftType(str, Enum):
    """The method's name where PEFT expects a member of its own (closed) enumeration."""

    GRAPHMOE = "GRAPHMOE"


def _default(f: Field[Any]) -> object:
    """A dataclass field's default value."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def _check_real(name: str, value: object, what: str, holds: Callable[[float], bool]) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not holds(value):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number that is {what}, got {value!r}")


def _option(default: object, text: str):  # type: ignore[no-untyped-def]
    return field(default=default, metadata={"help": text})


@dataclass
class GraphMoEConfig(LoraConfig):
    """Mixture of LoRA experts on the MLPs, with self-rethinking, and plain LoRA on the attention projections.

    The fields of ``LoraConfig`` that are not listed here and that this method implements: ``use_rslora``,
    ``init_lora_weights`` (True or False), ``target_modules``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``modules_to_save``, ``trainable_token_indices``, ``rank_pattern``, ``alpha_pattern``,
    ``inference_mode``. Any other one, when set, raises ``ValueError``.

    ``target_modules`` names MLPs as a whole (``"mlp"``), beside linears for LoRA; without it, every attention
    projection and every gated MLP of the decoder layers is adapted.

    Raises:
        ValueError: a value out of range, an unknown name, or options of ``LoraConfig`` that GraphMoE does not
            implement (all of them in one message).
    """

    r: int = _option(16, "LoRA rank of every expert and of the attention projections")
    lora_alpha: int = _option(32, "LoRA scale: s = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)")
    lora_dropout: float = _option(0.05, "dropout on the input of every A, in training")
    method: str = _option("mixlora", "what an expert is: 'mixlora', a whole MLP with LoRA on gate, up and down")
    num_experts: int = _option(8, "n, experts a layer")
    top_k: int = _option(2, "k, experts a token and round")
    rounds: int = _option(3, "T, rounds of self-rethinking; 1 is the base method without a GRU")
    gru_hidden_scale: float = _option(0.1, "GRU width as a share of the hidden size: G = int(scale * D)")
    candidate_input: str = _option("expert_output", "of the GRU candidate: 'expert_output' or 'hidden_state'")
    candidate_activation: str = _option("sigmoid", "of the GRU candidate: 'sigmoid' or 'tanh'")
    norm_topk_prob: bool = _option(True, "divide the chosen routing weights by their sum")
    router_aux_loss_coef: float = _option(0.01, "weight of the load-balance loss; 0 turns it off")
    router_aux_loss: str = _option("paper", "'paper' (Eq. 8, top-k entries) or 'switch' (full softmax)")
    fold: str = _option("auto", "'auto', 'always' or 'never': how later rounds are computed, not what")
    backend: str = _option("auto", "'auto', 'triton' or 'torch': which implementation of the operators runs")

    def __post_init__(self) -> None:
        self.check_supported()
        super().__post_init__()
        self.peft_type = GraphMoEPeftType.GRAPHMOE
        self._check_numbers()
        self._check_names()

    def check_supported(self) -> None:
        """``ValueError`` naming every option of ``LoraConfig`` that is set but not implemented here."""
        refused = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(LoraConfig)
            if f.name not in SUPPORTED_LORA_FIELDS and getattr(self, f.name) != _default(f)
        ]
        if not isinstance(self.init_lora_weights, bool):
            refused.append(f"init_lora_weights={self.init_lora_weights!r} (True and False are)")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            refused.append(
                "target_modules='all-linear' (MLPs are adapted as a whole, not linear by linear; leave it "
                "out to adapt all attention projections and MLPs)"
            )
        if refused:
            raise ValueError(f"GraphMoE does not implement these options of LoraConfig: {'; '.join(refused)}")

    def _check_numbers(self) -> None:
        counts = {name: getattr(self, name) for name in ("r", "num_experts", "top_k", "rounds")}
        counts.update({f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()})
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}; a token cannot choose more")
        alphas = {f"alpha_pattern[{key!r}]": value for key, value in (self.alpha_pattern or {}).items()}
        for name, value in {"lora_alpha": self.lora_alpha, **alphas}.items():
            _check_real(name, value, "positive", lambda v: v > 0)
        _check_real("gru_hidden_scale", self.gru_hidden_scale, "positive", lambda v: v > 0)
        _check_real("lora_dropout", self.lora_dropout, "in [0, 1)", lambda v: 0 <= v < 1)
        _check_real("router_aux_loss_coef", self.router_aux_loss_coef, "0 or positive", lambda v: v >= 0)

    def _check_names(self) -> None:
        choices = {
            "method": METHODS,
            "candidate_input": CANDIDATE_INPUTS,
            "candidate_activation": CANDIDATE_ACTIVATIONS,
            "router_aux_loss": ROUTER_AUX_LOSSES,
            "fold": FOLD_MODES,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, known))}")
        for name in ("norm_topk_prob", "use_rslora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_backend(self.backend)

    def gru_width(self, hidden_size: int) -> int:
        """G for a model of this hidden size; ``ValueError`` if it is 0 while there are rounds to join."""
        width = int(self.gru_hidden_scale * hidden_size)
        if width < 1 and self.rounds > 1:
            raise ValueError(
                f"gru_hidden_scale={self.gru_hidden_scale} gives a GRU of width 0 at hidden size "
                f"{hidden_size}; it must be at least {1 / hidden_size:.3g}, or set rounds=1"
            )
        return width

    def scaling(self, r: int | None = None, lora_alpha: float | None = None) -> float:
        """s for a rank and alpha (the config's own by default)."""
        r = self.r if r is None else r
        alpha = self.lora_alpha if lora_alpha is None else lora_alpha
        return alpha / (r**0.5 if self.use_rslora else r)

    def spec(self, activation: str, scale: float, *, training: bool, statistics: bool) -> RethinkingSpec:
        """The kernels' settings for a layer with this activation and LoRA scale."""
        kind = "topk" if self.router_aux_loss == "paper" else "full"
        return RethinkingSpec(
            rounds=self.rounds,
            top_k=self.top_k,
            scale=scale,
            activation=activation,
            normalize=self.norm_topk_prob,
            candidate_input=self.candidate_input,
            candidate_activation=self.candidate_activation,
            dropout=self.lora_dropout if training else 0.0,
            statistics=kind if statistics else None,
        )

"""The one configuration of the method: experts, rethinking, router loss, folds and backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from peft import LoraConfig

from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.gru import CANDIDATE_ACTIVATIONS
from graphmoe_kernels.rethinking import CANDIDATE_INPUTS, FOLD_MODES, RethinkingSpec

METHODS = ("mixlora",)
ROUTER_AUX_LOSSES = ("paper", "switch")


class GraphMoEPeftType(str, Enum):
    """The method's name where PEFT expects a member of its own (closed) enumeration."""

    GRAPHMOE = "GRAPHMOE"


def _option(default: object, text: str):  # type: ignore[no-untyped-def]
    return field(default=default, metadata={"help": text})


@dataclass
class GraphMoEConfig(LoraConfig):
    """Mixture of LoRA experts on the MLPs, with self-rethinking, and plain LoRA on the attention projections.

    The fields of ``LoraConfig`` that are not listed here and that this method implements: ``lora_dropout`` (on the
    input of every A, in training), ``use_rslora``, ``init_lora_weights`` (True or False), ``target_modules``,
    ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``, ``modules_to_save``, ``rank_pattern``,
    ``alpha_pattern``, ``inference_mode``. Any other one, when set, raises ``ValueError``.
    """

    r: int = _option(16, "LoRA rank of every expert and of the attention projections")
    lora_alpha: int = _option(32, "LoRA scale: s = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)")
    lora_dropout: float = _option(0.05, "dropout on the input of every A, in training")
    method: str = _option("mixlora", "what an expert is: 'mixlora', a whole SwiGLU with LoRA on gate, up and down")
    num_experts: int = _option(8, "n, experts a layer")
    top_k: int = _option(2, "k, experts a token and round")
    rounds: int = _option(3, "T, rounds of self-rethinking; 1 is the base method without a GRU")
    gru_hidden_scale: float = _option(0.1, "GRU width as a share of the hidden size: G = int(scale * D)")
    candidate_input: str = _option("expert_output", "what the GRU candidate reads: 'expert_output' or 'hidden_state'")
    candidate_activation: str = _option("sigmoid", "of the GRU candidate: 'sigmoid' or 'tanh'")
    norm_topk_prob: bool = _option(True, "divide the chosen routing weights by their sum")
    router_aux_loss_coef: float = _option(0.01, "weight of the load-balance loss; 0 turns it off")
    router_aux_loss: str = _option("paper", "Eq. 8 of the paper ('paper', top-k entries) or 'switch' (full softmax)")
    fold: str = _option("auto", "'auto', 'always' or 'never': how later rounds are computed, not what")
    backend: str = _option("auto", "'auto' or 'torch': which implementation runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GraphMoEPeftType.GRAPHMOE  # type: ignore[assignment]
        self._check_numbers()
        self._check_names()

    def _check_numbers(self) -> None:
        for name, minimum in (("r", 1), ("num_experts", 1), ("top_k", 1), ("rounds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}; a token cannot choose more")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}")
        if not self.gru_hidden_scale > 0:
            raise ValueError(f"gru_hidden_scale must be positive, got {self.gru_hidden_scale!r}")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef must not be negative, got {self.router_aux_loss_coef!r}")

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
        resolve_backend(self.backend)

    def gru_width(self, hidden_size: int) -> int:
        """G for a model of this hidden size; ``ValueError`` if it is 0 while there are rounds to join."""
        width = int(self.gru_hidden_scale * hidden_size)
        if width < 1 and self.rounds > 1:
            raise ValueError(
                f"gru_hidden_scale={self.gru_hidden_scale} gives a GRU of width 0 at hidden size {hidden_size}; "
                f"it must be at least {1 / hidden_size:.3g}, or set rounds=1"
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

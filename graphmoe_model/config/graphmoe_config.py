"""The one configuration of the method: experts, rethinking, router loss, folds and backend."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from graphmoe_kernels import RethinkingSpec, shown
from graphmoe_model.config.checks import MAX_EXPERTS, check_names, check_numbers, check_selection
from graphmoe_model.config.refused_options import refused_options
from graphmoe_tables.methods import METHODS, Method, preset_settings

# The fields of LoraConfig that this method implements; any other one must keep its default.
SUPPORTED_LORA_FIELDS = frozenset(
    [
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    ]
)


class GraphMoEPeftType(str, Enum):  # noqa: UP042 - as PEFT's own members are
    """The method's name where PEFT expects a member of its own (closed) enumeration."""

    GRAPHMOE = "GRAPHMOE"


def _others(holds: Callable[[Method], bool]) -> str:
    return " or ".join(f"method={name!r}" for name, method in METHODS.items() if holds(method))


def rank_and_alpha(config: LoraConfig, name: str) -> tuple[int, float]:
    """r and alpha of the module of this name, by ``rank_pattern`` and ``alpha_pattern`` as PEFT matches them."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    return r, alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)


def _option(default: object, text: str):  # type: ignore[no-untyped-def]
    return field(default=default, metadata={"help": text})


@dataclass
class GraphMoEConfig(LoraConfig):
    """Mixture of LoRA experts on the MLPs, with self-rethinking, and what the method puts on the attention projections.

    ``method`` and ``use_dora`` name one of the eight base methods (`graphmoe_tables.methods.METHODS`); what is
    left at None has that method's default. ``rounds`` above 1 is GraphMoE on it.

    The fields of ``LoraConfig`` that are not listed here and that this method implements: ``use_rslora``, ``use_dora``,
    ``init_lora_weights`` (True or False), ``target_modules``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``modules_to_save``, ``trainable_token_indices``, ``ensure_weight_tying``, ``rank_pattern``,
    ``alpha_pattern``, ``inference_mode``. Any other one, when set, raises ``ValueError``.

    ``target_modules`` names MLPs as a whole (``"mlp"``), beside linears for LoRA; without it, every attention
    projection and every gated MLP of the decoder layers is adapted.

    Raises:
        ValueError: a value out of range, an unknown name, an option that the method does not have, or options of
            ``LoraConfig`` that GraphMoE does not implement (all of them in one message).
    """

    r: int = _option(16, "LoRA rank of every expert and of the attention projections")
    lora_alpha: int = _option(32, "LoRA scale: s = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)")
    lora_dropout: float = _option(0.05, "dropout on the input of every A, in training")
    method: str = _option(
        "mixlora",
        f"the base method: {', '.join(map(repr, METHODS))}; `graphmoe_tables.methods.METHODS` says what each is",
    )
    num_experts: int | list[int] | str = _option(  # noqa: RUF009 - a dataclass field, as the others
        None,
        "n, experts per layer: a number, a list with one for every decoder layer, or a pattern such as '2-4-6-8' for "
        "as many equal groups of layers; None: the method's own",
    )
    top_k: int = _option(None, "k, experts per token and round; None: the method's own")
    rounds: int = _option(
        None, "T, rounds of self-rethinking; 1 is the base method without a GRU; None: the method's own"
    )
    gru_hidden_scale: float = _option(0.1, "GRU width as a share of the hidden size: G = int(scale * D)")
    candidate_input: str = _option("expert_output", "of the GRU candidate: 'expert_output' or 'hidden_state'")
    candidate_activation: str = _option("sigmoid", "of the GRU candidate: 'sigmoid' or 'tanh'")
    norm_topk_prob: bool = _option(True, "divide the chosen routing weights by their sum")
    router_aux_loss_coef: float = _option(
        None, "weight of the load-balance loss, 0 turns it off; None: the method's own"
    )
    router_aux_loss: str = _option("paper", "'paper' (Eq. 8, top-k entries) or 'switch' (full softmax)")
    router_aux_loss_scope: str = _option(
        "local", "whose tokens the load-balance loss counts: 'local', each process's own, or 'global', of all processes"
    )
    fold: str = _option("auto", "'auto', 'always' or 'never': how later rounds are computed, not what")
    backend: str = _option("auto", "'auto', 'triton' or 'torch': which implementation of the operators runs")
    saved_digest: str | None = field(
        default=None,
        compare=False,
        metadata={"help": "written by save_pretrained, not set by hand: ties the configuration to its weights"},
    )

    def __post_init__(self) -> None:
        self._check_supported()
        check_selection(self)  # before PEFT makes sets of lists, and compiles what may be no regular expression
        super().__post_init__()
        self.peft_type = GraphMoEPeftType.GRAPHMOE
        check_names(self)
        for name in ("num_experts", "rounds", "router_aux_loss_coef"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.base_method, name))
        counts = self.expert_counts()
        if self.top_k is None:
            self.top_k = max(counts) if self.base_method.dense else self.base_method.top_k
        self.check()
        self._warn_of_idle_router(counts)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> GraphMoEConfig:
        """Return the papers' settings of a method; ``changes`` overrule them.

        ``name`` is one of `graphmoe_tables.methods.PRESETS`: a method's name in the literature in small letters, such
        as ``"mixlora"`` or ``"moda"``, or ``"graphmoe-mixlora"`` for GraphMoE on one with experts.

        Source: GraphMoE, Table 2; ranks as give the parameters in its Table 1.

        Raises:
            ValueError: there is no such preset, or what the constructor refuses.
        """
        settings = preset_settings(name)
        if changes.get("method", settings["method"]) != settings["method"]:
            raise ValueError(
                f"preset {name!r} is of another method than {changes['method']!r}; choose one of that method"
            )
        return cls(**{**settings, **changes})

    @property
    def base_method(self) -> Method:
        """What ``method`` names."""
        return METHODS[self.method]

    @property
    def title(self) -> str:
        """What the literature calls this method: ``"MixLoRA"``, ``"GraphMoE(MoDA)"``."""
        return self.base_method.name(self.use_dora, self.rounds)

    def check(self) -> None:
        """Check every field, whatever the model: at construction, and again when the config is attached.

        Raises:
            ValueError: as the constructor does.
        """
        self._check_supported()
        check_selection(self)
        check_names(self)
        counts = self.expert_counts()
        check_numbers(self)
        self._check_method(counts)

    def _check_supported(self) -> None:
        refused = refused_options(self, SUPPORTED_LORA_FIELDS)
        if refused:
            lines = "".join(f"\n- {option}: {why.reason}; {why.instead}" for option, why in refused.items())
            raise ValueError(f"GraphMoE does not implement these options of LoraConfig:{lines}")

    def expert_counts(self) -> list[int]:
        """The numbers in ``num_experts``, whatever its form."""
        given = self.num_experts
        parts: list[Any] = given if isinstance(given, list) else [given]
        if isinstance(given, str):
            if not re.fullmatch(r"[1-9]\d{0,9}(-[1-9]\d{0,9})+", given):
                raise ValueError(
                    f"num_experts={shown(given)} is no pattern; expected numbers joined by '-', such as '2-4-6-8' (a "
                    "list is [2, 4, 6, 8], one number for all layers an integer)"
                )
            parts = [int(part) for part in given.split("-")]
        if not parts or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in parts):
            raise ValueError(
                "num_experts must be an integer of at least 1, a list of them (one for every decoder layer) or a "
                f"pattern such as '2-4-6-8', got {given!r}"
            )
        if max(parts) > MAX_EXPERTS:
            raise ValueError(f"num_experts must be at most {MAX_EXPERTS} a layer, got {shown(given)}")
        return parts

    def experts_by_layer(self, num_layers: int) -> list[int]:
        """n of each of a model's decoder layers.

        Raises:
            ValueError: a list of another length, or a pattern whose groups cannot be of equal size.
        """
        counts = self.expert_counts()
        if isinstance(self.num_experts, list) and len(counts) != num_layers:
            raise ValueError(
                f"num_experts lists {len(counts)} layers, the model has {num_layers} decoder layers; give one number "
                "for each, also for layers that are not adapted"
            )
        if num_layers % len(counts):
            raise ValueError(
                f"num_experts={self.num_experts!r} asks for {len(counts)} equal groups of layers, but the model has "
                f"{num_layers}; give a list with a number for every layer"
            )
        return [n for n in counts for _ in range(num_layers // len(counts))]

    def _check_method(self, counts: list[int]) -> None:
        """Refuse what the method does not have, rather than ignore it."""
        method = self.base_method
        if method.routers is None and (counts != [1] or self.top_k != 1):
            raise ValueError(
                f"method={self.method!r} has one expert and no router, got num_experts={self.num_experts!r} and "
                f"top_k={self.top_k}; leave both out, or choose {_others(lambda m: m.routers is not None)}"
            )
        if method.dense and self.top_k != max(counts):
            raise ValueError(
                f"method={self.method!r} mixes all experts (its routing is dense), so top_k={self.top_k} has no place; "
                f"leave top_k out, or choose {_others(lambda m: m.routers is not None and not m.dense)}"
            )
        if method.dense or method.routers is None:
            why = "its experts are all used by every token" if method.dense else "it has no router"
            self._check_no_router_loss(why)
        if not method.dense and min(counts) < self.top_k:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={min(counts)}; a token cannot choose more")

    def _check_no_router_loss(self, why: str) -> None:
        """Refuse the options of a loss that the method does not have; ``why`` says why not."""
        if self.router_aux_loss_coef:
            raise ValueError(
                f"method={self.method!r} has no load-balance loss ({why}): router_aux_loss_coef must be 0, got "
                f"{self.router_aux_loss_coef}"
            )
        if self.router_aux_loss_scope != "local":
            raise ValueError(
                f"method={self.method!r} has no load-balance loss ({why}), so "
                f"router_aux_loss_scope={self.router_aux_loss_scope!r} has no place; leave it out"
            )

    def _warn_of_idle_router(self, counts: list[int]) -> None:
        """One chosen weight divided by itself is 1 whatever the router says."""
        method = self.base_method
        if method.routers is None or method.dense or self.top_k != 1 or not self.norm_topk_prob or max(counts) == 1:
            return
        if self.inference_mode:
            return
        instead = "set top_k=2 or more"
        if method.routers == "linear":
            instead += ", or norm_topk_prob=False"
        else:
            instead += " (norm_topk_prob=False gives it one too, but multiplies the MLP's output by a probability)"
        warnings.warn(
            "top_k=1 with norm_topk_prob=True: the one chosen weight is always 1, so the model's loss gives the router "
            f"no gradient but rounding noise, and only the load-balance loss moves it; {instead}",
            stacklevel=4,  # at the call of GraphMoEConfig(...)
        )

    def gru_width(self, hidden_size: int) -> int:
        """G for a model of this hidden size; ``ValueError`` if it is 0 while there are rounds to join, or there is no
        such size."""
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        width = int(self.gru_hidden_scale * hidden_size)
        if width < 1 and self.rounds != 1:
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

    def spec(self, scale: float, num_experts: int, activation: str = "silu", *, training: bool) -> RethinkingSpec:
        """The kernels' settings for a layer of this LoRA scale, number of experts and (of an MLP) activation."""
        return RethinkingSpec(
            rounds=self.rounds,
            top_k=num_experts if self.base_method.dense else self.top_k,
            scale=scale,
            activation=activation,
            normalize=self.norm_topk_prob,
            candidate_input=self.candidate_input,
            candidate_activation=self.candidate_activation,
            dropout=self.lora_dropout if training else 0.0,
        )

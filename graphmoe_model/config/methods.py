"""The methods: what an expert is, how experts are mixed, what the attention gets, and the papers' settings of each."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Method(NamedTuple):
    """One base method; with more than one round it is GraphMoE on it.

    Attributes:
        title, dora_title: its name in the literature, without and with ``use_dora``.
        routers: ``"layer"``: one router chooses whole MLPs (MixLoRA). ``"linear"``: every linear mixes its own experts
            by a router on its own input (plug-in experts: LoRAMoE, MoLA). ``None``: there is one expert.
        dense: the router's softmax weighs all experts; otherwise the top k.
        attention: what the attention projections get: plain LoRA, experts like those of the MLP's linears, or nothing.
        num_experts, top_k, rounds, router_aux_loss_coef: the defaults.
    """

    title: str
    dora_title: str
    routers: Literal["layer", "linear"] | None
    dense: bool
    attention: Literal["lora", "experts"] | None
    num_experts: int
    top_k: int
    rounds: int
    router_aux_loss_coef: float

    def name(self, use_dora: bool, rounds: int) -> str:
        """What the literature calls it: ``"MixDoRA"``, ``"GraphMoE(MoLA)"``."""
        base = self.dora_title if use_dora else self.title
        return base if rounds == 1 else f"GraphMoE({base})"


METHODS = {
    "lora": Method("LoRA", "DoRA", None, False, "lora", 1, 1, 1, 0.0),
    "mixlora": Method("MixLoRA", "MixDoRA", "layer", False, "lora", 8, 2, 3, 0.01),
    "loramoe": Method("LoRAMoE", "DoRAMoE", "linear", True, None, 6, 6, 3, 0.0),
    "mola": Method("MoLA", "MoDA", "linear", False, "experts", 8, 2, 3, 0.01),
}

# The papers' settings (GraphMoE, Table 2), with the ranks that give the parameters of its Table 1; alpha = 2 r.
_BASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 80, "lora_alpha": 160},
    "mixlora": {"method": "mixlora", "r": 16, "lora_alpha": 32, "num_experts": 8, "top_k": 2},
    "loramoe": {"method": "loramoe", "r": 24, "lora_alpha": 48, "num_experts": 6},
    "mola": {"method": "mola", "r": 10, "lora_alpha": 20, "num_experts": 8, "top_k": 2},
}
_DORA = {"lora": "dora", "mixlora": "mixdora", "loramoe": "doramoe", "mola": "moda"}


def _presets() -> dict[str, dict[str, Any]]:
    """Each base method, plain and with DoRA, as published; then GraphMoE on each of those with experts."""
    bases = {
        name: {**settings, "use_dora": name != base, "lora_dropout": 0.05, "rounds": 1}
        for base, settings in _BASES.items()
        for name in (base, _DORA[base])
    }
    graphs = {
        f"graphmoe-{name}": {**settings, "rounds": 3, "gru_hidden_scale": 0.1}
        for name, settings in bases.items()
        if METHODS[settings["method"]].routers is not None
    }
    return bases | graphs


PRESETS = _presets()

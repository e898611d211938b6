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
        num_experts, top_k, rounds, router_aux_loss_coef: the defaults; of the first two also the papers' values.
        published_rank: r in its presets.
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
    published_rank: int

    def name(self, use_dora: bool, rounds: int) -> str:
        """Return what the literature calls it: ``"MixDoRA"``, ``"GraphMoE(MoLA)"``."""
        base = self.dora_title if use_dora else self.title
        return base if rounds == 1 else f"GraphMoE({base})"

    def published(self, name: str) -> dict[str, Any]:
        """Return the fields of `GraphMoEConfig` that the papers set for the method, which ``method`` calls ``name``.

        Source: GraphMoE, Table 2, with the rank that gives the parameters of its Table 1; alpha = 2 r.
        """
        settings: dict[str, Any] = {"method": name, "r": self.published_rank, "lora_alpha": 2 * self.published_rank}
        if self.routers is not None:
            settings["num_experts"] = self.num_experts
            if not self.dense:
                settings["top_k"] = self.top_k
        return settings


# The names that `GraphMoEConfig.method` takes. The command line, the presets, the benchmarks, the demo's comparison and
# the checks of a configuration read this table.
METHODS = {
    "lora": Method("LoRA", "DoRA", None, False, "lora", 1, 1, 1, 0.0, published_rank=80),
    "mixlora": Method("MixLoRA", "MixDoRA", "layer", False, "lora", 8, 2, 3, 0.01, published_rank=16),
    "loramoe": Method("LoRAMoE", "DoRAMoE", "linear", True, None, 6, 6, 3, 0.0, published_rank=24),
    "mola": Method("MoLA", "MoDA", "linear", False, "experts", 8, 2, 3, 0.01, published_rank=10),
}


def _presets() -> dict[str, dict[str, Any]]:
    """Each base method, plain and with DoRA, as published; then GraphMoE on each of those with experts."""
    bases = {
        method.name(use_dora, rounds=1).lower(): {
            **method.published(name),
            "use_dora": use_dora,
            "lora_dropout": 0.05,
            "rounds": 1,
        }
        for name, method in METHODS.items()
        for use_dora in (False, True)
    }
    graphs = {
        f"graphmoe-{name}": {**settings, "rounds": 3, "gru_hidden_scale": 0.1}
        for name, settings in bases.items()
        if METHODS[settings["method"]].routers is not None
    }
    return bases | graphs


PRESETS = _presets()


def preset_settings(name: str) -> dict[str, Any]:
    """Return the fields of `GraphMoEConfig` that a preset sets; ``ValueError`` if there is no such preset."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]

"""Why an adapter cannot be written in another format: every reason, not the first."""

from __future__ import annotations

from graphmoe_model.config import rank_and_alpha
from graphmoe_model.conversion.adapter import Adapter, is_other
from graphmoe_model.conversion.modules import Module
from graphmoe_model.conversion.peer_layers import without_gaps

# The attention projections that MoE-PEFT knows by name.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "dense")


def raise_for(reasons: list[str], what: str) -> None:
    """Raise ``ValueError`` with all reasons, if there are any."""
    if reasons:
        raise ValueError("\n- ".join([f"{what} cannot hold this adapter:", *reasons]))


def peft_lora_reasons(adapter: Adapter) -> list[str]:
    """List the reasons against PEFT's LoRA format, which holds the method ``lora`` alone."""
    config = adapter.config
    if config.method == "lora":
        return _rounds(adapter)
    reason = f"method={config.method!r}: a router weighs its experts for each token, and a LoRA is the same for all"
    if config.base_method.attention == "lora" and any(not module.is_mlp for module in adapter.modules):
        reason += " (attention_lora, --to attention-lora, writes the attention's LoRA alone)"
    return [reason, *_rounds(adapter)]


def moe_peft_reasons(adapter: Adapter) -> list[str]:
    """List the reasons against MoE-PEFT's format, for the methods with experts."""
    config, modules = adapter.config, adapter.modules
    reasons = _rounds(adapter)
    if config.use_dora:
        reasons.append("use_dora: it has no place for magnitudes")
    if not isinstance(config.num_experts, int):
        reasons.append(f"num_experts={config.num_experts!r}: it has one number of experts for all layers")
    if not config.norm_topk_prob and not config.base_method.dense:
        reasons.append("norm_topk_prob=False: its routing weights are divided by their sum")
    if config.layers_to_transform is not None or config.exclude_modules:
        reasons.append("layers_to_transform or exclude_modules: it adapts every layer of a model")
    if any(is_other(config, name) for name in adapter.tensors):
        reasons.append("modules_to_save or trainable_token_indices, or saved embeddings: it holds adapters alone")
    if config.task_type not in (None, "CAUSAL_LM"):
        reasons.append(f"task_type={config.task_type!s}: it is for causal language models")
    if config.lora_dropout == 0:
        reasons.append(
            "lora_dropout=0: its readers demand more than 0, and the mixlora package applies it in evaluation too; set "
            "a tiny one, such as 1e-9, in adapter_config.json"
        )
    return reasons + _ranks(adapter) + _places(modules)


def _rounds(adapter: Adapter) -> list[str]:
    rounds = adapter.config.rounds
    return [f"rounds={rounds}: it has no GRU and no self-rethinking"] if rounds > 1 else []


def _ranks(adapter: Adapter) -> list[str]:
    """List the reasons against the ranks: the MLPs have one, and so has the attention; they differ in MixLoRA alone."""
    kinds: dict[str, set[tuple[int, float]]] = {}
    for module in adapter.modules:
        kind = "MLPs" if module.is_mlp else "attention projections"
        kinds.setdefault(kind, set()).add(rank_and_alpha(adapter.config, module.path))
    reasons = [
        f"rank_pattern or alpha_pattern: its {kind} all have the same rank and alpha, here they have "
        + ", ".join(f"r={r} alpha={alpha}" for r, alpha in sorted(values))
        for kind, values in kinds.items()
        if len(values) > 1
    ]
    everything = set().union(*kinds.values())
    if not reasons and len(everything) > 1 and adapter.config.method != "mixlora":
        reasons.append("rank_pattern or alpha_pattern: its MLPs and attention have the same rank and alpha")
    alphas = sorted({alpha for _, alpha in everything if alpha != int(alpha)})
    return reasons + [f"lora_alpha={alpha}: its readers demand a whole number" for alpha in alphas]


def _places(modules: list[Module]) -> list[str]:
    """List the reasons against the places: every layer has an ``mlp`` and the same projections of ``self_attn``."""
    known = {"mlp", *(f"self_attn.{name}" for name in _PROJECTIONS)}
    others = sorted(
        {m.place for m in modules if m.layer is None or m.place not in known or m.is_mlp != (m.place == "mlp")}
    )
    if others:
        return [f"{', '.join(others)}: it knows only {', '.join(sorted(known))} in numbered layers"]
    layers = {module.layer: {m.place for m in modules if m.layer == module.layer} for module in modules}
    _, reasons = without_gaps({layer for layer in layers if layer is not None})
    if len({module.stem for module in modules}) > 1:
        reasons.append(f"layers of {', '.join(sorted({m.stem for m in modules}))}: it has those of one decoder")
    everywhere = set().union(*layers.values())
    reasons += [
        f"layer {layer} lacks {', '.join(sorted(everywhere - places))}: it adapts the same in every layer"
        for layer, places in layers.items()
        if places != everywhere
    ]
    return reasons

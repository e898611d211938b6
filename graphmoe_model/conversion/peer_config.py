"""The settings of MoE-PEFT's mixture adapters, field by field, as a `GraphMoEConfig`."""

from __future__ import annotations

from typing import Any

from peft import TaskType

from graphmoe_kernels import shown
from graphmoe_model.config import GraphMoEConfig

MOE_TYPES = ("MIXLORA", "LORAMOE", "MOLA")
PEER_TYPES = (*MOE_TYPES, "LORA")

TOP_K = 2  # MoE-PEFT's default
AUX_LOSS_COEF = 0.001  # MoE-PEFT's default

# What a file may say besides: read below, or of no effect on a trained adapter (initial values, switched off losses).
_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("use_dora", "use_rslora", "num_experts", "top_k", "routing_strategy", "act_fn", "expert_lora"),
    *("router_loss", "router_aux_loss_coef", "jitter_noise", "bias"),
}
_WITHOUT_EFFECT = {
    *("lora_init", "router_init_range", "router_dyn_loss_coef", "entropy_index", "entropy_type", "entropy_eps"),
    *("name", "task_name", "inference_mode", "peft_version"),
}
_DORA = (
    "use_dora: MoE-PEFT does not save the magnitudes of DoRA, so what was trained is lost; set it to false in "
    "adapter_config.json to convert the adapter as "
)
_DORA_REST = {
    "MIXLORA": "MoE-PEFT runs it once loaded: magnitudes made anew from the weights cancel out, which is no DoRA",
    "LORAMOE": "MoE-PEFT trained and runs it: for LoRAMoE it ignores use_dora",
    "MOLA": "MoE-PEFT trained and runs it: for MoLA it ignores use_dora",
}


def moe_config(settings: dict[str, Any], projections: list[str], what: str) -> tuple[GraphMoEConfig, list[str]]:
    """Convert the settings of a MIXLORA, LORAMOE or MOLA adapter, with notes on what they do not say.

    Args:
        settings: the adapter_config.json.
        projections: attention projections that the adapter has.
        what: names the checkpoint in an error.

    Raises:
        ValueError: a field is missing or out of range, or asks for what is not computed here; all reasons are named.
    """
    kind = settings["peft_type"]
    reasons = _reasons(settings, projections)
    expert, more = _expert_lora(settings)
    reasons += more
    if reasons:
        lines = "\n".join(f"- {reason}" for reason in reasons)
        raise ValueError(f"{what} cannot be converted:\n{lines}")
    coefficient, notes = _aux_loss(settings)
    task, more = task_type(settings)
    notes += more + _differences(settings, expert)
    top_k: Any = None if kind == "LORAMOE" else settings.get("top_k", TOP_K)
    if coefficient:
        coefficient = aux_loss_coef(coefficient, top_k)
    r, alpha = settings["r"], settings["lora_alpha"]
    expert_r, expert_alpha = expert.get("r", r), expert.get("lora_alpha", alpha)
    config = GraphMoEConfig(
        method=kind.lower(),
        r=r,
        lora_alpha=alpha,
        lora_dropout=expert.get("lora_dropout", settings["lora_dropout"]),
        rank_pattern={} if expert_r == r else {"mlp": expert_r},
        alpha_pattern={} if expert_alpha == alpha else {"mlp": expert_alpha},
        use_rslora=settings.get("use_rslora", False),
        num_experts=settings["num_experts"],
        top_k=top_k,
        rounds=1,
        router_aux_loss_coef=coefficient,
        router_aux_loss="switch",
        target_modules=["mlp", *projections],
        task_type=task,
        base_model_name_or_path=settings.get("base_model_name_or_path"),
    )
    return config, notes


def _differences(settings: dict[str, Any], expert: dict[str, Any]) -> list[str]:
    """Note what is said there and has no place here, or means something else here."""
    notes = []
    if settings.get("act_fn"):
        notes.append(f"act_fn is {settings['act_fn']!r} there; here the base model's own activation runs: compare them")
    if "lora_dropout" in expert and expert["lora_dropout"] != settings["lora_dropout"]:
        notes.append(
            f"the experts' dropout is {expert['lora_dropout']} there, the attention's {settings['lora_dropout']}; here "
            "the experts' holds for both (in training)"
        )
    return notes


def task_type(settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return PEFT's task type, if the file names one of them; else a note."""
    task = settings.get("task_type")
    if task is None or task in list(TaskType):
        return task, []
    return None, [f"task_type {task!r} is none of PEFT's: left out"]


def base_model_reasons(settings: dict[str, Any]) -> list[str]:
    """List the reasons against a base model that is no name."""
    name = settings.get("base_model_name_or_path")
    if name is None or isinstance(name, str):
        return []
    return [f"base_model_name_or_path must be a model's name or null, got {shown(name)}"]


def unread(settings: dict[str, Any], known: set[str]) -> list[str]:
    """List the fields that are set and not known, as reasons against the file."""
    return [
        f"{name}={value!r}: not known here; take it out of adapter_config.json if what the adapter computes does not "
        "depend on it"
        for name, value in settings.items()
        if name not in known and value
    ]


def _reasons(settings: dict[str, Any], projections: list[str]) -> list[str]:
    kind = settings["peft_type"]
    reasons = []
    for name in ("r", "lora_alpha", "lora_dropout", "num_experts"):
        if settings.get(name) is None:
            reasons.append(f"{name}: missing from adapter_config.json")
    coefficient = settings.get("router_aux_loss_coef")
    if coefficient is not None and (not isinstance(coefficient, int | float) or isinstance(coefficient, bool)):
        reasons.append(f"router_aux_loss_coef must be a number, got {shown(coefficient)}")
    for name in ("r", "num_experts", "top_k"):
        value = settings.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            reasons.append(f"{name} must be a whole number, got {shown(value)}")
    reasons += base_model_reasons(settings)
    strategy = settings.get("routing_strategy", None if kind == "MIXLORA" else kind.lower())
    if strategy != kind.lower():
        reasons.append(f"routing_strategy={strategy!r}: only {kind.lower()!r} is computed here for {kind}")
    if settings.get("jitter_noise"):
        reasons.append(
            f"jitter_noise={settings['jitter_noise']!r}: the MLPs' input is multiplied by noise, not so here; "
            "set it to 0 to convert the adapter without (MoE-PEFT adds the noise in training only)"
        )
    if settings.get("use_dora"):
        reasons.append(_DORA + _DORA_REST[kind])
    if settings.get("bias", "none") not in ("none", None):
        reasons.append(f"bias={settings['bias']!r}: only 'none' is computed here")
    if kind != "MIXLORA" and settings.get("expert_lora"):
        reasons.append(f"expert_lora: {kind} has no settings for its experts alone")
    if kind == "LORAMOE" and projections:
        reasons.append(f"LoRA on {', '.join(projections)}: LoRAMoE here adapts the MLPs alone")
    return reasons + unread(settings, _READ | _WITHOUT_EFFECT)


def _expert_lora(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return MixLoRA's settings for the experts alone, and reasons against them."""
    expert = settings.get("expert_lora") or {}
    if not isinstance(expert, dict):
        return {}, [f"expert_lora must be an object of settings, got {expert!r}"]
    reasons = []
    if expert.get("use_dora") and not settings.get("use_dora"):
        reasons.append(f"expert_lora: {_DORA}{_DORA_REST['MIXLORA']}")
    rslora = bool(settings.get("use_rslora"))
    if bool(expert.get("use_rslora", rslora)) != rslora:
        reasons.append("expert_lora: use_rslora must be the same for the experts and the attention")
    if expert.get("bias", "none") not in ("none", None):
        reasons.append(f"expert_lora: bias={expert['bias']!r}: only 'none' is computed here")
    return expert, reasons + [f"expert_lora: {reason}" for reason in unread(expert, _READ | _WITHOUT_EFFECT)]


def aux_loss_coef(there: float, top_k: int) -> float:
    """Convert the load-balance loss's weight: the shares of the experts add up to 1 here and to the top k there.

    There the tokens of all layers count as one batch; here the loss is the mean over the layers.
    """
    return float(f"{there * top_k:.12g}")  # without the rounding error that would come back as another number


def aux_loss_coef_there(here: float, top_k: int) -> float:
    """Invert `aux_loss_coef`."""
    return float(f"{here / top_k:.12g}")


def _aux_loss(settings: dict[str, Any]) -> tuple[float, list[str]]:
    """Return the load-balance loss's weight there: on by default for MixLoRA and off for MoLA; LoRAMoE has none."""
    kind = settings["peft_type"]
    if kind == "LORAMOE" or not settings.get("router_loss", kind == "MIXLORA"):
        return 0.0, []
    coefficient = settings.get("router_aux_loss_coef")
    if coefficient is not None:
        return coefficient, []
    return AUX_LOSS_COEF, [
        f"router_aux_loss_coef is not in the file: {AUX_LOSS_COEF}, MoE-PEFT's default (in training)"
    ]

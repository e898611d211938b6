"""The oracle of every method: its equations in any float dtype, expert by expert; small layers and their gradients.

Nothing here is folded, shared between experts or taken from `graphmoe_kernels`: every W + s B_i A_i is formed as it
stands in the equations, so that an error of the implementation cannot be an error of the oracle too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from graphmoe_tables.methods import PRESETS

HIDDEN, INTERMEDIATE, RANK, EXPERTS = 48, 80, 5, 4

# name -> preset and what is changed in it: the 8 base methods, GraphMoE on the 6 with experts, and on plain LoRA.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in PRESETS}
FORMS["graphmoe-lora"] = ("lora", {"rounds": 2})


def form_config(form: str, **options: Any) -> GraphMoEConfig:
    """The form's preset at the sizes of these tests, without dropout, every term at work."""
    preset, changes = FORMS[form]
    settings = {"r": RANK, "lora_alpha": 7, "lora_dropout": 0.0, "gru_hidden_scale": 0.3, "init_lora_weights": False}
    if PRESETS[preset]["method"] != "lora":
        settings["num_experts"] = EXPERTS
    return GraphMoEConfig.from_preset(preset, **{**settings, **changes, **options})


def small_mlp(bias: bool = False, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> nn.Module:
    """Llama's MLP in fp64, with biases on request."""
    sizes = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=1, mlp_bias=bias)
    return LlamaMLP(sizes).double()


def small_ffn(form: str, mlp: nn.Module | None = None, bias: bool = False, **options: Any) -> FusedGraphMoEFFN:
    """An fp64 layer of a form over an MLP, in training; all its parameters count and none has its first value."""
    layer = FusedGraphMoEFFN(mlp or small_mlp(bias), form_config(form, **options))
    move_from_start(adapter_state(layer))
    return layer


@torch.no_grad()
def move_from_start(state: dict[str, Tensor]) -> None:
    """Magnitudes away from the norms, router logits a spread of about 2, a GRU bias that is not zero."""
    for name, parameter in state.items():
        if name.endswith("magnitude"):
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        elif name.endswith("router.weight"):
            parameter.copy_(torch.randn_like(parameter) * 2 / parameter.shape[1] ** 0.5)
            # The down projection's input, act(g) * u, is much smaller than x.
            parameter.mul_(4 if name == "experts.down_proj.router.weight" else 1)
        elif name == "gru.candidate.bias":
            parameter.normal_(std=0.3)


def adapter_state(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of the layer's only adapter by the names of the checkpoint contract."""
    return dict(layer.lora_graphmoe["default"].named_parameters())


def expected_shapes(config: GraphMoEConfig, num_experts: int, hidden: int, intermediate: int) -> dict[str, tuple]:
    """Every parameter's shape by name: what a checkpoint of the method holds for one MLP."""
    n, D, F = num_experts, hidden, intermediate
    shapes: dict[str, tuple] = {"router.weight": (n, D)} if config.method == "mixlora" else {}
    for name, width, out in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
        shapes |= {f"experts.{name}.A": (n, config.r, width), f"experts.{name}.B": (n, out, config.r)}
        if config.method in ("loramoe", "mola"):
            shapes[f"experts.{name}.router.weight"] = (n, width)
        if config.use_dora:
            shapes[f"experts.{name}.magnitude"] = (n, out)
    if config.rounds > 1:
        G = int(config.gru_hidden_scale * D)
        shapes |= {f"gru.{name}.weight": (G, G + D) for name in ("update_gate", "reset_gate", "candidate")}
        shapes |= {"gru.candidate.bias": (G,), "gru.output_proj.weight": (D, G)}
    return shapes


def scale(config: GraphMoEConfig) -> float:
    """s = alpha / r, or alpha / sqrt(r)."""
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def expert_weight(weight: Tensor, A: Tensor, B: Tensor, s: float, magnitude: Tensor | None) -> Tensor:
    """W + s B A, or with DoRA m * (W + s B A) / ||W + s B A||_row, whose norm is a constant to the gradient."""
    adapted = weight + s * (B @ A)  # [out, in]
    if magnitude is None:
        return adapted
    return magnitude[:, None] * adapted / adapted.detach().norm(dim=1, keepdim=True)


def routing_weights(x: Tensor, router: Tensor, config: GraphMoEConfig, logits: list[Tensor] | None) -> Tensor:
    """p [..., n] for x [..., in], in fp32 at least: the softmax, without those that are not chosen."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        scores = x.to(wide) @ router.to(wide).T  # [..., n]
    if logits is not None:
        logits.append(scores.detach())
    p = scores.softmax(dim=-1)
    if config.method == "loramoe":
        return p
    chosen = torch.zeros_like(p).scatter(-1, p.topk(config.top_k, dim=-1).indices, 1.0)
    p = p * chosen
    return p / p.sum(dim=-1, keepdim=True) if config.norm_topk_prob else p


def oracle_linear(
    base: nn.Module, state: dict[str, Tensor], config: GraphMoEConfig, x: Tensor, logits: list[Tensor] | None = None
) -> Tensor:
    """A linear with experts and a router of its own: W x + b + sum_i p_i(x) (W~_i x - W x), for x [..., in].

    Without DoRA W~_i x - W x is s B_i A_i x. ``state`` has A, B, router.weight and, with DoRA, magnitude; ``logits``
    takes the router's.
    """
    p = routing_weights(x, state["router.weight"], config, logits)
    plain, y = linear(x, base.weight), linear(x, base.weight, base.bias)  # [..., out]
    for i in range(state["A"].shape[0]):
        magnitude = state["magnitude"][i] if config.use_dora else None
        expert = expert_weight(base.weight, state["A"][i], state["B"][i], scale(config), magnitude)
        y = y + (p[..., i, None] * (linear(x, expert) - plain)).to(y.dtype)
    return y


def experts_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of an MLP's state that belongs to one of its linears."""
    prefix = f"experts.{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def whole_mlp_expert(mlp: nn.Module, state: dict[str, Tensor], config: GraphMoEConfig, x: Tensor, i: int) -> Tensor:
    """E_i(x) = W~_D,i (act(W~_G,i x) * (W~_U,i x)), with the MLP's biases."""

    def projected(name: str, v: Tensor) -> Tensor:
        base, own = getattr(mlp, name), experts_of(state, name)
        magnitude = own["magnitude"][i] if config.use_dora else None
        return linear(v, expert_weight(base.weight, own["A"][i], own["B"][i], scale(config), magnitude), base.bias)

    return projected("down_proj", mlp.act_fn(projected("gate_proj", x)) * projected("up_proj", x))


def oracle_round(
    mlp: nn.Module, state: dict[str, Tensor], config: GraphMoEConfig, x: Tensor, logits: list[Tensor] | None
) -> Tensor:
    """The base method: y of one round for x [..., D]."""
    if config.method in ("loramoe", "mola"):

        def routed(name: str, v: Tensor) -> Tensor:
            return oracle_linear(getattr(mlp, name), experts_of(state, name), config, v, logits)

        return routed("down_proj", mlp.act_fn(routed("gate_proj", x)) * routed("up_proj", x))
    if config.method == "lora":
        return whole_mlp_expert(mlp, state, config, x, 0)
    p = routing_weights(x, state["router.weight"], config, logits)
    outputs = (whole_mlp_expert(mlp, state, config, x, i) for i in range(p.shape[-1]))
    return sum((p[..., i, None] * output).to(output.dtype) for i, output in enumerate(outputs))


def oracle_mlp(
    mlp: nn.Module, state: dict[str, Tensor], config: GraphMoEConfig, x: Tensor, logits: list[Tensor] | None = None
) -> Tensor:
    """Algorithm 1 on the base method: y_T for x [..., D]; without dropout. ``logits`` takes those of every router."""
    y = oracle_round(mlp, state, config, x, logits)
    if config.rounds == 1:
        return y
    squash = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[config.candidate_activation]
    h = x.new_zeros(*x.shape[:-1], state["gru.output_proj.weight"].shape[1])  # [..., G]
    for _ in range(config.rounds - 1):
        read = torch.cat([h, y], dim=-1)
        z = linear(read, state["gru.update_gate.weight"]).sigmoid()
        q = linear(read, state["gru.reset_gate.weight"]).sigmoid()
        seen = {"expert_output": y, "hidden_state": x}[config.candidate_input]
        candidate = torch.cat([q * h, seen], dim=-1)
        c = squash(linear(candidate, state["gru.candidate.weight"], state["gru.candidate.bias"]))
        h = (1 - z) * h + z * c
        x = x + linear(h, state["gru.output_proj.weight"])
        y = oracle_round(mlp, state, config, x, logits)
    return y


def by_equations(layer: nn.Module, x: Tensor, logits: list[Tensor] | None = None) -> Tensor:
    """The oracle on a layer's own tensors, whether it is an MLP or a linear."""
    adapter = layer.lora_graphmoe["default"]
    oracle = oracle_mlp if isinstance(layer, FusedGraphMoEFFN) else oracle_linear
    return oracle(layer.base_layer, adapter_state(layer), adapter.config, x, logits)


def differentiate(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """y and the gradients of x and of every parameter of the adapter, by name; one that has none is an error."""
    leaf = x.detach().clone().requires_grad_()
    y = run(leaf)
    parameters = adapter_state(layer)
    grads = torch.autograd.grad(y, [leaf, *parameters.values()], upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


@torch.no_grad()
def decided_inputs(layer: nn.Module, dtype: torch.dtype, count: int, margin: float = 0.1) -> Tensor:
    """fp64 inputs [count, D] that ``dtype`` holds exactly, with top-k logits ``margin`` apart at every router.

    Others may go to another expert in a low precision, which is no error of arithmetic. Logits have a spread of about
    2, and bf16 moves them by some 0.02.
    """
    weight = next(layer.base_layer.parameters())  # of the linear, or of the MLP's gate
    x = torch.randn(8 * count + 16, weight.shape[1], dtype=torch.float64).to(weight.device, dtype).double()
    logits: list[Tensor] = []
    by_equations(layer, x, logits)
    k = layer.lora_graphmoe["default"].config.top_k
    decided = torch.ones_like(x[:, 0], dtype=torch.bool)
    for scores in logits:
        if k < scores.shape[-1]:
            ordered = scores.sort(dim=-1, descending=True).values
            decided &= ordered[:, k - 1] - ordered[:, k] > margin
    assert decided.sum() >= count
    return x[decided][:count]

"""The frozen MLP of a Transformers model, found by its attributes and used as the kernels' `BaseMLP`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from graphmoe_kernels import ACTIVATIONS, DenseMLP
from graphmoe_kernels.activations import ALIASES


class MLPSizes(NamedTuple):
    """Hidden size D, intermediate size F, the activation's name."""

    hidden: int
    intermediate: int
    activation: str


class SeparateMLP(NamedTuple):
    """gate_proj, up_proj and down_proj (Llama, Mistral, Qwen, Gemma, Olmo, Granite, ...)."""

    mlp: Any  # a module that `is_gated_mlp`

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `graphmoe_kernels.BaseMLP`; the modules are called, so their hooks and quantisation count."""
        return self.mlp.gate_proj(x), self.mlp.up_proj(x)

    def project_out(self, c: Tensor) -> Tensor:
        """See `graphmoe_kernels.BaseMLP`."""
        return self.mlp.down_proj(c)

    def dense(self) -> DenseMLP:
        """The weights, dequantised if they are quantised."""
        linears = (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
        gate, up, down = map(dense_weight, linears)
        return DenseMLP(gate, up, down, *self.biases())

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate, up and down."""
        return self.mlp.gate_proj.bias, self.mlp.up_proj.bias, self.mlp.down_proj.bias

    def sources(self) -> list[Tensor | None]:
        """The stored tensors: three weights and three biases."""
        linears = (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
        return [t for linear in linears for t in (linear.weight, linear.bias)]


class FusedMLP(NamedTuple):
    """gate_up_proj with the gate first, and down_proj (Phi-3, GLM)."""

    mlp: Any  # a module that `is_gated_mlp`

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `graphmoe_kernels.BaseMLP`: two views of one product."""
        gate, up = self.mlp.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up

    def project_out(self, c: Tensor) -> Tensor:
        """See `graphmoe_kernels.BaseMLP`."""
        return self.mlp.down_proj(c)

    def dense(self) -> DenseMLP:
        """The weights, dequantised if they are quantised; gate and up are views of one tensor."""
        gate, up = dense_weight(self.mlp.gate_up_proj).chunk(2)
        return DenseMLP(gate, up, dense_weight(self.mlp.down_proj), *self.biases())

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate and up (views of one tensor) and down."""
        bias = self.mlp.gate_up_proj.bias
        gate, up = (None, None) if bias is None else bias.chunk(2)
        return gate, up, self.mlp.down_proj.bias

    def sources(self) -> list[Tensor | None]:
        """The stored tensors: two weights and two biases."""
        linears = (self.mlp.gate_up_proj, self.mlp.down_proj)
        return [t for linear in linears for t in (linear.weight, linear.bias)]


def dense_weight(linear: nn.Module) -> Tensor:
    """A linear's weight [out, in] as a floating-point tensor: itself, or what its quantisation stands for."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight if type(weight) is nn.Parameter else dequantize_module_weight(linear)


def dense_weights(mlp: nn.Module) -> dict[str, Tensor]:
    """The weights of gate_proj, up_proj and down_proj by these names, as `dense_weight` has them."""
    base = wrap_mlp(mlp).dense()
    return {"gate_proj": base.gate, "up_proj": base.up, "down_proj": base.down}


def wrap_mlp(mlp: nn.Module) -> SeparateMLP | FusedMLP:
    """The MLP as a `BaseMLP`; `check_mlp` says beforehand whether it is one."""
    return FusedMLP(mlp) if hasattr(mlp, "gate_up_proj") else SeparateMLP(mlp)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module has the attributes of a gated MLP (whatever its class)."""
    separate = hasattr(module, "gate_proj") and hasattr(module, "up_proj")
    projections = (separate or hasattr(module, "gate_up_proj")) and hasattr(module, "down_proj")
    return projections and _activation_module(module) is not None


def check_mlp(mlp: nn.Module) -> MLPSizes:
    """The sizes and activation of a gated MLP.

    Raises:
        TypeError: not a gated MLP, or one whose forward does more than down(act(gate(x)) * up(x)), or whose
            weights are spread over devices; the message says which and what to do.
        ValueError: an activation that the kernels do not know.
    """
    kind = type(mlp).__name__
    if not is_gated_mlp(mlp):
        children = ", ".join(name for name, _ in mlp.named_children()) or "none"
        raise TypeError(
            f"{kind} is not a gated MLP: expected gate_proj, up_proj and down_proj (or gate_up_proj and "
            f"down_proj) and act_fn or activation_fn; it has the submodules {children}. Ungated MLPs and sparse "
            "expert blocks are not supported."
        )
    if getattr(mlp, "activation_sparsity", 0.0):
        raise TypeError(f"{kind} makes its activations sparse (activation_sparsity > 0): not supported")
    forward = vars(mlp).get("_old_forward", mlp.forward)  # accelerate's device hooks keep the forward there
    if getattr(forward, "__func__", None) is not type(mlp).forward:
        raise TypeError(
            f"the forward of this {kind} was replaced on the instance (Liger-Kernel's instance patch does "
            "that), and the replacement would bypass this layer; apply the patch without its swiglu/geglu part"
        )
    names = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]
    names.append("down_proj")
    for name in names:
        _check_projection(getattr(mlp, name), f"{kind}.{name}")
    _check_children(mlp, names)
    hidden, intermediate = _linear_shape(mlp.down_proj)  # type: ignore[arg-type]
    sizes = MLPSizes(hidden, intermediate, activation_name(mlp))
    _check_forward(mlp, sizes)
    return sizes


def _check_children(mlp: nn.Module, projections: list[str]) -> None:
    """Every submodule beside the projections and the activation is a step that this layer would leave out."""
    known = {*projections, "act_fn", "activation_fn"}
    inert = (nn.Identity, nn.Dropout)  # whether a dropout drops anything, `_check_forward` finds out
    children = {name: child for name, child in mlp.named_children() if name not in known}
    extra = [name for name, child in children.items() if not isinstance(child, inert)]
    if extra:
        raise TypeError(
            f"{type(mlp).__name__} has the submodules {', '.join(extra)} beside its projections and "
            "activation; only down(act(gate(x)) * up(x)) is supported"
        )


@torch.no_grad()
def _check_forward(mlp: nn.Module, sizes: MLPSizes) -> None:
    """Compare the MLP with down(act(gate) * up) on two made-up tokens, in training mode.

    Attributes cannot tell a clamped, scaled or dropped-out MLP from a plain one; its output can. Weights
    without data (meta device) are not compared.
    """
    weight: Tensor = mlp.down_proj.weight  # type: ignore[union-attr,assignment]
    if weight.device.type == "meta":
        return
    base = wrap_mlp(mlp)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    token = torch.arange(1, sizes.hidden + 1, device=weight.device).sin()  # draws nothing from the generator
    # The second token is scaled so that a clamp of the pre-activations shows: those in use cut off by 16.
    largest = torch.cat(base.project_in(token[None].to(dtype)), dim=-1).abs().max().float()
    x = torch.stack([token, token * (64 / largest.clamp(min=1e-3))])[None].to(dtype)  # [1, 2, D]
    gate, up = base.project_in(x)
    expected = base.project_out(ACTIVATIONS[sizes.activation].function(gate) * up).float()
    modes = {module: module.training for module in mlp.modules()}
    try:
        actual = mlp.train()(x).float()
    finally:
        for module, mode in modes.items():
            module.training = mode
    tolerance = torch.finfo(gate.dtype).eps ** 0.75 * expected.abs().amax(dim=-1, keepdim=True)
    if bool(((actual - expected).abs() > tolerance).any()):
        raise TypeError(
            f"{type(mlp).__name__} computes something else than down(act(gate(x)) * up(x)) (a clamp, a "
            "multiplier, a dropout of its own), which is not supported"
        )


def _check_projection(linear: nn.Module, name: str) -> None:
    if hasattr(linear, "base_layer"):
        raise TypeError(f"{name} is wrapped by another adapter ({type(linear).__name__}); unload that adapter first")
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(linear, "out_features"):
        raise TypeError(f"{name} ({type(linear).__name__}) is not a linear layer with a weight of its own")
    if type(weight.data).__name__ == "DTensor":
        raise TypeError(
            f"{name} is spread over devices (DTensor, tensor parallelism), which is not supported; "
            "load the model without tp_plan and shard whole decoder layers (FSDP) after attaching"
        )


def _linear_shape(linear: nn.Module) -> tuple[int, int]:
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


def _activation_module(mlp: nn.Module) -> object | None:
    for name in ("act_fn", "activation_fn"):
        found = getattr(mlp, name, None)
        if found is not None:
            return found
    return None


def activation_name(mlp: nn.Module) -> str:
    """The kernels' name for the MLP's activation; ``ValueError`` if there is none."""
    module = _activation_module(mlp)
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope != 0.01:
        raise ValueError(f"LeakyReLU with slope {module.negative_slope} is not registered; 0.01 is")
    for name, known in ACT2CLS.items():
        known_class = known[0] if isinstance(known, tuple) else known
        if type(module) is known_class and (name in ACTIVATIONS or name in ALIASES):
            return ALIASES.get(name, name)
    for name, activation in ACTIVATIONS.items():  # plain functions, and whatever a user registered
        if module is activation.function:
            return name
    raise ValueError(
        f"the MLP's activation {type(module).__name__} is unknown to the kernels, which know "
        f"{', '.join(ACTIVATIONS)}; graphmoe_kernels.register_activation adds a pointwise function with its "
        "derivative"
    )

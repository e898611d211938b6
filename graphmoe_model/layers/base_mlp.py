"""The frozen MLP of a Transformers model, found by its attributes and used as the kernels' `BaseMLP`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.activations import ACT2CLS

from graphmoe_kernels import ACTIVATIONS, ALIASES, DenseMLP
from graphmoe_model.layers.mlp_layouts import MLPLayout, find_layout
from graphmoe_model.storage.dequantise import dense_weight, is_quantised, run_linear, stored_tensors


def _part(mlp: Any, name: str) -> Any:
    """Read an attribute of an MLP, past ``nn.Module.__getattr__`` where it is a module."""
    parts = mlp._modules
    return parts[name] if name in parts else getattr(mlp, name)


def _stored(linears: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for linear in linears:
        found += stored_tensors(linear)
        parameters = linear._parameters
        if "bias" not in parameters:  # HQQ's is a plain attribute
            bias = linear.bias
        else:
            bias = parameters["bias"]
        if bias is not None:
            found.append(bias)
    return found


class SeparateMLP(NamedTuple):
    """An MLP with a linear each for gate, up and down."""

    mlp: Any
    layout: MLPLayout

    def linears(self) -> tuple[Any, Any, Any]:
        """The modules of gate, up and down."""
        mlp, (gate, up, down, *_) = self.mlp, self.layout
        return _part(mlp, gate), _part(mlp, up), _part(mlp, down)

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `graphmoe_kernels.BaseMLP`; the modules are called, so their hooks and quantisation count."""
        gate, up, _ = self.linears()
        return run_linear(gate, x), run_linear(up, x)

    def project_out(self, c: Tensor) -> Tensor:
        """See `graphmoe_kernels.BaseMLP`."""
        return run_linear(self.linears()[2], c)

    def dense(self) -> DenseMLP:
        """The weights, dequantised if they are quantised."""
        gate, up, down = map(dense_weight, self.linears())
        return DenseMLP(gate, up, down, *self.biases())

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate, up and down."""
        gate, up, down = self.linears()
        return gate.bias, up.bias, down.bias

    def sources(self) -> list[Tensor]:
        """The stored tensors of three weights, and the biases."""
        return _stored(self.linears())

    def stores_dense(self) -> bool:
        """See `graphmoe_kernels.BaseMLP`."""
        return not any(map(is_quantised, self.linears()))


class FusedMLP(NamedTuple):
    """An MLP with one linear for gate and up, the gate first."""

    mlp: Any
    layout: MLPLayout

    def linears(self) -> tuple[Any, Any]:
        """The modules of gate and up, and of down."""
        return _part(self.mlp, self.layout.gate), _part(self.mlp, self.layout.down)

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `graphmoe_kernels.BaseMLP`: two views of one product."""
        gate, up = run_linear(self.linears()[0], x).chunk(2, dim=-1)
        return gate, up

    def project_out(self, c: Tensor) -> Tensor:
        """See `graphmoe_kernels.BaseMLP`."""
        return run_linear(self.linears()[1], c)

    def dense(self) -> DenseMLP:
        """The weights, dequantised if they are quantised; gate and up are views of one tensor."""
        both, down = map(dense_weight, self.linears())
        gate, up = both.chunk(2)
        return DenseMLP(gate, up, down, *self.biases())

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate and up (views of one tensor) and down."""
        both, down = self.linears()
        gate, up = (None, None) if both.bias is None else both.bias.chunk(2)
        return gate, up, down.bias

    def sources(self) -> list[Tensor]:
        """The stored tensors of two weights, and the biases."""
        return _stored(self.linears())

    def stores_dense(self) -> bool:
        """See `graphmoe_kernels.BaseMLP`."""
        return not any(map(is_quantised, self.linears()))


def wrap_mlp(mlp: nn.Module, kept: SeparateMLP | FusedMLP | None = None) -> SeparateMLP | FusedMLP:
    """Return the MLP as a `BaseMLP`; `graphmoe_model.layers.mlp_checks.check_mlp` says beforehand whether it is one.

    Args:
        mlp: a gated MLP.
        kept: what an earlier call returned, which is returned again if it is of this MLP. It looks the linears and
            their weights up at every use, so replaced ones are seen; only the search for the layout is spared.
    """
    if kept is not None and kept.mlp is mlp:
        return kept
    layout = find_layout(mlp)
    assert layout is not None
    return FusedMLP(mlp, layout) if layout.fused else SeparateMLP(mlp, layout)


def down_projection(mlp: nn.Module) -> Any:
    """The linear that gives a gated MLP's output."""
    return wrap_mlp(mlp).linears()[-1]


def dense_weights(mlp: nn.Module) -> dict[str, Tensor]:
    """The weights of gate_proj, up_proj and down_proj by these names, as `dense_weight` has them."""
    base = wrap_mlp(mlp).dense()
    return {"gate_proj": base.gate, "up_proj": base.up, "down_proj": base.down}


def activation_name(mlp: nn.Module) -> str:
    """Return the name in `graphmoe_kernels.ACTIVATIONS` of a gated MLP's activation.

    Raises:
        ValueError: the kernels do not know it.
    """
    layout = find_layout(mlp)
    assert layout is not None
    module = layout.activation(mlp)
    if module is None and layout.implied is not None:
        return ALIASES.get(layout.implied, layout.implied)
    for name, activation in ACTIVATIONS.items():  # plain functions, and whatever a user registered
        if activation.is_function(module) or _is_alike(module, activation.function):
            return name
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope != 0.01:
        raise ValueError(
            f"LeakyReLU with slope {module.negative_slope} is not registered, 0.01 is; "
            "graphmoe_kernels.register_activation adds another"
        )
    for name, known in ACT2CLS.items():
        known_class = known[0] if isinstance(known, tuple) else known
        if type(module) is known_class and (name in ACTIVATIONS or name in ALIASES):
            return ALIASES.get(name, name)
    raise ValueError(
        f"the MLP's activation {type(module).__name__} is unknown to the kernels, which know "
        f"{', '.join(ACTIVATIONS)}; graphmoe_kernels.register_activation adds a pointwise function with its "
        "derivative: the very function, or a module of the class, that the MLP holds"
    )


def _is_alike(activation: object, function: object) -> bool:
    """Whether an MLP's activation is a module made alike of the same class as a registered one."""
    same_class = isinstance(activation, nn.Module) and type(activation) is type(function)
    return same_class and repr(activation) == repr(function)

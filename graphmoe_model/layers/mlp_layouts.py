"""The names by which gated MLPs hold their parts: one table, which further layouts may join."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from graphmoe_kernels import get_activation, shown


class MLPLayout(NamedTuple):
    """The attributes by which a kind of gated MLP holds its parts.

    Attributes:
        gate, up, down: names of the linears; gate and up are one name where one linear holds both, the gate first.
        activations: names that the activation may have.
        implied: the activation of an MLP that has none of these names, as its forward calls a function.
    """

    gate: str
    up: str
    down: str
    activations: tuple[str, ...] = ()
    implied: str | None = None

    def __str__(self) -> str:
        own = " or ".join(self.activations) or f"{self.implied} called as a function"
        return f"{', '.join(self.linears)} with {own}"

    @property
    def fused(self) -> bool:
        """Whether one linear holds gate and up."""
        return self.gate == self.up

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the linears' names, each once."""
        return (self.gate, self.down) if self.fused else (self.gate, self.up, self.down)

    def fits(self, module: nn.Module) -> bool:
        """Tell whether a module has all of these attributes, whatever its class."""
        if not all(hasattr(module, name) for name in self.linears):
            return False
        return self.implied is not None or self.activation(module) is not None

    def activation(self, mlp: nn.Module) -> object | None:
        """Return the activation's module or function, or None."""
        found = (getattr(mlp, name, None) for name in self.activations)
        return next((own for own in found if own is not None), None)


# The first that fits a module is taken; `register_mlp_layout` puts others before them, so that the latest counts.
LAYOUTS: list[MLPLayout] = [
    MLPLayout("gate_up_proj", "gate_up_proj", "down_proj", ("act_fn", "activation_fn")),  # Phi-3, GLM
    MLPLayout("gate_proj", "up_proj", "down_proj", ("act_fn", "activation_fn")),  # Llama, Mistral, Qwen, Gemma, ...
    MLPLayout("w1", "w3", "w2", ("act_fn",), implied="silu"),  # LFM2
    MLPLayout("input_linear", "input_linear", "output_linear", ("activation",)),  # Granite 4's shared MLP
    MLPLayout("Wi", "Wi", "Wo", ("act",)),  # ModernBERT
    MLPLayout("wi_0", "wi_1", "wo", ("act",)),  # T5 v1.1, UMT5
    MLPLayout("weights_in", "weights_in", "weights_out", (), implied="silu"),  # DINOv2
]


def register_mlp_layout(layout: MLPLayout) -> None:
    """Have MLPs with these names adapted: found when an adapter is attached, counted by profiles, saved as all others.

    What an MLP of the layout computes is still compared with down(act(gate(x)) * up(x)) when it is adapted. Of several
    layouts that fit an MLP the latest counts, so that a wrong one is put right by registering the right one. One
    that is there already becomes the latest.

    Raises:
        TypeError: it is no `MLPLayout`, or a field is of another type.
        ValueError: a name is empty or no attribute's, the down projection is the gate or up too, there is neither a
            name for the activation nor an implied one, or the implied one is unknown.
    """
    if not isinstance(layout, MLPLayout):
        raise TypeError(
            f"expected an MLPLayout, got {shown(layout)}; MLPLayout(gate=..., up=..., down=..., activations=(...,)) "
            "names the attributes"
        )
    if not isinstance(layout.activations, tuple):
        raise TypeError(f"activations must be a tuple of names, got {shown(layout.activations)}; one is ('act_fn',)")
    named = {"gate": layout.gate, "up": layout.up, "down": layout.down}
    named |= {f"activations[{i}]": name for i, name in enumerate(layout.activations)}
    for what, name in named.items():
        if not isinstance(name, str):
            raise TypeError(f"{what} must be the name of an attribute, got {shown(name)}")
        if not name.isidentifier():
            raise ValueError(f"{what}: {shown(name)} is no attribute's name; expected one such as 'gate_proj'")
    if layout.down in (layout.gate, layout.up):
        raise ValueError(
            f"down is {layout.down!r}, which is the gate or up too; only gate and up may be one linear, the gate first"
        )
    if not layout.activations and layout.implied is None:
        raise ValueError(
            "an MLPLayout names the attributes of its activation (activations=('act_fn',)), or the activation that its "
            "forward calls as a function (implied='silu'); it has neither"
        )
    if layout.implied is not None:
        get_activation(layout.implied)
    if layout in LAYOUTS:
        LAYOUTS.remove(layout)
    LAYOUTS.insert(0, layout)


def find_layout(module: nn.Module) -> MLPLayout | None:
    """Return the layout whose attributes a module has, or None if it is no gated MLP."""
    return next((layout for layout in LAYOUTS if layout.fits(module)), None)


def is_gated_mlp(module: nn.Module) -> bool:
    """Tell whether a module has the attributes of a gated MLP, whatever its class."""
    return find_layout(module) is not None

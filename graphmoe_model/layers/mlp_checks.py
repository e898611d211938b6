"""Whether a module is a gated MLP that this package can adapt: by its parts, and by what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphmoe_kernels import ACTIVATIONS
from graphmoe_model.layers.base_mlp import activation_name, down_projection, wrap_mlp
from graphmoe_model.layers.mlp_layouts import LAYOUTS, MLPLayout, find_layout
from graphmoe_model.storage.dequantise import (
    check_dense,
    dense_linear,
    dense_weight,
    input_dtype,
    is_linear,
    is_quantised,
)
from graphmoe_model.storage.weight_management import check_unsharded, gathered_weights

PROBED_RATE = 0.5  # of every dropout in its turn, while the MLP's behaviour is compared


class MLPTraits(NamedTuple):
    """What a layer has to know of the MLP that it wraps.

    Attributes:
        hidden: D.
        intermediate: F.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        output_dropout: the attribute with the rate of a dropout after the down projection (`dropout_rate`), or None.
    """

    hidden: int
    intermediate: int
    activation: str
    output_dropout: str | None = None


def dropout_rate(mlp: nn.Module, name: str) -> float:
    """The rate as it is now; the attribute is a number or an ``nn.Dropout``."""
    found = getattr(mlp, name)
    return float(found.p if isinstance(found, nn.Dropout) else found)


def check_mlp(mlp: nn.Module) -> MLPTraits:
    """Find out what a layer over this MLP has to compute.

    Raises:
        TypeError: not a gated MLP, or one whose forward does more than dropout(down(act(gate(x)) * up(x))), or whose
            weights are spread over devices; the message says which and what to do.
        ValueError: an activation that the kernels do not know.
    """
    check_unsharded(mlp, type(mlp).__name__)
    with gathered_weights(mlp):
        return _traits(mlp)


def _traits(mlp: nn.Module) -> MLPTraits:
    kind, layout = type(mlp).__name__, find_layout(mlp)
    if layout is None:
        children = ", ".join(name for name, _ in mlp.named_children()) or "none"
        known = "; ".join(map(str, LAYOUTS))
        raise TypeError(
            f"{kind} is not a gated MLP: expected linears for gate, up and down, and an activation, by names that are "
            f"known ({known}); it has the submodules {children}. Ungated MLPs and sparse expert blocks are not "
            "supported; a gated MLP under other names is, after graphmoe_model.register_mlp_layout."
        )
    if getattr(mlp, "activation_sparsity", 0.0):
        raise TypeError(f"{kind} makes its activations sparse (activation_sparsity > 0): not supported")
    forward = vars(mlp).get("_old_forward", mlp.forward)  # accelerate's device hooks keep the forward there
    if getattr(forward, "__func__", None) is not type(mlp).forward:
        raise TypeError(
            f"the forward of this {kind} was replaced on the instance (Liger-Kernel's instance patch does "
            "that), and the replacement would bypass this layer; apply the patch without its swiglu/geglu part"
        )
    for name in layout.linears:
        _check_projection(getattr(mlp, name), f"{kind}.{name}")
    _check_dtypes(mlp, layout)
    _check_children(mlp, layout)
    down = down_projection(mlp)
    traits = MLPTraits(int(down.out_features), int(down.in_features), activation_name(mlp))
    with _dense_linears(mlp, layout):
        return traits._replace(output_dropout=_check_forward(mlp, traits))


def _check_children(mlp: nn.Module, layout: MLPLayout) -> None:
    """Every submodule beside the projections and the activation is a step that this layer would leave out."""
    known = {*layout.linears, *layout.activations}
    inert = (nn.Identity, nn.Dropout)  # where a dropout drops, `_check_forward` finds out
    children = {name: child for name, child in mlp.named_children() if name not in known}
    extra = [name for name, child in children.items() if not isinstance(child, inert)]
    if extra:
        raise TypeError(
            f"{type(mlp).__name__} has the submodules {', '.join(extra)} beside its projections and "
            "activation; only down(act(gate(x)) * up(x)) is supported"
        )


def _check_projection(linear: nn.Module, name: str) -> None:
    if hasattr(linear, "base_layer"):
        raise TypeError(f"{name} is wrapped by another adapter ({type(linear).__name__}); unload that adapter first")
    if not is_linear(linear):
        raise TypeError(f"{name} ({type(linear).__name__}) is not a linear layer with a weight of its own")
    bias = getattr(linear, "bias", None)
    if isinstance(bias, Tensor) and bias.shape != (linear.out_features,):
        raise TypeError(
            f"{name} has a bias of shape {list(bias.shape)}, expected [{linear.out_features}], one number for every "
            "output: the folds take it apart"
        )
    check_dense(linear, name)


def _check_dtypes(mlp: nn.Module, layout: MLPLayout) -> None:
    taken = {name: input_dtype(getattr(mlp, name)) for name in layout.linears}
    dtypes = {name: dtype for name, dtype in taken.items() if dtype is not None}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(
            f"the projections of this {type(mlp).__name__} have different dtypes ({found}; T5 keeps its last one in "
            "float32); cast the MLP to one dtype"
        )


# --- behaviour -------------------------------------------------------------------------------------------------------


@contextmanager
def _dense_linears(mlp: nn.Module, layout: MLPLayout) -> Iterator[None]:
    """Inside the block an MLP with quantised linears has plain ones of the same weights.

    What is looked for there is what the MLP does beside its linears. Those of 8 bits round differently in training and
    in evaluation; others settle the dtype of their arithmetic, or their layout, at their first forward.
    """
    linears: dict[str, Any] = {name: getattr(mlp, name) for name in layout.linears}
    if not any(map(is_quantised, linears.values())):
        yield
        return
    try:
        dtype = dense_weight(linears[layout.down]).dtype
        for name, linear in linears.items():
            setattr(mlp, name, dense_linear(linear, dtype))
        yield
    finally:
        for name, linear in linears.items():
            setattr(mlp, name, linear)


def _check_forward(mlp: nn.Module, traits: MLPTraits) -> str | None:
    """Compare the MLP with down(act(gate) * up) on made-up tokens; the attribute of a dropout that comes after.

    Attributes cannot tell a clamped, scaled or dropped-out MLP from a plain one; its output can. In evaluation it has
    to be equal, and in training without its dropouts too; then each dropout is turned on alone, and compared with one
    on the output under the same random numbers. Weights without data (meta device) are not compared.
    """
    weight: Tensor = down_projection(mlp).weight
    rates = {name: dropout_rate(mlp, name) for name in _dropouts(mlp)}
    used = [name for name, rate in rates.items() if rate > 0]
    if weight.device.type == "meta":
        if used:
            raise TypeError(
                f"{type(mlp).__name__} has a dropout ({', '.join(used)}) and no weights yet (meta device), so where it "
                "drops cannot be found out; load the weights first, or set the dropout to 0"
            )
        return None
    x = _tokens(mlp, traits, weight)
    with torch.no_grad(), _state_kept(mlp, rates):
        expected = _plain(mlp, traits, x)
        for training in (False, True):
            mlp.train(training)
            for name in rates:
                _set_rate(mlp, name, 0.0)
            if not _equal(_drawn(mlp, x), expected):
                raise TypeError(
                    f"{type(mlp).__name__} computes something else than down(act(gate(x)) * up(x)) (a clamp, a "
                    "multiplier, a norm of its own), which is not supported"
                )
        after = [name for name in rates if _drops_output(mlp, name, x, expected)]
        inside = [name for name in used if name not in after and not _is_idle(mlp, name, x, expected)]
    if inside or len(after) > 1:
        raise TypeError(
            f"{type(mlp).__name__} has a dropout of its own ({', '.join(inside or after)} = "
            f"{', '.join(str(rates[name]) for name in inside or after)}) that is not one dropout on its output; only "
            "that is supported: set it to 0 (lora_dropout drops the input of every A in its place)"
        )
    return after[0] if after else None


def _dropouts(mlp: nn.Module) -> list[str]:
    """Attributes that are, or may be, the rate of a dropout."""
    modules = [name for name, child in mlp.named_children() if isinstance(child, nn.Dropout)]
    numbers = [name for name, value in vars(mlp).items() if "drop" in name and isinstance(value, float)]
    return [*modules, *numbers]


def _set_rate(mlp: nn.Module, name: str, rate: float) -> None:
    found = getattr(mlp, name)
    if isinstance(found, nn.Dropout):
        found.p = rate
    else:
        setattr(mlp, name, rate)


@contextmanager
def _state_kept(mlp: nn.Module, rates: dict[str, float]) -> Iterator[None]:
    modes = {module: module.training for module in mlp.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, rate in rates.items():
            _set_rate(mlp, name, rate)


def _tokens(mlp: nn.Module, traits: MLPTraits, weight: Tensor) -> Tensor:
    """[1, 2, D], made up without drawing from a generator."""
    dtype = weight.dtype
    token = torch.arange(1, traits.hidden + 1, device=weight.device).sin()
    with (
        torch.no_grad()
    ):  # The second token is scaled so that a clamp of the pre-activations shows: those in use cut off by 16.
        largest = torch.cat(wrap_mlp(mlp).project_in(token[None].to(dtype)), dim=-1).abs().max().float()
    return torch.stack([token, token * (64 / largest.clamp(min=1e-3))])[None].to(dtype)


def _plain(mlp: nn.Module, traits: MLPTraits, x: Tensor) -> Tensor:
    base = wrap_mlp(mlp)
    gate, up = base.project_in(x)
    return base.project_out(ACTIVATIONS[traits.activation].function(gate) * up)


def _drawn(function: nn.Module, x: Tensor) -> Tensor:
    """What a function that may draw gives for x, from the generator's state as it is, which stays."""
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
        y: Tensor = function(x)
    return y


def _equal(actual: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.75 * expected.float().abs().amax(dim=-1, keepdim=True)
    return not bool(((actual.float() - expected.float()).abs() > tolerance).any())


def _drops_output(mlp: nn.Module, name: str, x: Tensor, expected: Tensor) -> bool:
    """Whether the dropout called ``name``, on alone, is one on the MLP's output."""
    dropout = nn.Dropout(PROBED_RATE)
    return _equal(_with_rate(mlp, name, x), _drawn(dropout, expected))


def _is_idle(mlp: nn.Module, name: str, x: Tensor, expected: Tensor) -> bool:
    """Whether the rate called ``name`` is nobody's."""
    return _equal(_with_rate(mlp, name, x), expected)


def _with_rate(mlp: nn.Module, name: str, x: Tensor) -> Tensor:
    _set_rate(mlp, name, PROBED_RATE)
    y = _drawn(mlp, x)
    _set_rate(mlp, name, 0.0)
    return y

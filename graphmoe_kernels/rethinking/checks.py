"""What a call of the recurrence is refused for, before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.gru import check_candidate_activation
from graphmoe_kernels.rethinking.call import Call, make_call
from graphmoe_kernels.rethinking.chosen import ChosenExperts, SingleExpert
from graphmoe_kernels.rethinking.kinds import LayerWeights
from graphmoe_kernels.rethinking.mixed import MixedExperts
from graphmoe_kernels.rethinking.weights import (
    DenseMLP,
    ExpertWeights,
    GRUWeights,
    LinearRouters,
    Magnitudes,
    RethinkingSpec,
    padded,
)
from graphmoe_kernels.validation import (
    agreed,
    check_choice,
    check_device,
    check_dropout,
    check_flag,
    check_floats,
    check_number,
    check_positive,
    check_shapes,
    check_top_k,
    check_type,
)

CANDIDATE_INPUTS = ("expert_output", "hidden_state")


# Settings that `check_spec` has passed, by identity, beside what else it read. They hold the settings, so that no id
# comes back as another object's; equality would take rounds=True for rounds=1.
_passed: dict[tuple[int, int, bool], RethinkingSpec] = {}
_MOST_PASSED = 4096


def checked_call(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, backend: str) -> Call:
    """Give what the rounds have in common, for arguments of `graphmoe_kernels.rethink` that are found to be right.

    Settings are checked once for each object that holds them, and each number of experts.

    Raises:
        TypeError, ValueError: arguments that make no sense, alone or together.
    """
    check_weights(weights)
    gru = weights.gru
    key = (id(spec), weights.experts.lora.gate_A.shape[0], gru is None)
    if torch.compiler.is_compiling():
        check_spec(spec, weights)
    elif _passed.get(key) is not spec:
        check_spec(spec, weights)
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed[key] = spec
    check_input(x, weights)
    call = make_call(x, spec, backend)
    if call.backend == "triton":
        weights.experts.check_kernels(spec.top_k, 0 if gru is None else padded(gru.width), spec.activation)
    return call


def check_spec(spec: RethinkingSpec, weights: LayerWeights) -> None:
    """`TypeError` or `ValueError` for settings that no layer, or not this one, can run with."""
    check_type("spec", spec, RethinkingSpec)
    get_activation(spec.activation)
    check_positive("rounds", spec.rounds)
    if spec.rounds > 1 and weights.gru is None:
        raise ValueError(f"rounds={spec.rounds} needs GRU weights; there are none (rounds=1 needs none)")
    if spec.rounds == 1 and weights.gru is not None:
        raise ValueError("rounds=1 has no step between rounds and would ignore the GRU weights; pass gru=None with it")
    check_number("scale", spec.scale)
    check_flag("normalize", spec.normalize)
    check_choice("candidate_input", spec.candidate_input, CANDIDATE_INPUTS)
    check_candidate_activation(spec.candidate_activation)
    check_top_k(spec.top_k, weights.experts.lora.gate_A.shape[0])
    check_dropout(spec.dropout)


def check_input(x: Tensor, weights: LayerWeights) -> None:
    """`TypeError` or `ValueError` for an x that is no batch of hidden states for this layer."""
    gate_A, base = weights.experts.lora.gate_A, weights.base
    hidden = gate_A.shape[2]
    check_floats("x", x)
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be [tokens, {hidden}], got {list(x.shape)}; flatten a batch first")
    if x.device != gate_A.device:
        check_device("x", x, "the experts", gate_A)
    if isinstance(base, DenseMLP) and x.dtype != base.gate.dtype:
        cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, base.gate.dtype)
        if not cast:
            raise TypeError(
                f"x is {x.dtype}, the base MLP's weights {base.gate.dtype}; cast one of them or use torch.autocast"
            )


def check_weights(weights: LayerWeights) -> None:
    """`TypeError` or `ValueError` for weights that are no layer's: each message names the tensor.

    Tensor by tensor where all are plain ones, with a `DenseMLP` as their base. What modules hold was checked where they
    were made, and is not again at every call.
    """
    check_type("weights", weights, LayerWeights)
    experts, base, gru = weights.experts, weights.base, weights.gru
    if not isinstance(experts, KINDS):
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"experts must be of a kind ({names}), got {type(experts).__name__}")
    check_type("experts.lora", experts.lora, ExpertWeights)
    check_type("gru", gru, GRUWeights, optional=True)
    if not hasattr(base, "project_in"):
        raise TypeError(f"base must be a BaseMLP, such as DenseMLP, got {type(base).__name__}")
    if isinstance(base, DenseMLP):
        _check_tensors(experts.lora, base, gru)
    _check_routers(experts)


def _check_tensors(lora: ExpertWeights, base: DenseMLP, gru: GRUWeights | None) -> None:
    n, r, D, F = _sizes(lora, base)
    main = ("gate_A", lora.gate_A)

    def told() -> str:
        return f"{n} experts of rank {r}, D={D} and F={F}"

    wide, narrow = (n, F, r), (n, r, D)
    shapes = (narrow, wide, narrow, wide, (n, r, F), (n, D, r))
    check_shapes("", ExpertWeights._fields[:6], lora.pairs, shapes, told, main)
    check_type("magnitudes", lora.magnitudes, Magnitudes, optional=True)
    if lora.magnitudes is not None:
        _check_together(lora.magnitudes)
        check_shapes("magnitudes.", Magnitudes._fields, lora.magnitudes, ((n, F), (n, F), (n, D)), told, main)
    biases = [None if bias is None else (width,) for bias, width in zip(base[3:], (F, F, D), strict=True)]
    check_shapes("base.", DenseMLP._fields, base, ((F, D), (F, D), (D, F), *biases), told, main)
    for name, tensor in zip(base._fields, base, strict=True):
        if tensor is not None and tensor.dtype != base.gate.dtype:
            raise TypeError(f"base.{name} is {tensor.dtype}, base.gate {base.gate.dtype}; an MLP has one dtype")
    if gru is not None:
        check_floats("gru.candidate_bias", gru.candidate_bias)
        if gru.candidate_bias.dim() != 1 or gru.width == 0:
            found = list(gru.candidate_bias.shape)
            raise ValueError(f"gru.candidate_bias must be [G] with G of at least 1, got {found}")
        G = agreed((gru.candidate_bias, 0), (gru.output, 1), (gru.update, 0), (gru.reset, 0), (gru.candidate, 0))
        gate, named = (G, G + D), lambda: f"a GRU of width {G} and {told()}"
        check_shapes("gru.", GRUWeights._fields, gru, (gate, gate, gate, (G,), (D, G)), named, main)


def _check_together(magnitudes: Magnitudes) -> None:
    missing = [f"magnitudes.{name}" for name, tensor in magnitudes._asdict().items() if tensor is None]
    if missing:
        raise ValueError(
            f"DoRA's magnitudes belong together, and {' and '.join(missing)} is missing: pass all three, or "
            "magnitudes=None"
        )


def _sizes(lora: ExpertWeights, base: DenseMLP) -> tuple[int, int, int, int]:
    """n and r, as most experts have them, and the base MLP's D and F."""
    for name, tensor in zip(ExpertWeights._fields, lora.pairs, strict=False):
        check_floats(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have three dimensions, one for the experts; got {list(tensor.shape)}")
    n = agreed((lora.gate_A, 0), (lora.gate_B, 0), (lora.up_A, 0))
    r = agreed((lora.gate_A, 1), (lora.gate_B, 2), (lora.up_A, 1))
    D = agreed((base.gate, 1), (base.up, 1), (base.down, 0), (lora.gate_A, 2))
    F = agreed((base.gate, 0), (base.up, 0), (base.down, 1), (lora.gate_B, 1))
    if n == 0 or D == 0 or F == 0:
        raise ValueError(f"a layer has experts, a hidden and an intermediate size; got {n} experts, D={D} and F={F}")
    return n, r, D, F


def _check_routers(experts: Any) -> None:
    """Refuse routers that do not fit their experts.

    At every call: one with fewer rows than experts would never choose some, one with more what is not there, and a
    kept fold of one round does not know them.
    """
    gate_A = experts.lora.gate_A
    n, _, D = gate_A.shape
    if isinstance(experts, MixedExperts):
        routers, F = experts.linear_routers, experts.lora.gate_B.shape[1]
        check_type("linear_routers", routers, LinearRouters)
        prefix, fields, shapes = "linear_routers.", LinearRouters._fields, ((n, D), (n, D), (n, F))
        check_shapes(prefix, fields, routers, shapes, lambda: f"{n} experts, a row for each", ("gate_A", gate_A))
    elif isinstance(experts, SingleExpert):
        if n != 1:
            raise ValueError(f"{n} experts need a router; without one there can be one expert")
    elif experts.router is None:
        raise ValueError(f"{n} experts need a router; without one there can be one expert (SingleExpert)")
    else:
        router = experts.router
        check_floats("router", router)
        if router.shape != (n, D):
            raise ValueError(f"router must be [{n}, {D}] for {n} experts, a row for each; got {list(router.shape)}")
        if router.device != gate_A.device:
            check_device("router", router, "gate_A", gate_A)


KINDS = (ChosenExperts, SingleExpert, MixedExperts)

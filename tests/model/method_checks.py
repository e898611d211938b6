"""What the tests of the methods compare with the equations, and in which forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphmoe_kernels.testing import within_budget
from tests.kernels.cases import assert_equal_to, errors
from tests.model.method_oracles import (
    FORMS,
    HIDDEN,
    by_equations,
    decided_inputs,
    differentiate,
    form_config,
)

TOKENS = 23
FORWARD, BACKWARD = 1e-10, 1e-9
FOLDS = pytest.mark.parametrize("fold", ["always", "never"])
# Every form in both foldings, but for one round, where there is little to fold, only one of them.
FOLDED_FORMS = [(form, fold) for form in FORMS for fold in ("always", "never") if fold == "always" or "graph" in form]
FORMS_AND_FOLDS = pytest.mark.parametrize(("form", "fold"), FOLDED_FORMS, ids=lambda value: value)
DORA_FORMS = [form for form in FORMS if form_config(form).use_dora]
ROUTED_FORMS = [form for form in FORMS if form_config(form).method != "lora"]
# One of each routing kind, with rounds; the second also with DoRA.

KINDS = [f"graphmoe-{name}" for name in ("lora", "mixlora", "loramoe", "mola", "mixdora", "doramoe", "moda")]


def hidden_states(count: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, HIDDEN, dtype=torch.float64).to(dtype)


def config_of(layer: nn.Module):
    return layer.lora_graphmoe["default"].config


def idle(layer: nn.Module, name: str) -> bool:
    """The reset gate acts on the state, which is zero in the only step of two rounds."""
    return name == "gru.reset_gate.weight" and config_of(layer).rounds == 2


def check_equal(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output in training and evaluation, and every gradient, equal the oracle's; returns what was found."""
    upstream = torch.randn_like(x[..., :1].expand_as(by_equations(layer, x)))
    exact = differentiate(layer, lambda v: by_equations(layer, v), x, upstream)
    found = differentiate(layer.train(), layer, x, upstream)
    assert_equal_to({"y": found["y"]}, {"y": exact["y"]}, upstream, FORWARD)
    assert_equal_to(found, exact, upstream, BACKWARD)
    layer.eval()
    assert_equal_to(differentiate(layer, layer, x, upstream), exact, upstream, BACKWARD)
    with torch.no_grad():
        for _ in range(2):  # the second on what the first one kept
            assert_equal_to({"y": layer(x)}, {"y": exact["y"]}, upstream, FORWARD)
    return found


class Outcomes(NamedTuple):
    """y and every gradient by name: of the layer, of the equations in its dtype and in fp64; the upstream gradient."""

    found: dict[str, Tensor]
    literal: dict[str, Tensor]
    exact: dict[str, Tensor]
    upstream: Tensor


def outcomes(
    layer: nn.Module, dtype: torch.dtype, *, literal: nn.Module | None = None, count: int = 32, autocast: bool = False
) -> Outcomes:
    """A layer on inputs that ``dtype`` holds; ``literal`` has the same values where the equations need one dtype."""
    wide, low = copy.deepcopy(layer).double(), next(layer.base_layer.parameters())
    x = decided_inputs(wide, dtype, count)
    upstream = torch.randn_like(by_equations(wide, x)).to(dtype).double()

    def run(module, function, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast and x.dtype != torch.float64):
            return differentiate(module, function, x, upstream)

    exact = run(wide, lambda v: by_equations(wide, v), x)
    literal = literal or layer
    equations = run(literal, lambda v: by_equations(literal, v), x.to(low.dtype))
    found = run(layer.train(), layer, x.to(low.dtype))
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        found["y in evaluation"] = layer.eval()(x.to(low.dtype))
    for known in (exact, equations):
        known["y in evaluation"] = known["y"]
    assert found["y"].dtype == found["y in evaluation"].dtype == dtype
    return Outcomes(found, equations, exact, upstream)


def check_budget(draw: Callable[[], Outcomes], dtype: torch.dtype) -> None:
    """Every error at most twice that of the equations computed in ``dtype``; the message lists those that are not.

    Now and then a single token is so ill-conditioned that it makes the whole error, and one of the two happens to be
    lucky there. What is off must therefore be off in each of three draws.
    """
    off: dict[str, list[str]] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        found, literal, exact, upstream = draw()
        mine, allowed = errors(found, exact, upstream), errors(literal, exact, upstream)
        over = {name for name in exact if not within_budget(mine[name], allowed[name], dtype)}
        report = {name: f"{mine[name]:.2e}, the equations {allowed[name]:.2e}" for name in over}
        off = {name: [*off.get(name, []), report[name]] for name in over if seed == 0 or name in off}
        if not off:
            return
    raise AssertionError(f"errors above the budget of {dtype}: {off}")

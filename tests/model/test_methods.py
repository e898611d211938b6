"""Every method of the paper on single MLPs and linears, against oracles written from the equations alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphmoe_kernels.testing import relative_error, within_budget
from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.linear import RoutedLoRALinear
from tests.kernels.cases import assert_equal_to, errors
from tests.model.method_oracles import (
    EXPERTS,
    FORMS,
    HIDDEN,
    INTERMEDIATE,
    adapter_state,
    by_equations,
    decided_inputs,
    differentiate,
    expected_shapes,
    form_config,
    move_from_start,
    small_ffn,
    small_mlp,
)

pytestmark = pytest.mark.methods

TOKENS = 23
FORWARD, BACKWARD = 1e-10, 1e-9
FOLDS = pytest.mark.parametrize("fold", ["always", "never"])
# Every form in both foldings, but for one round, where there is little to fold, only one of them.
FOLDED_FORMS = [(form, fold) for form in FORMS for fold in ("always", "never") if fold == "always" or "graph" in form]
FORMS_AND_FOLDS = pytest.mark.parametrize(("form", "fold"), FOLDED_FORMS, ids=lambda value: value)
DORA_FORMS = [form for form in FORMS if form_config(form).use_dora]
ROUTED_FORMS = [form for form in FORMS if form_config(form).method != "lora"]
# One of each routing kind, with rounds; the second also with DoRA.
PLAIN_KINDS = ["graphmoe-lora", "graphmoe-mixlora", "graphmoe-loramoe", "graphmoe-mola"]
KINDS = [*PLAIN_KINDS, "graphmoe-mixdora", "graphmoe-doramoe", "graphmoe-moda"]


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


@FOLDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_equations(form, bias, fold):
    """Every method computes what its equations say, forward and backward, however it is folded."""
    layer = small_ffn(form, bias=bias, fold=fold)
    for name, grad in check_equal(layer, hidden_states()).items():
        assert grad.any() or idle(layer, name), f"{name} has a gradient"
        if name.endswith("magnitude"):
            assert grad.flatten(1).abs().sum(dim=1).all(), f"every expert's {name} has a gradient"


@FOLDS
@pytest.mark.parametrize(
    "options",
    [
        {"candidate_input": "hidden_state", "candidate_activation": "tanh", "rounds": 2},
        {"norm_topk_prob": False, "use_rslora": True, "rounds": 5},
    ],
    ids=lambda options: f"T={options['rounds']}",
)
@pytest.mark.parametrize("form", KINDS)
def test_options(form, options, fold):
    """The options of rethinking, routing and scale mean the same in every method."""
    check_equal(small_ffn(form, bias=True, fold=fold, **options), hidden_states())


@pytest.mark.slow
@FOLDS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("candidate_activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_option(form, rounds, candidate_input, candidate_activation, norm_topk_prob, bias, fold):
    """All combinations of the options."""
    options = {"candidate_input": candidate_input, "candidate_activation": candidate_activation}
    options |= {"rounds": rounds, "norm_topk_prob": norm_topk_prob}
    check_equal(small_ffn(form, bias=bias, fold=fold, **options), hidden_states())


@pytest.mark.parametrize("form", FORMS)
def test_parameter_names_and_shapes_are_the_checkpoint_contract(form):
    """Saved adapters of every method load by these names: nothing renamed, nothing missing, nothing besides."""
    layer = small_ffn(form)
    n = 1 if config_of(layer).method == "lora" else EXPERTS
    found = {name: tuple(p.shape) for name, p in adapter_state(layer).items()}
    assert found == expected_shapes(config_of(layer), n, HIDDEN, INTERMEDIATE)
    assert all(p.requires_grad for p in adapter_state(layer).values())
    assert not any(p.requires_grad for p in layer.base_layer.parameters())
    adapter = {f"lora_graphmoe.default.{name}" for name in found}
    base = {f"base_layer.{name}" for name in layer.base_layer.state_dict()}
    assert set(layer.state_dict()) == adapter | base, "magnitudes are saved, and nothing but parameters"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@FORMS_AND_FOLDS
def test_fresh_adapter_leaves_the_mlp_as_it_was(form, dtype, fold):
    """Attaching changes no output, with DoRA and whatever the routing; dropout acts on the input of A alone."""
    mlp = small_mlp(bias=True).to(dtype)
    x = hidden_states(dtype=dtype)
    before = mlp(x).detach()
    options = {"init_lora_weights": True, "lora_dropout": 0.5, "fold": fold}
    layer = FusedGraphMoEFFN(mlp, form_config(form, **options))
    with torch.no_grad():
        for name, parameter in adapter_state(layer).items():
            if name.endswith("router.weight"):
                parameter.mul_(50)
    # No further off than the MLP itself is, or one rounding of the result.
    exact = copy.deepcopy(mlp).double()(x.double())
    bound = 1e-12 if dtype == torch.float64 else max(relative_error(before, exact), torch.finfo(dtype).eps)
    assert relative_error(layer(x), before) <= bound
    with torch.no_grad():
        assert relative_error(layer.eval()(x), before) <= bound


@pytest.mark.parametrize("form", DORA_FORMS)
def test_magnitudes_start_as_the_norms(form):
    """m is the row norm of W + s B A at the start, for a B of zeros and for one that is drawn."""
    for neutral in (True, False):
        layer = FusedGraphMoEFFN(small_mlp(), form_config(form, init_lora_weights=neutral))
        state, config = adapter_state(layer), config_of(layer)
        for name in ("gate_proj", "up_proj", "down_proj"):
            A, B = state[f"experts.{name}.A"], state[f"experts.{name}.B"]
            weight = getattr(layer.base_layer, name).weight
            norms = (weight + config.lora_alpha / config.r * B @ A).norm(dim=-1)  # [n, out]
            torch.testing.assert_close(state[f"experts.{name}.magnitude"].detach(), norms.detach())


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("form", ["dora", "mixdora", "doramoe", "graphmoe-moda"])
def test_a_zero_row_is_refused_by_name(form, name):
    """A row without a direction has no DoRA: said when the adapter is made, not found as NaN in training."""
    mlp = small_mlp()
    with torch.no_grad():
        getattr(mlp, name).weight[3] = 0
    with pytest.raises(ValueError, match=name):
        FusedGraphMoEFFN(mlp, form_config(form, init_lora_weights=True))


@pytest.mark.parametrize("form", FORMS)
def test_one_token(form):
    """One token: the experts that it did not choose have gradients of zero, not none and not NaN."""
    layer = small_ffn(form, fold="always")
    found = check_equal(layer, hidden_states(1))
    if config_of(layer).method in ("mixlora", "mola") and config_of(layer).rounds == 1:
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert found[f"experts.{name}.A"].flatten(1).any(dim=1).sum() == config_of(layer).top_k


@FORMS_AND_FOLDS
def test_no_tokens(form, fold):
    """An empty batch goes through, backward too."""
    layer = small_ffn(form, fold=fold)
    x = hidden_states(0).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, HIDDEN)
    assert not any(p.grad.any() for p in adapter_state(layer).values())
    with torch.no_grad():
        assert layer.eval()(x).shape == (0, HIDDEN)


@FOLDS
@pytest.mark.parametrize("top_k", [1, EXPERTS])
@pytest.mark.parametrize("form", [form for form in KINDS if form_config(form).method in ("mixlora", "mola")])
def test_one_or_all_experts_a_token(form, top_k, fold):
    """k = 1 and k = n are the ends of top-k."""
    check_equal(small_ffn(form, fold=fold, top_k=top_k), hidden_states())


@pytest.mark.parametrize("form", ROUTED_FORMS)
def test_one_expert(form):
    """n = 1: a router with a single output."""
    options = {} if form_config(form).base_method.dense else {"top_k": 1}
    check_equal(small_ffn(form, fold="always", num_experts=1, **options), hidden_states())


@FOLDS
@pytest.mark.parametrize("form", [form for form in FORMS if form_config(form).method in ("mixlora", "mola")])
def test_an_expert_nobody_chose(form, fold):
    """No token goes to the last expert, in no linear: it changes nothing and its gradients are zero."""
    layer = small_ffn(form, fold=fold, num_experts=5)
    with torch.no_grad():
        for name, router in adapter_state(layer).items():
            if name.endswith("router.weight"):  # two others always lie above zero, the last one's logit
                router.copy_(torch.stack([router[0], 2 * router[0], -router[0], -2 * router[0], 0 * router[0]]))
    for name, grad in check_equal(layer, hidden_states()).items():
        if name.startswith("experts.") and "router" not in name:
            assert not grad[-1].any(), name
            assert grad[:-1].flatten(1).any(dim=1).all(), name


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_gives_the_same_gradients(form, use_reentrant):
    """With dropout too: the recomputation draws the same masks."""
    layer = small_ffn(form, fold="always", lora_dropout=0.3)
    x, upstream = hidden_states(), hidden_states()

    def gradients(run):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        y = run(leaf)
        y.backward(upstream)
        return [y.detach(), leaf.grad, *(p.grad for p in adapter_state(layer).values())]

    plain = gradients(layer)
    for mine, theirs in zip(gradients(lambda v: checkpoint(layer, v, use_reentrant=use_reentrant)), plain, strict=True):
        assert torch.equal(mine, theirs)
    assert relative_error(plain[0], by_equations(layer, x)) > 1e-3, "dropout was active"
    with torch.no_grad():
        assert relative_error(layer.eval()(x), by_equations(layer, x)) <= FORWARD, "in training only"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FORMS_AND_FOLDS
def test_error_is_within_budget(form, dtype, fold):
    """In a model's dtype: y and every gradient no further off than twice the equations computed in that dtype."""
    check_budget(lambda: outcomes(small_ffn(form, bias=True, fold=fold).to(dtype), dtype), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_fp32_adapters_on_a_bf16_model_are_within_budget(form):
    """PEFT keeps adapters in fp32 on a bf16 base: y is bf16, gradients fp32, errors as those of bf16 throughout."""

    def draw() -> Outcomes:
        literal = small_ffn(form, bias=True, fold="always").bfloat16()
        layer = copy.deepcopy(literal)
        layer.lora_graphmoe.float()
        return outcomes(layer, torch.bfloat16, literal=literal)

    check_budget(draw, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    """An fp32 layer under bf16 autocast: bf16 out, fp32 gradients, within the budget of the equations under it."""

    def draw() -> Outcomes:
        return outcomes(small_ffn(form, bias=True, fold="always").bfloat16().float(), torch.bfloat16, autocast=True)

    check_budget(draw, torch.bfloat16)


def test_the_budget_can_be_exceeded():
    """The budget is no rubber stamp: the equations in the next lower precision do not keep it."""

    def draw() -> Outcomes:
        layer = small_ffn("graphmoe-moda", bias=True).bfloat16()
        kept = outcomes(copy.deepcopy(layer).float(), torch.float32)
        return kept._replace(found=outcomes(layer, torch.bfloat16).literal)

    with pytest.raises(AssertionError, match="above the budget"):
        check_budget(draw, torch.float32)


BASE_WEIGHTS = [f"{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_follows_every_weight(form):
    """Any weight written in place in evaluation, of the adapter or of the base, is seen by the next forward."""
    layer, x = small_ffn(form, fold="always").eval(), hidden_states()
    weights = adapter_state(layer) | {name: layer.base_layer.get_parameter(name) for name in BASE_WEIGHTS}
    before = layer(x)
    for name, tensor in weights.items():
        tensor.mul_(torch.rand_like(tensor) + 0.7)
        after = layer(x)
        assert relative_error(after, by_equations(layer, x)) <= FORWARD, name
        assert relative_error(after, before) > 1e-6 or idle(layer, name), f"a change of {name} matters"
        before = after


LINEAR_FORMS = ["mola", "moda"]


def small_linear(form: str, bias: bool = False, **options) -> RoutedLoRALinear:
    """An fp64 attention projection with experts, all its parameters away from their start."""
    layer = RoutedLoRALinear(nn.Linear(HIDDEN, 31, bias=bias).double(), form_config(form, **options))
    move_from_start(adapter_state(layer))
    return layer


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}, {"top_k": 1}, {"top_k": 4}, {"rounds": 3}], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_attention_linear_equals_the_equations(form, bias, options):
    """Experts in an attention projection; they run once, however many rounds the MLPs have."""
    layer = small_linear(form, bias, **options)
    shapes = {"A": (EXPERTS, 5, HIDDEN), "B": (EXPERTS, 31, 5), "router.weight": (EXPERTS, HIDDEN)}
    shapes |= {"magnitude": (EXPERTS, 31)} if form == "moda" else {}
    assert {name: tuple(p.shape) for name, p in adapter_state(layer).items()} == shapes
    for count in (TOKENS, 1):
        check_equal(layer, hidden_states(count))
    x = hidden_states(6).view(2, 3, HIDDEN)
    assert relative_error(layer(x), by_equations(layer, x)) <= FORWARD
    assert layer(hidden_states(0)).shape == (0, 31)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_fresh_attention_linear_is_the_base(form, dtype):
    """Attaching changes no projection, also in training with dropout."""
    base = nn.Linear(HIDDEN, 31).to(dtype)
    x = hidden_states(dtype=dtype)
    before = base(x).detach()
    layer = RoutedLoRALinear(base, form_config(form, init_lora_weights=True, lora_dropout=0.5))
    bound = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for training in (True, False):
        assert relative_error(layer.train(training)(x), before) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_attention_linear_is_within_budget(form, dtype):
    """As `test_error_is_within_budget`, for experts in an attention projection."""
    check_budget(lambda: outcomes(small_linear(form, bias=True).to(dtype), dtype), dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", ["A", "B", "router.weight", "magnitude", "weight"])
def test_attention_linear_follows_every_weight(name):
    """As `test_what_is_kept_follows_every_weight`, for experts in an attention projection."""
    layer, x = small_linear("moda", bias=True).eval(), hidden_states()
    before = layer(x)
    tensor = layer.base_layer.weight if name == "weight" else adapter_state(layer)[name]
    tensor.mul_(torch.rand_like(tensor) + 0.7)
    assert relative_error(layer(x), by_equations(layer, x)) <= FORWARD
    assert relative_error(layer(x), before) > 1e-6, "the change matters"


def test_attention_zero_row_is_refused():
    """DoRA on a projection with a row of zeros."""
    base = nn.Linear(HIDDEN, 31).double()
    with torch.no_grad():
        base.weight[3] = 0
    with pytest.raises(ValueError, match="row"):
        RoutedLoRALinear(base, form_config("moda", init_lora_weights=True))

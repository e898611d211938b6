"""Every method of the paper on single MLPs, against oracles written from the equations alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from tests.model.method_checks import (
    DORA_FORMS,
    FOLDS,
    FORMS_AND_FOLDS,
    FORWARD,
    KINDS,
    ROUTED_FORMS,
    check_equal,
    config_of,
    hidden_states,
    idle,
)
from tests.model.method_oracles import (
    EXPERTS,
    FORMS,
    HIDDEN,
    INTERMEDIATE,
    adapter_state,
    by_equations,
    expected_shapes,
    form_config,
    small_ffn,
    small_mlp,
)

pytestmark = pytest.mark.methods


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

"""`FusedGraphMoEFFN` on single MLPs of several models: what it computes and what it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_kernels import ChosenExperts, DenseMLP, LayerWeights, rethink_reference
from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from tests.model.small_mlps import EXPERTS, MLPS, RANK, SIZES, D, F, config, ffn, hidden_states, llama_mlp


def by_algorithm_1(layer: FusedGraphMoEFFN, x: Tensor) -> Tensor:
    """The oracle, fed from the layer's state dict by the documented names."""
    state = {name.rpartition("lora_graphmoe.default.")[2]: t for name, t in layer.state_dict().items()}
    base = {name.removeprefix("base_layer."): t for name, t in state.items() if name.startswith("base_layer.")}
    if "gate_up_proj.weight" in base:
        base["gate_proj.weight"], base["up_proj.weight"] = base["gate_up_proj.weight"].chunk(2)
    linears = ("gate_proj", "up_proj", "down_proj")
    mlp = DenseMLP(*(base[f"{n}.weight"] for n in linears), *(base.get(f"{n}.bias") for n in linears))
    adapter = layer._weights("default")
    lora = type(adapter.experts.lora)(*(state[f"experts.{n}.{part}"] for n in linears for part in "AB"))
    gru = adapter.gru and type(adapter.gru)(
        state["gru.update_gate.weight"],
        state["gru.reset_gate.weight"],
        state["gru.candidate.weight"],
        state["gru.candidate.bias"],
        state["gru.output_proj.weight"],
    )
    settings = layer.lora_graphmoe["default"].config
    spec = settings.spec(settings.scaling(), settings.num_experts, layer.traits.activation, training=False)
    weights = LayerWeights(mlp, ChosenExperts(lora, state["router.weight"]), gru)
    return rethink_reference(x.reshape(-1, D), weights, spec).view(x.shape)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("mlp", MLPS.values(), ids=MLPS)
def test_fresh_adapter_leaves_the_mlp_as_it_was(mlp, rounds, training):
    """Attaching changes no model's output: B and W_g are zero, whatever the MLP."""
    mlp = mlp().double()
    x = hidden_states()
    before = mlp(x)
    layer = FusedGraphMoEFFN(mlp, config(rounds=rounds, init_lora_weights=True)).train(training)
    with torch.set_grad_enabled(training):
        assert relative_error(layer(x), before) <= 1e-12


@pytest.mark.parametrize("fold", ["always", "never", "auto"])
@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False, "candidate_input": "hidden_state"}, {"rounds": 1}])
@pytest.mark.parametrize("mlp", MLPS.values(), ids=MLPS)
def test_equals_algorithm_1(mlp, options, fold):
    """The layer wires its parameters and the MLP's (biases, fused halves) to the right places."""
    layer, x = ffn(mlp(), fold=fold, **options), hidden_states()
    exact = by_algorithm_1(layer, x)
    assert relative_error(layer(x), exact) <= 1e-12
    with torch.no_grad():
        assert relative_error(layer.eval()(x), exact) <= 1e-12


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 5), (0, 5), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_shape(shape):
    """x is [..., D]: one vector, a batch, a batch of nothing; y has its shape."""
    layer = ffn().eval()
    x = torch.randn(*shape, D, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, by_algorithm_1(layer, x), rtol=1e-11, atol=1e-12)


def test_input_without_contiguous_rows():
    """A transposed or sliced batch gives what its copy gives."""
    layer, x = ffn(), hidden_states(4, 6)
    for view in (x.transpose(0, 1), x[:, ::2], x[..., :1].expand_as(x)):
        torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rounds", [1, 3])
def test_parameter_names_and_shapes_are_the_checkpoint_contract(rounds):
    """Checkpoints of any version load by these names: renaming one breaks every saved adapter."""
    G = int(0.3 * D)
    expected = {
        "router.weight": (EXPERTS, D),
        "experts.gate_proj.A": (EXPERTS, RANK, D),
        "experts.gate_proj.B": (EXPERTS, F, RANK),
        "experts.up_proj.A": (EXPERTS, RANK, D),
        "experts.up_proj.B": (EXPERTS, F, RANK),
        "experts.down_proj.A": (EXPERTS, RANK, F),
        "experts.down_proj.B": (EXPERTS, D, RANK),
    }
    if rounds > 1:
        expected |= {
            "gru.update_gate.weight": (G, G + D),
            "gru.reset_gate.weight": (G, G + D),
            "gru.candidate.weight": (G, G + D),
            "gru.candidate.bias": (G,),
            "gru.output_proj.weight": (D, G),
        }
    layer = ffn(rounds=rounds)
    trained = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"lora_graphmoe.default.{name}": shape for name, shape in expected.items()}
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {f"base_layer.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert set(layer.state_dict()) == set(dict(layer.named_parameters())), "nothing is saved but parameters"


def test_initial_values():
    """A drawn, B and W_g zero, b_o zero, the router from N(0, 0.02): the paper says none, this is the contract."""
    torch.manual_seed(1)
    big = SIZES | {"hidden_size": 256, "intermediate_size": 320}
    layer = FusedGraphMoEFFN(LlamaMLP(LlamaConfig(**big)), config(init_lora_weights=True, num_experts=16, r=8))
    adapter = layer.lora_graphmoe["default"]
    zero = [getattr(adapter.experts, n).B for n in ("gate_proj", "up_proj", "down_proj")]
    zero += [adapter.gru.output_proj.weight, adapter.gru.candidate.bias]
    assert not any(t.any() for t in zero)
    assert adapter.router.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, width in (("gate_proj", 256), ("up_proj", 256), ("down_proj", 320)):
        A = getattr(adapter.experts, name).A
        assert A.abs().max().item() == pytest.approx(width**-0.5, rel=0.01)
        assert A.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.02)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fold", ["always", "never"])
def test_activation_checkpointing_gives_the_same_gradients(fold, use_reentrant):
    """With dropout too: the recomputation draws the same masks, also those named by a seed."""
    layer = ffn(fold=fold, lora_dropout=0.3)
    x, upstream = hidden_states(), hidden_states()

    def gradients(run):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        y = run(leaf)
        y.backward(upstream)
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]

    plain = gradients(layer)
    kept = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for mine, theirs in zip(kept, plain, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(plain[0], layer.eval()(x)), "dropout was active"


def test_dropout_acts_in_training_only():
    """Evaluation is deterministic and without dropout; two training forwards differ."""
    layer, x = ffn(lora_dropout=0.5), hidden_states()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert relative_error(layer(x), by_algorithm_1(layer, x)) <= 1e-12


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast(training, fold):
    """An fp32 layer under bf16 autocast: output dtype as nn.Linear's, backward runs, gradients in fp32 and close."""
    layer = ffn(dtype=torch.float32, fold=fold, top_k=EXPERTS).train(training)  # all experts: no near ties
    x = hidden_states(dtype=torch.float32)
    exact = torch.autograd.grad(layer(x).sum(), [p for p in layer.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16
    y.sum().backward()
    for grad, parameter in zip(exact, (p for p in layer.parameters() if p.requires_grad), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, grad) < 0.05  # wiring; test_rethinking_precision holds the budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_runs_in_the_models_dtype(dtype):
    """A model in half precision gets outputs and adapters in its dtype; fp32 adapters work on it too."""
    layer, x = ffn(dtype=dtype, top_k=EXPERTS), hidden_states(dtype=dtype)  # all experts: no near ties
    exact = by_algorithm_1(ffn_copy(layer, torch.float64), x.double())
    coarse = 10 * torch.finfo(dtype).eps  # wiring; test_rethinking_precision holds the budget
    assert layer.lora_graphmoe["default"].router.weight.dtype == dtype
    for adapters in (dtype, torch.float32):
        layer.lora_graphmoe.to(adapters)
        y = layer(x)
        assert y.dtype == dtype
        assert relative_error(y, exact) < coarse
        y.float().sum().backward()
        assert layer.lora_graphmoe["default"].router.weight.grad.dtype == adapters
        layer.zero_grad()


def ffn_copy(layer: FusedGraphMoEFFN, dtype: torch.dtype) -> FusedGraphMoEFFN:
    """A layer of its own with the same weights in another dtype."""
    twin = FusedGraphMoEFFN(llama_mlp().to(dtype), layer.lora_graphmoe["default"].config)
    twin.load_state_dict(layer.state_dict())
    return twin


def test_non_finite_token_stays_its_own_problem():
    """NaN in one token: its y is not finite, the others' is what it was."""
    layer, x = ffn().eval(), hidden_states(2, 4)
    clean = layer(x)
    x[1, 2, 5] = float("nan")
    y = layer(x).reshape(8, D)
    assert not y[6].isfinite().any()
    others = [i for i in range(8) if i != 6]
    torch.testing.assert_close(y[others], clean.reshape(8, D)[others], rtol=1e-12, atol=1e-13)


def test_base_is_frozen_and_unused_experts_get_gradients():
    """Every adapter tensor gets a gradient in every step (zero for experts nobody chose), the base none."""
    layer = ffn()
    layer(hidden_states(1, 1)).sum().backward()
    assert all(p.grad is not None for p in layer.lora_graphmoe.parameters())
    assert all(p.grad is None for p in layer.base_layer.parameters())
    per_expert = layer.lora_graphmoe["default"].experts.gate_proj.B.grad.flatten(1).abs().sum(1)
    assert (per_expert == 0).any()


def test_adapters_off_is_the_base_mlp():
    """enable_adapters(False) runs the MLP itself, bit for bit."""
    layer, x = ffn(), hidden_states()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert relative_error(layer(x), by_algorithm_1(layer, x)) <= 1e-12


def test_foreign_names_among_the_active_adapters_are_ignored():
    """PEFT activates a list of names on every layer; a layer runs the one it has."""
    layer, x = ffn(), hidden_states()
    layer._active_adapter = ["elsewhere", "default"]
    with torch.no_grad():
        assert relative_error(layer.eval()(x), by_algorithm_1(layer, x)) <= 1e-12

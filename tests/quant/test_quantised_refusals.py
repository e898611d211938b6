"""What is refused on quantised bases, what works all the same, and 4-bit weights on CPUs that pack them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_model.storage.dequantise import check_dense, dense_weight, run_linear
from tests.model.method_oracles import form_config
from tests.quant.bases import DYNAMIC, LINEARS, bnb, by_torchao, dense_twin, hidden_states, plain_linear, plain_mlp
from tests.quant.bases import quantised_mlp as mlp_of
from tests.quant.test_quantised_layers import layer_over, twin

pytestmark = pytest.mark.quant

NO_GRADIENT = (
    "passes no gradient to its input, as it rounds the input or reads weights packed for inference.*To train, load"
)


PACKABLE = 128  # bitsandbytes packs whole blocks of 64


def dynamic_mlp() -> nn.Module:
    """An MLP of torchao's linears that round their input."""
    mlp = plain_mlp()
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, by_torchao(getattr(mlp, name), DYNAMIC))
    return mlp


# --- no gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["always", "never"])
def test_a_base_without_gradient_is_refused_in_training(fold):
    """Adapters would be trained by a gradient that lacks what flows through the base, and nothing would say so."""
    layer = layer_over(dynamic_mlp(), "graphmoe-mixlora", fold=fold)
    with pytest.raises(TypeError, match=rf"Linear \(a Linear with a weight of type Int8Tensor\) {NO_GRADIENT}"):
        layer(hidden_states())


def test_an_attention_linear_without_gradient_is_refused_in_training():
    layer = layer_over(by_torchao(plain_linear(), DYNAMIC), "mola")
    assert layer(hidden_states()).requires_grad, "the gradient of the experts is right where none is asked for x"
    with pytest.raises(TypeError, match=NO_GRADIENT):
        layer(hidden_states().requires_grad_())


def test_a_base_without_gradient_works_in_evaluation():
    """Rounded inputs are close to the dense layer's; a backward pass through them raises."""
    layer, x = layer_over(dynamic_mlp(), "graphmoe-mixlora").eval(), hidden_states()
    y = layer(x)
    with pytest.raises(TypeError, match=NO_GRADIENT):
        y.sum().backward()
    with torch.no_grad():
        plain = plain_mlp()
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(plain, name).weight.copy_(dense_weight(getattr(layer.base_layer, name)))
        assert relative_error(layer(x), twin(layer, plain, "never").eval()(x)) < 0.05


# --- CPUs with AVX512-BF16 -------------------------------------------------------------------------------------------


@pytest.fixture
def packing(monkeypatch):
    """A CPU with AVX512-BF16, as bitsandbytes sees one: its packing runs anywhere, its kernel is written out here."""
    modules, functional = bnb.nn.modules, bnb.functional

    @torch.no_grad()  # as a kernel without a backward
    def gemv(x, packed, out=None, state=None):
        bits, plain = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
        return (x.bfloat16() @ functional.dequantize_4bit(bits, _row_major(plain)).bfloat16().T).to(x.dtype)

    def _row_major(state):
        state.absmax = state.absmax.T.reshape(-1).float()
        return state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(functional, "gemv_4bit", gemv)


def packed(linear: nn.Module) -> bool:
    return getattr(linear.weight.quant_state, "packing_format_for_cpu", False)


@torch.no_grad()
def test_wrapped_linears_are_not_packed(packing):
    """Packed weights read as if they were not give wrong folds without a word."""
    alone = LINEARS["nf4"](plain_linear()).eval()
    alone(hidden_states())
    assert packed(alone), "this is such a CPU"
    base = mlp_of("nf4", intermediate=PACKABLE)
    layer, x = layer_over(base, "graphmoe-mixdora"), hidden_states()
    oracle = twin(layer, dense_twin(base), "never")
    for _ in range(2):
        assert relative_error(layer.eval()(x), oracle.eval()(x)) <= 1e-5
    linear = layer_over(LINEARS["fp4"](plain_linear()), "moda").eval()
    linear(x)
    assert not any(map(packed, (base.gate_proj, base.up_proj, base.down_proj, linear.base_layer)))


@torch.no_grad()
def test_weights_that_are_packed_already_are_refused(packing):
    base, linear = mlp_of("nf4", intermediate=PACKABLE).eval(), LINEARS["nf4"](plain_linear()).eval()
    base(hidden_states()), linear(hidden_states())
    text = "has weights that an evaluation on this CPU packed for AVX512-BF16 before.*load the base anew, and attach"
    with pytest.raises(TypeError, match=rf"LlamaMLP.gate_proj: this Linear4bit {text}"):
        FusedGraphMoEFFN(base, form_config("mixlora"))
    with pytest.raises(TypeError, match=rf"this linear: this Linear4bit {text}"):
        RoutedLoRALinear(linear, form_config("mola"))
    layer = layer_over(mlp_of("nf4", intermediate=PACKABLE), "graphmoe-mixlora").eval()
    for module in layer.base_layer.children():
        module.support_avx512bf16_for_cpu = True  # whoever turns it on again
    layer.base_layer(hidden_states())
    with pytest.raises(TypeError, match=text):
        layer(hidden_states())


def test_packed_weights_are_refused_in_training(packing):
    """The packed kernel gives its input no gradient."""
    linear = LINEARS["nf4"](plain_linear()).eval()
    linear(hidden_states())
    x = hidden_states().requires_grad_()
    with pytest.raises(TypeError, match=rf"Linear4bit \(.*\) {NO_GRADIENT}"):
        run_linear(linear.train(), x)


# --- states and kinds ------------------------------------------------------------------------------------------------


def _float_weights() -> nn.Module:
    return bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=True)


UNREADABLE = {
    "4 bits, not quantised": (lambda: bnb.nn.Linear4bit(64, 96, bias=False), "Linear4bit is not quantised yet: move"),
    "8 bits, not quantised": (
        lambda: bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False),
        "Linear8bitLt is not quantised yet: move the model to its device first, or load it with a BitsAndBytesConfig",
    ),
    "8 bits, float weights": (
        _float_weights,
        r"Linear8bitLt keeps float weights.*\(has_fp16_weights=True.*load_in_8bit",
    ),
}


@pytest.mark.parametrize("make, message", UNREADABLE.values(), ids=UNREADABLE)
def test_linears_in_a_state_that_cannot_be_read_are_refused(make, message):
    linear = make()
    with pytest.raises(TypeError, match=message):
        check_dense(linear, "here")
    with pytest.raises(TypeError, match=message):
        dense_weight(linear)


def test_a_torchao_layout_without_dequantize_is_refused(monkeypatch):
    linear = LINEARS["torchao int8"](plain_linear())
    monkeypatch.setattr(type(linear.weight), "dequantize", torch.Tensor.dequantize)
    with pytest.raises(
        TypeError, match=r"here: this Linear has a weight of type Int8Tensor, which has no dequantize\(\)"
    ):
        check_dense(linear, "here")


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    linear = LINEARS["nf4"](plain_linear())
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.delattr(sys.modules["bitsandbytes"], "functional")
    with pytest.raises(ImportError, match=r"bitsandbytes cannot be imported.*pip install 'graphmoe\[quant\]'"):
        dense_weight(linear)


# --- false refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_storage_in_a_float_dtype_says_nothing_of_x(dtype):
    """``bnb_4bit_quant_storage=torch.bfloat16`` is how FSDP shards 4-bit weights, whatever the activations are in."""
    layer = layer_over(mlp_of("nf4 in bf16 storage"), "graphmoe-mixlora")
    assert layer(hidden_states().to(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "nf4 in bf16 storage"])
@pytest.mark.parametrize("which", ["mlp", "linear"])
def test_a_parameter_that_fsdp_made_is_read_as_packed_numbers(kind, which):
    """FSDP's parameters are plain ones; what they mean is on the module."""
    base = mlp_of(kind) if which == "mlp" else LINEARS[kind](plain_linear())
    form = "graphmoe-mixdora" if which == "mlp" else "moda"
    layer, x = layer_over(base, form).eval(), hidden_states()
    with torch.no_grad():
        before = layer(x)
        for linear in [base] if which == "linear" else [base.gate_proj, base.up_proj, base.down_proj]:
            weight = nn.Parameter(linear.weight.data.clone(), requires_grad=False)
            assert type(weight) is nn.Parameter
            linear.weight = weight
            assert torch.equal(dense_weight(linear), bnb.functional.dequantize_4bit(weight.data, linear.quant_state))
        assert relative_error(layer(x), before) <= 1e-6

"""Linears that look like plain ones and are not: what no kind in the table reads is refused by its class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_model.storage.dequantise import check_dense, dense_weight, run_linear
from tests.model.method_oracles import form_config
from tests.model.small_mlps import D, F, config, llama_mlp

SUPPORTED = "Supported are plain weights in fp64, fp32, fp16 or bf16, bitsandbytes' Linear4bit and Linear8bitLt"


class PackedLinear(nn.Module):
    """A linear of an unknown library, whose numbers mean something that only its forward knows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = D, F, None
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], F)


class ForeignTensor(Tensor):
    """A tensor class of another library."""


class RoundingLinear(nn.Linear):
    """As BitNet's: the weight is rounded in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean())


class LoggingLinear(nn.Linear):
    """A class of its own that computes what a linear does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _foreign() -> nn.Module:
    linear = nn.Linear(D, F, bias=False)
    linear.weight = nn.Parameter(torch.randn(F, D).as_subclass(ForeignTensor), requires_grad=False)
    return linear


UNKNOWN = {
    "integers": (
        lambda: PackedLinear(torch.zeros(F, D // 2, dtype=torch.int8)),
        r"PackedLinear is a linear of no kind that this package can read \(weight .* of torch.int8, \[40, 12\]",
    ),
    "float8": (
        lambda: PackedLinear(torch.zeros(F, D).to(torch.float8_e4m3fn)),
        r"weight is a Parameter of torch.float8_e4m3fn",
    ),
    "packed in floats": (lambda: PackedLinear(torch.zeros(F * D // 4, 1)), r"of torch.float32, \[240, 1\]"),
    "a foreign tensor class": (_foreign, r"Linear is a linear of no kind .*\(weight is a ForeignTensor"),
}


@pytest.mark.parametrize("make, message", UNKNOWN.values(), ids=UNKNOWN)
def test_a_linear_of_an_unknown_kind_is_refused(make, message):
    """A fold of numbers that mean something else is silently wrong."""
    mlp = llama_mlp()
    mlp.up_proj = make()
    with pytest.raises(TypeError, match=rf"LlamaMLP.up_proj: .*{message}.*{SUPPORTED}.*leave this layer out"):
        FusedGraphMoEFFN(mlp, config())
    with pytest.raises(TypeError, match=message):
        RoutedLoRALinear(make(), form_config("mola"))
    with pytest.raises(TypeError, match=message):
        dense_weight(make())


def test_a_linear_that_rounds_its_weight_is_refused():
    with pytest.raises(TypeError, match=rf"here: RoundingLinear computes something else than x W\^T \+ b.*{SUPPORTED}"):
        check_dense(RoundingLinear(D, F), "here")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_class_of_its_own_that_computes_the_same_is_taken(dtype):
    check_dense(LoggingLinear(D, F).to(dtype), "here")


class Detaching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()).detach()


def test_a_linear_without_gradient_is_refused_in_training_and_works_in_evaluation():
    """Whatever its class: what is asked is whether its output has a gradient where its input does."""
    linear, x = Detaching(D, F).requires_grad_(False), torch.randn(3, D, requires_grad=True)
    text = r"Detaching \(a Detaching with a weight of type Parameter\) passes no gradient to its input"
    with pytest.raises(TypeError, match=text):
        run_linear(linear, x)
    y = run_linear(linear.eval(), x)
    assert torch.equal(y, linear(x))
    with pytest.raises(TypeError, match=text):
        y.sum().backward()
    with torch.no_grad():
        run_linear(linear.train(), x)
    run_linear(linear, x.detach())

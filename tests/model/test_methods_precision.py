"""Every method below fp64: no further off than twice the equations computed in the same dtype."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.model.method_checks import (
    FORMS_AND_FOLDS,
    Outcomes,
    check_budget,
    outcomes,
)
from tests.model.method_oracles import (
    FORMS,
    small_ffn,
)

pytestmark = pytest.mark.methods


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

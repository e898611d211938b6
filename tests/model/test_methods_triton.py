"""The methods on the Triton kernels, against the oracles: in the interpreter, or on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_marks import MARKS
from tests.model.method_checks import Outcomes, check_budget, outcomes
from tests.model.method_oracles import small_ffn, small_mlp

pytestmark = [pytest.mark.methods, *MARKS]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# No width is a multiple of a tile. With fewer tokens one that is ill-conditioned decides a gradient's whole error.
HIDDEN, INTERMEDIATE, TOKENS = 18, 22, 13
SIZES = {"r": 3, "rounds": 2, "gru_hidden_scale": 0.4, "backend": "triton"}

# Every routing kind plain and with DoRA, and biases where they meet the most terms.
CASES = [
    *((form, False) for form in ("lora", "dora", "mixlora", "mixdora", "loramoe", "doramoe", "mola", "moda")),
    ("mixdora", True),
]


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize(("form", "bias"), CASES, ids=lambda value: {True: "bias", False: ""}.get(value, value))
def test_equals_the_equations(form, bias, fold):
    """In fp32: y and every gradient no further off than twice the equations computed in fp32, and y in evaluation."""
    experts = {} if form in ("lora", "dora") else {"num_experts": 3}

    def draw() -> Outcomes:
        layer = small_ffn(form, small_mlp(bias, HIDDEN, INTERMEDIATE), fold=fold, **SIZES, **experts)
        return outcomes(layer.to(DEVICE, torch.float32), torch.float32, count=TOKENS)

    check_budget(draw, torch.float32)

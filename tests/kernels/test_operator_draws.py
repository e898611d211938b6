"""Every operator on drawn arguments: an exception that names one of them, or the result of its definition."""

import pytest
import torch

from tests.drawing import assert_clear, make_draws
from tests.kernels.operator_draws import OPERATORS, Call, calls, is_plain, tensors


def check(call: Call) -> None:
    operator = OPERATORS[call.operator]
    try:
        found = operator.run(**call.arguments)
    except Exception as error:
        names = [part for name in call.arguments for part in (name, name.rpartition(".")[2])]
        assert_clear(error, [*names, "experts"])
        return
    if is_plain(call):
        with torch.no_grad():
            operator.check(call.arguments, found)
        assert all(bool(t.isfinite().all()) for t in tensors(found))


@pytest.mark.parametrize("operator", OPERATORS)
def test_drawn_arguments(operator):
    make_draws(check, calls(operator), examples=20, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_drawn_arguments(operator):
    make_draws(check, calls(operator), examples=180, seed=1)

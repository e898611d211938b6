"""The recurrence below fp64: error budgets set by the literal computation, routing flips, autocast, mixed dtypes.

The oracle is Algorithm 1 in fp64 on the same rounded weights and inputs. A token whose top-k is a near tie may go to
other experts in low precision, which is no error of arithmetic: budgets are measured on tokens with a margin, and
flips are counted apart.

The literal computation has two forms here, the loop over the operators' references and Algorithm 1 word for word; the
larger of their errors is the budget's. One form alone is a coin: now and then a single token is so ill-conditioned
that it makes the whole error, and one form happens to be lucky there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphmoe_kernels import (
    DenseMLP,
    LayerWeights,
    RethinkingSpec,
    rethink_folded,
    rethink_literal,
    rethink_reference,
)
from graphmoe_kernels.testing import cast_layer, within_budget
from tests.kernels.cases import (
    Sizes,
    chosen_experts,
    decided_tokens,
    errors,
    gradients,
    layer,
    recorded_logits,
    rounded,
)

BASE = RethinkingSpec(rounds=3, top_k=2, scale=1.5)
SIZES = Sizes(48, 80, 6, 5, 20)
# Logits have a spread of about 2 here; bf16 moves them by some 0.02.
MARGIN = 0.1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {"folded": rethink_folded, "literal": rethink_literal}


def decided_inputs(weights: LayerWeights, spec: RethinkingSpec, dtype: torch.dtype, count: int = 32) -> Tensor:
    """fp64 inputs that ``dtype`` holds exactly and whose routing has a margin in every round."""
    x = torch.randn(12 * count, SIZES.hidden, dtype=torch.float64).to(dtype).double()
    x = x[decided_tokens(x, weights, spec, MARGIN)][:count]
    assert x.shape[0] == count
    return x


def literal_forms(differentiate, spec: RethinkingSpec) -> list[dict[str, Tensor]]:
    """What both literal forms give: y and every gradient, by name; ``differentiate`` takes run(x, weights) -> y."""
    return [
        differentiate(lambda x, w: rethink_literal(x, w, spec, backend="reference").y),
        differentiate(lambda x, w: rethink_reference(x, w, spec)),
    ]


def assert_within_budget(found, literals, oracle, upstream, dtype):
    """Every entry's error at most twice the literal forms'; the message lists those that are not."""
    mine, of_literals = errors(found, oracle, upstream), [errors(form, oracle, upstream) for form in literals]
    allowed = {name: max(form[name] for form in of_literals) for name in oracle}
    off = {
        name: f"{mine[name]:.2e}, literal {allowed[name]:.2e}"
        for name in oracle
        if not within_budget(mine[name], allowed[name], dtype)
    }
    assert not off, f"errors above the budget of {dtype}: {off}"


def check(spec: RethinkingSpec, dtype: torch.dtype, bias: bool = False) -> None:
    """Folded and literal on the PyTorch path within the budget of the literal reference, y and every gradient."""
    exact = rounded(layer(spec, SIZES, bias=bias), dtype)
    x = decided_inputs(exact, spec, dtype)
    upstream = torch.randn_like(x).to(dtype).double()
    oracle = gradients(lambda x, w: rethink_reference(x, w, spec), x, exact, upstream)
    low, weights = x.to(dtype), cast_layer(exact, dtype)
    literals = literal_forms(lambda run: gradients(run, low, weights, upstream), spec)
    for run in IMPLEMENTATIONS.values():
        found = gradients(lambda x, w, run=run: run(x, w, spec).y, low, weights, upstream)
        assert found["y"].dtype == dtype
        assert_within_budget(found, literals, oracle, upstream, dtype)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False, "candidate_input": "hidden_state", "candidate_activation": "tanh"},
        {"rounds": 5, "activation": "gelu_tanh"},
        {"rounds": 1},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "defaults",
)
def test_error_is_within_budget(options, dtype):
    """Folding may not cost accuracy: y and every gradient, in every dtype that models run in."""
    check(BASE._replace(**options), dtype, bias="normalize" in options)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("candidate_activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5])
def test_every_option_is_within_budget(rounds, normalize, candidate_input, candidate_activation, bias, dtype):
    """The budget under every combination of options."""
    options = {
        "rounds": rounds,
        "normalize": normalize,
        "candidate_input": candidate_input,
        "candidate_activation": candidate_activation,
    }
    check(BASE._replace(**options), dtype, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_routing_flips_are_near_ties_only(run, dtype):
    """Low precision may send a token elsewhere where the top-k is a near tie; few are, and the rest keep the budget."""
    exact = rounded(layer(BASE, SIZES), dtype)
    x = torch.randn(400, SIZES.hidden, dtype=torch.float64).to(dtype).double()
    with recorded_logits() as wide:
        rethink_literal(x, exact, BASE)
    oracle = rethink_reference(x, exact, BASE)
    with recorded_logits() as narrow:
        y = run(x.to(dtype), cast_layer(exact, dtype), BASE).y
    agree = (chosen_experts(wide, 2) == chosen_experts(narrow, 2)).all(dim=-1).all(dim=0)  # [N]
    flipped = int((~agree).sum())
    assert flipped <= 4, f"{flipped} of 400 tokens flipped"
    assert agree[decided_tokens(x, exact, BASE, MARGIN)].all(), "a token with a margin flipped"
    literal = rethink_literal(x.to(dtype), cast_layer(exact, dtype), BASE, backend="reference").y
    mine, allowed = ((v.double() - oracle)[agree].norm().item() / oracle[agree].norm().item() for v in (y, literal))
    assert within_budget(mine, allowed, dtype)


@pytest.mark.parametrize("rounds", [1, 3])
def test_autocast_is_within_budget(rounds):
    """fp32 weights under bf16 autocast: y is bf16, as nn.Linear's, and folded is no worse than literal."""
    spec = BASE._replace(rounds=rounds)
    exact = rounded(layer(spec, SIZES), torch.float32)
    x = decided_inputs(exact, spec, torch.float32)
    upstream = torch.randn_like(x).bfloat16().double()
    oracle = gradients(lambda x, w: rethink_reference(x, w, spec), x, exact, upstream)
    low, weights = x.float(), cast_layer(exact, torch.float32)

    def autocast(run):
        def call(x, w):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x, w)

        return gradients(call, low, weights, upstream)

    literals = literal_forms(autocast, spec)
    for run in IMPLEMENTATIONS.values():
        found = autocast(lambda x, w, run=run: run(x, w, spec).y)
        assert found["y"].dtype == torch.bfloat16
        assert found["gate_A"].dtype == torch.float32
        assert_within_budget(found, literals, oracle, upstream, torch.bfloat16)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_autocast_leaves_the_router_in_fp32(run):
    """The first round routes on x as given: rounding it to bf16 first would flip experts that fp32 decides."""
    weights = cast_layer(layer(BASE, SIZES), torch.float32)
    x = torch.randn(64, SIZES.hidden)
    with recorded_logits() as plain:
        run(x, weights, BASE)
    with torch.autocast("cpu", torch.bfloat16), recorded_logits() as seen:
        run(x, weights, BASE)
    assert all(logits.dtype == torch.float32 for logits in seen)
    assert torch.equal(seen[0], plain[0])


def test_autocast_of_fp64_stays_fp64():
    """Autocast does not lower fp64, and neither may we."""
    weights, x = layer(BASE), torch.randn(5, 13, dtype=torch.float64)
    exact = rethink_reference(x, weights, BASE)
    with torch.autocast("cpu", torch.bfloat16):
        for run in IMPLEMENTATIONS.values():
            torch.testing.assert_close(run(x, weights, BASE).y, exact, rtol=1e-11, atol=1e-12)


def test_fp32_adapters_on_a_bf16_model_are_within_budget():
    """PEFT keeps adapters in fp32 on a bf16 base: y is bf16, gradients are fp32 and within the budget."""
    exact = layer(BASE, SIZES)
    base = DenseMLP(*(None if t is None else t.bfloat16() for t in exact.base))
    adapters = rounded(exact, torch.float32)
    exact = adapters._replace(base=DenseMLP(*(None if t is None else t.double() for t in base)))
    x = decided_inputs(exact, BASE, torch.bfloat16)
    upstream = torch.randn_like(x).bfloat16().double()
    oracle = gradients(lambda x, w: rethink_reference(x, w, BASE), x, exact, upstream)

    def mixed(run, adapters=torch.float32):
        def call(x, w):
            return run(x, w._replace(base=base))

        return gradients(call, x.bfloat16(), cast_layer(exact, adapters), upstream)

    # Algorithm 1 takes one dtype: its literal form is that of adapters in bf16.
    literals = [
        mixed(lambda x, w: rethink_literal(x, w, BASE, backend="reference").y),
        mixed(lambda x, w: rethink_reference(x, w, BASE), torch.bfloat16),
    ]
    for run in IMPLEMENTATIONS.values():
        found = mixed(lambda x, w, run=run: run(x, w, BASE).y)
        assert found["y"].dtype == torch.bfloat16
        assert found["gru.output"].dtype == torch.float32
        assert_within_budget(found, literals, oracle, upstream, torch.bfloat16)


def test_budget_can_be_exceeded():
    """The budget is no rubber stamp: the computation of the next lower precision does not keep it."""
    exact = layer(BASE, SIZES)
    x = decided_inputs(exact, BASE, torch.bfloat16)
    upstream = torch.randn_like(x)
    oracle = gradients(lambda x, w: rethink_reference(x, w, BASE), x, exact, upstream)

    def run(dtype):
        return gradients(lambda x, w: rethink_folded(x, w, BASE).y, x.to(dtype), cast_layer(exact, dtype), upstream)

    for dtype, lower in ((torch.float32, torch.float16), (torch.float16, torch.bfloat16)):
        with pytest.raises(AssertionError, match="above the budget"):
            assert_within_budget(run(lower), [run(dtype)], oracle, upstream, dtype)

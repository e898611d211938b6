"""`expert_swiglu`: the PyTorch path against its reference and the definition, forward and backward."""

import itertools

import pytest
import torch

from graphmoe_kernels import get_activation
from graphmoe_kernels.experts import pytorch_blocks, pytorch_pairs
from graphmoe_kernels.experts.dropout import DrawnMask, drop
from graphmoe_kernels.testing import relative_error, within_budget
from tests.kernels.expert_operands import (
    FLOATING,
    LATER_ROUND,
    PYTORCH_FORMS,
    SCALES,
    SETTINGS,
    cast,
    operands,
    results,
    run,
    same_mask_in_reference,
    take_form,
)


@pytest.fixture(params=PYTORCH_FORMS, autouse=True)
def form(request, monkeypatch):
    """Every form of the PyTorch path, whatever the sizes and on a CPU."""
    take_form(request.param, monkeypatch)
    return request.param


def by_definition(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """c and z token by token and slot by slot, in Python."""
    act = get_activation(SETTINGS["activation"]).function
    n = given["down_A"].shape[0]
    c, z = torch.zeros_like(given["gate"]), torch.zeros_like(given["low"].chunk(2, dim=1)[0])
    low = given["low"] + given.get("low_update", 0)
    rank, s = given["down_A"].shape[1], SETTINGS["scale"]
    for i, row in enumerate(given["expert_ids"].tolist()):
        gate, up = given["gate"][i], given["up"][i]
        if "state" in given:
            gate = gate + given["fold_gate"] @ given["state"][i]
            up = up + given["fold_up"] @ given["state"][i]
        for j, e in enumerate(row):
            own = slice(e * rank, (e + 1) * rank)
            low_gate, low_up = low[i].view(2, n, rank)[:, e]
            g = (gate + s * given["gate_B"][e] @ low_gate) * (given["gate_scale"][e] if "gate_scale" in given else 1)
            u = (up + s * given["up_B"][e] @ low_up) * (given["up_scale"][e] if "up_scale" in given else 1)
            g, u = g + given.get("gate_bias", 0), u + given.get("up_bias", 0)
            hidden = given["routing_weights"][i, j] * act(g) * u
            c[i] += hidden
            z[i, own] += given["down_A"][e] @ hidden
    return c, z


# What a routing can look like, and sizes that divide nothing.
SHAPES = {
    "usual": {},
    "no tokens": {"tokens": 0},
    "one token": {"tokens": 1},
    "k = 1": {"top_k": 1},
    "k = n": {"top_k": 5},
    "n = 1": {"experts": 1, "top_k": 1},
    "prime n": {"experts": 7, "top_k": 3},
    "rank 1": {"rank": 1},
    "rank 5": {"rank": 5},
    "rank 0": {"rank": 0},
    "F = 1": {"width": 1},
    "scale vectors": {"scales": True},
    "scale vectors and biases": {"scales": True, "biases": True},
    "biases alone": {"biases": True},
    "one token, k = n": {"tokens": 1, "top_k": 5},
    "one token, scale vectors and biases": {"tokens": 1, "scales": True, "biases": True},
    "one token, rank 0": {"tokens": 1, "rank": 0},
}


@pytest.mark.oracle
@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_definition_and_reference(shape, inner):
    """Values against the definition, every gradient against autograd through the reference, in fp64."""
    given = operands(**shape, inner=inner)
    oracle, found = results(given, "reference"), results(given)
    c, z = by_definition(given)
    assert relative_error(oracle["hidden"], c) <= 1e-14
    assert relative_error(oracle["low_down"], z) <= 1e-14
    assert found.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert found[name].shape == exact.shape
        assert relative_error(found[name], exact) <= 1e-13, name


@pytest.mark.parametrize("chosen", [[0, 1], [4, 2], [1, 0]])
def test_experts_that_nobody_chose_get_zero_gradients(chosen):
    """All tokens to the same experts: the others' gradients exist and are exactly zero (DDP reduces them)."""
    given = operands()
    given["expert_ids"] = torch.tensor(chosen).expand(9, 2)
    oracle, found = results(given, "reference"), results(given)
    for name, exact in oracle.items():
        assert relative_error(found[name], exact) <= 1e-13, name
    for name in ("gate_B", "up_B", "down_A"):
        untouched = [e for e in range(5) if e not in chosen]
        assert torch.equal(found[name][untouched], torch.zeros_like(found[name][untouched]))


def _strided(given):
    """Gate and up as the two halves of one fused projection's output."""
    fused = torch.cat([given["gate"], given["up"]], dim=1)
    gate, up = fused.chunk(2, dim=1)
    assert gate.stride(0) > gate.shape[1]
    return given | {"gate": gate, "up": up}


LAYOUTS = {
    "fused gate and up": _strided,
    "low-rank activations transposed": lambda given: given | {"low": given["low"].T.contiguous().T},
    "state strided": lambda given: given | {"state": given["state"].repeat(1, 2)[:, :6]},
    "weights transposed": lambda given: given | {"routing_weights": given["routing_weights"].T.contiguous().T},
    "B transposed": lambda given: given | {"gate_B": given["gate_B"].mT.contiguous().mT},
    "A transposed": lambda given: given | {"down_A": given["down_A"].mT.contiguous().mT},
    "int32 ids": lambda given: given | {"expert_ids": given["expert_ids"].int()},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_layout_does_not_matter(tokens, layout, backend):
    """Views and id dtypes that models produce give what contiguous int64 operands give."""
    given = operands(tokens, inner=6)
    plain, found = results(given, backend), results(layout(given), backend)
    for name, exact in plain.items():
        assert relative_error(found[name], exact) <= 1e-14, name


@pytest.mark.oracle
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("tokens", [16, 17, 40])
def test_blocks_do_not_matter(tokens, dropout, monkeypatch):
    """Cutting a batch into blocks changes neither results nor gradients, nor which mask a token gets."""
    given = operands(tokens, inner=6)
    settings = {"dropout": dropout, "seed": torch.tensor([7]) if dropout else None}
    take_form("sorted", monkeypatch)
    whole = results(given, "torch", **settings)
    monkeypatch.setattr(pytorch_blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(pytorch_blocks, "MIN_BLOCK_TOKENS", 16)
    made = []
    new = pytorch_pairs.Block
    monkeypatch.setattr(pytorch_pairs, "Block", lambda *rest: made.append(rest) or new(*rest))
    cut = results(given, "torch", **settings)
    assert len(made) == 2 * -(-tokens // 16), "as many blocks as that, forward and backward"
    for name, exact in whole.items():
        assert relative_error(cut[name], exact) <= 1e-13, name


@pytest.mark.oracle
@pytest.mark.parametrize("pairs", [1, 3, 10])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_runs_do_not_matter(dropout, pairs, monkeypatch):
    """Neither does how many pairs of a block are computed at a time: a part of an expert's, or several experts'."""
    given = operands(40, inner=6, scales=True)
    settings = {"dropout": dropout, "seed": torch.tensor([7]) if dropout else None}
    take_form("sorted", monkeypatch)
    whole = results(given, "torch", **settings)
    monkeypatch.setattr(pytorch_blocks, "RUN_BYTES", pairs * given["gate"][0].nbytes)
    cut = results(given, "torch", **settings)
    for name, exact in whole.items():
        assert relative_error(cut[name], exact) <= 1e-13, name


@pytest.mark.parametrize("largest", [1, 2, 5, 100])
def test_runs_hold_every_pair_once_and_no_more_at_a_time_than_asked(largest):
    """An expert of many pairs is cut evenly, those of few share a run, and none appears that nobody chose."""
    starts = [3, 3, 10, 11, 12, 12, 40]  # experts 0 and 4 have none
    runs = list(pytorch_pairs.runs_of(starts, largest))
    pairs = [(p, piece.expert) for run in runs for piece in run for p in range(piece.start, piece.stop)]
    assert pairs == [(p, e) for e in range(6) for p in range(starts[e], starts[e + 1])]
    sizes = [run[-1].stop - run[0].start for run in runs]
    assert max(sizes) <= largest
    assert all(a + b > largest for a, b in itertools.pairwise(sizes)), "two neighbours would have been one run"
    last = [piece.stop - piece.start for run in runs for piece in run if piece.expert == 5]
    assert max(last) - min(last) <= 1


@pytest.mark.oracle
@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_dropout_masks_what_down_A_reads_and_nothing_else(tokens, inner, form, monkeypatch):
    """c is untouched, and z reads the masked product: the reference's, given the same mask."""
    same_mask_in_reference(form, monkeypatch)
    given, seed = operands(tokens, inner=inner), torch.tensor([11])
    oracle = results(given, "reference", dropout=0.3, seed=seed)
    found = results(given, dropout=0.3, seed=seed)
    for name, exact in oracle.items():
        assert relative_error(found[name], exact) <= 1e-13, name
    without = results(given)
    assert torch.equal(found["hidden"], without["hidden"])
    assert relative_error(found["low_down"], without["low_down"]) > 0.1


def test_dropout_keeps_the_mean():
    """Entries are dropped with the given probability, the rest scaled up: z is right on average."""
    given = cast(operands(64, width=96), torch.float32)
    exact = run(**given, **SETTINGS)[1]
    seeds = 64
    mean = sum(run(**given, **SETTINGS, dropout=0.25, seed=torch.tensor([seed]))[1] for seed in range(seeds))
    one = run(**given, **SETTINGS, dropout=0.25, seed=torch.tensor([0]))[1]
    noise = relative_error(one, exact)
    assert relative_error(mean / seeds, exact) < 1.5 * noise / seeds**0.5


def test_the_drawn_mask_drops_as_many_as_asked():
    """Entries are 0 or 1, apart from each other, and every call that is given the seed draws the same."""
    rate, tokens, width = 0.05, 400, 1001
    first, again = (DrawnMask(rate, torch.tensor([2**40 + 3])) for _ in range(2))
    mask = first.draw(torch.empty(tokens, width))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(1 - mask.mean().item() - rate) < 4 * (rate * (1 - rate) / mask.numel()) ** 0.5
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(4, 1)):
        both = ((1 - mask) * (1 - shifted)).mean().item()
        assert abs(both - rate**2) < 5 * rate / mask.numel() ** 0.5
    parts = [again.draw(torch.empty(n, width)) for n in (150, 250)]
    assert torch.equal(torch.cat(parts), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_the_input_drops_as_many_as_asked(dtype):
    """The rest is scaled so that the mean stays, the gradient has the same mask, and a seed of PyTorch's names it."""
    rate, x = 0.05, torch.ones(37, 1001, dtype=dtype, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        found = drop(x, rate)
        assert not torch.equal(drop(x, rate), found), "every call draws"
        torch.manual_seed(5)
        assert torch.equal(drop(x, rate), found)
    assert found.dtype is dtype
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(grad, found)
    assert abs((found == 0).double().mean().item() - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    kept = found[found != 0].unique()
    assert kept.numel() == 1
    torch.testing.assert_close(kept.item(), 1 / (1 - rate), rtol=max(torch.finfo(dtype).eps, 2**-15), atol=0)


def test_seed_names_the_mask():
    """The same seed gives the same z bit for bit, another seed another one."""
    given = operands()
    a, b, c = (run(**given, dropout=0.5, seed=torch.tensor([s]))[1] for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.oracle
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("inner", [None, 2], ids=["first round", "later round"])
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scale vectors"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradcheck(activation, scales, inner, dropout):
    """The hand-written backward of every floating operand against finite differences."""
    given = operands(tokens=3, width=4, experts=3, rank=2, inner=inner, scales=scales)
    names = FLOATING + (LATER_ROUND if inner else []) + (SCALES if scales else [])
    seed = torch.tensor([5]) if dropout else None

    def by_tensors(*tensors):
        changed = dict(zip(names, tensors, strict=True))
        return run(**(given | changed), scale=0.7, activation=activation, dropout=dropout, seed=seed)

    assert torch.autograd.gradcheck(by_tensors, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scale vectors"])
@pytest.mark.parametrize("inner", [None, 16], ids=["first round", "later round"])
def test_error_is_within_budget(inner, scales, dtype):
    """Against fp64 on the same rounded operands: at most twice the reference's own error in the dtype."""
    given = cast(operands(48, width=96, experts=4, rank=5, inner=inner, scales=scales), dtype)
    oracle = results(cast(given, torch.float64), "reference")
    literal, found = results(given, "reference"), results(given)
    for name, exact in oracle.items():
        assert found[name].dtype == literal[name].dtype
        error, allowed = (relative_error(x[name], exact) for x in (found, literal))
        assert within_budget(error, allowed, dtype), f"{name}: {error:.2e}, the reference's {allowed:.2e}"

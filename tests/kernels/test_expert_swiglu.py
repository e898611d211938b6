"""`expert_swiglu`: the PyTorch path against its reference and the definition, forward and backward."""

import pytest
import torch

from graphmoe_kernels import expert_swiglu, get_activation
from graphmoe_kernels.experts import pytorch
from graphmoe_kernels.testing import SLACK, relative_error, within_budget

FLOATING = ["gate", "up", "low_gate", "low_up", "gate_B", "up_B", "down_A", "weights"]
LATER_ROUND = ["state", "fold_gate", "fold_up"]
SETTINGS = {"scale": 1.5, "activation": "silu"}


def operands(
    tokens: int = 9,
    width: int = 21,
    experts: int = 5,
    rank: int = 3,
    top_k: int = 2,
    inner: int | None = None,
) -> dict[str, torch.Tensor]:
    """Random fp64 operands; ``inner`` is the GRU's width in a later round, None in the first."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    ids = [torch.randperm(experts)[:top_k] for _ in range(tokens)]
    found = {
        "gate": draw(tokens, width),
        "up": draw(tokens, width),
        "low_gate": draw(tokens, experts * rank),
        "low_up": draw(tokens, experts * rank),
        "gate_B": draw(experts, width, rank),
        "up_B": draw(experts, width, rank),
        "down_A": draw(experts, rank, width) * width**-0.5,
        "weights": torch.rand(tokens, top_k, dtype=torch.float64),
        "experts": torch.stack(ids) if ids else torch.zeros(0, top_k, dtype=torch.long),
    }
    if inner is not None:
        found |= {
            "state": draw(tokens, inner),
            "fold_gate": draw(width, inner) * inner**-0.5,
            "fold_up": draw(width, inner) * inner**-0.5,
        }
    return found


def cast(given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The floating operands in ``dtype``; routing weights in fp32 at least, as routing gives them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: t if not t.is_floating_point() else t.to(wide if name == "weights" else dtype)
        for name, t in given.items()
    }


def results(given: dict[str, torch.Tensor], backend: str = "auto", **settings) -> dict[str, torch.Tensor]:
    """c, z and the gradient of every floating operand under fixed random upstream gradients, by name."""
    generator = torch.Generator().manual_seed(1)
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in given.items()
        if t.is_floating_point()
    }
    c, z = expert_swiglu(**(given | leaves), **(SETTINGS | settings), backend=backend)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (c, z)]
    torch.autograd.backward([c, z], upstream)
    return {"c": c.detach(), "z": z.detach(), **{name: t.grad for name, t in leaves.items()}}


def by_definition(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """c and z token by token and slot by slot, in Python."""
    act = get_activation(SETTINGS["activation"]).function
    c, z = torch.zeros_like(given["gate"]), torch.zeros_like(given["low_gate"])
    rank, s = given["down_A"].shape[1], SETTINGS["scale"]
    for i, row in enumerate(given["experts"].tolist()):
        gate, up = given["gate"][i], given["up"][i]
        if "state" in given:
            gate = gate + given["fold_gate"] @ given["state"][i]
            up = up + given["fold_up"] @ given["state"][i]
        for j, e in enumerate(row):
            own = slice(e * rank, (e + 1) * rank)
            g = gate + s * given["gate_B"][e] @ given["low_gate"][i, own]
            u = up + s * given["up_B"][e] @ given["low_up"][i, own]
            hidden = given["weights"][i, j] * act(g) * u
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
    "F = 1": {"width": 1},
}


@pytest.mark.oracle
@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_definition_and_reference(shape, inner):
    """Values against the definition, every gradient against autograd through the reference, in fp64."""
    given = operands(**shape, inner=inner)
    oracle, found = results(given, "reference"), results(given)
    c, z = by_definition(given)
    assert relative_error(oracle["c"], c) <= 1e-14
    assert relative_error(oracle["z"], z) <= 1e-14
    assert found.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert found[name].shape == exact.shape
        assert relative_error(found[name], exact) <= 1e-13, name


@pytest.mark.parametrize("chosen", [[0, 1], [4, 2], [1, 0]])
def test_experts_that_nobody_chose_get_zero_gradients(chosen):
    """All tokens to the same experts: the others' gradients exist and are exactly zero (DDP reduces them)."""
    given = operands()
    given["experts"] = torch.tensor(chosen).expand(9, 2)
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
    assert not gate.is_contiguous()
    return given | {"gate": gate, "up": up}


LAYOUTS = {
    "fused gate and up": _strided,
    "low-rank activations transposed": lambda given: given | {"low_gate": given["low_gate"].T.contiguous().T},
    "state strided": lambda given: given | {"state": given["state"].repeat(1, 2)[:, :6]},
    "weights transposed": lambda given: given | {"weights": given["weights"].T.contiguous().T},
    "B transposed": lambda given: given | {"gate_B": given["gate_B"].mT.contiguous().mT},
    "A transposed": lambda given: given | {"down_A": given["down_A"].mT.contiguous().mT},
    "int32 ids": lambda given: given | {"experts": given["experts"].int()},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(layout, backend):
    """Views and id dtypes that models produce give what contiguous int64 operands give."""
    given = operands(inner=6)
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
    whole = results(given, "torch", **settings)
    monkeypatch.setattr(pytorch, "BLOCK_BYTES", 1)
    monkeypatch.setattr(pytorch, "MIN_BLOCK_TOKENS", 16)
    made = []
    monkeypatch.setattr(pytorch, "Block", lambda *rest, new=pytorch.Block: made.append(rest) or new(*rest))
    cut = results(given, "torch", **settings)
    assert len(made) == 2 * -(-tokens // 16), "as many blocks as that, forward and backward"
    for name, exact in whole.items():
        assert relative_error(cut[name], exact) <= 1e-13, name


@pytest.mark.oracle
@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
def test_dropout_masks_what_down_A_reads_and_nothing_else(inner):
    """c is untouched, z reads the masked product, and both paths draw the same mask from the seed."""
    given, seed = operands(inner=inner), torch.tensor([11])
    oracle = results(given, "reference", dropout=0.3, seed=seed)
    found = results(given, dropout=0.3, seed=seed)
    for name, exact in oracle.items():
        assert relative_error(found[name], exact) <= 1e-13, name
    without = results(given)
    assert torch.equal(found["c"], without["c"])
    assert relative_error(found["z"], without["z"]) > 0.1


def test_dropout_keeps_the_mean():
    """Entries are dropped with the given probability, the rest scaled up: z is right on average."""
    given = cast(operands(16, width=32), torch.float32)
    exact = expert_swiglu(**given, **SETTINGS)[1]
    seeds = 64
    mean = sum(expert_swiglu(**given, **SETTINGS, dropout=0.25, seed=torch.tensor([seed]))[1] for seed in range(seeds))
    one = expert_swiglu(**given, **SETTINGS, dropout=0.25, seed=torch.tensor([0]))[1]
    noise = relative_error(one, exact)
    assert relative_error(mean / seeds, exact) < 1.5 * noise / seeds**0.5


def test_seed_names_the_mask():
    """The same seed gives the same z bit for bit, another seed another one."""
    given = operands()
    a, b, c = (expert_swiglu(**given, dropout=0.5, seed=torch.tensor([s]))[1] for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.oracle
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("inner", [None, 2], ids=["first round", "later round"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradcheck(activation, inner, dropout):
    """The hand-written backward of every floating operand against finite differences."""
    given = operands(tokens=3, width=4, experts=3, rank=2, inner=inner)
    names = FLOATING + (LATER_ROUND if inner else [])
    seed = torch.tensor([5]) if dropout else None

    def run(*tensors):
        changed = dict(zip(names, tensors, strict=True))
        return expert_swiglu(**(given | changed), scale=0.7, activation=activation, dropout=dropout, seed=seed)

    assert torch.autograd.gradcheck(run, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [None, 16], ids=["first round", "later round"])
def test_error_is_within_budget(inner, dtype):
    """Against fp64 on the same rounded operands: at most twice the reference's own error in the dtype."""
    given = cast(operands(48, width=96, experts=4, rank=5, inner=inner), dtype)
    oracle = results(cast(given, torch.float64), "reference")
    literal, found = results(given, "reference"), results(given)
    for name, exact in oracle.items():
        assert found[name].dtype == literal[name].dtype
        error, allowed = (relative_error(x[name], exact) for x in (found, literal))
        assert within_budget(error, allowed, dtype), f"{name}: {error:.2e}, the reference's {allowed:.2e}"


def test_fp32_parameters_with_bf16_activations():
    """Adapters stay fp32 on a bf16 model: c and z are bf16, and the adapters' gradients come back in fp32."""
    given = operands(inner=6)
    parameters = ("gate_B", "up_B", "down_A", "fold_gate", "fold_up", "weights")
    mixed = {n: t.float() if n in parameters else t for n, t in cast(given, torch.bfloat16).items()}
    found, rounded = results(mixed), results(cast(given, torch.bfloat16))
    assert found["c"].dtype == found["z"].dtype == torch.bfloat16
    for name in parameters:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], rounded[name]) <= SLACK[torch.bfloat16] * 2


def test_autocast_changes_nothing():
    """Dtypes are the caller's choice: fp32 is computed in fp32 inside autocast too, also in backward."""
    given = cast(operands(inner=6), torch.float32)
    plain = results(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(given)
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_token_stays_its_own_problem(bad, inner):
    """A broken token is NaN or infinite itself and moves no other token, with valid ids and no crash."""
    given = cast(operands(inner=inner), torch.float32)
    clean_c, clean_z = expert_swiglu(**given)
    given["gate"][4] = bad
    given["weights"][4] = float("nan")
    c, z = expert_swiglu(**given)
    others = [i for i in range(9) if i != 4]
    assert not c[4].isfinite().any()
    assert torch.equal(c[others], clean_c[others])
    assert torch.equal(z[others], clean_z[others])


def test_second_derivatives_are_refused():
    """There is no double backward: asking for one is an error, not a silent zero."""
    given = operands()
    given["gate"].requires_grad_()
    c, _ = expert_swiglu(**given)
    (grad,) = torch.autograd.grad(c.square().sum(), given["gate"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"expert_swiglu_backward.* no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("inner, dropout", [(None, 0.0), (6, 0.5)], ids=["first round", "later round, dropout"])
def test_operator_is_registered_as_torch_expects(inner, dropout):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = cast(operands(inner=inner), torch.float32)
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    tensors = [given.get(name) for name in ("gate", "up", *LATER_ROUND, *FLOATING[2:], "experts")]
    rest = (1.5, "silu", dropout, torch.tensor([3]) if dropout else None)
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu.default, (*tensors, *rest))
    plain = [None if t is None else t.detach() for t in tensors]
    grads = torch.randn(9, 21), torch.randn(9, 15)
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu_backward.default, (*grads, *plain, *rest))


REFUSALS = [
    ({"gate": torch.zeros(9)}, ValueError, r"expected gate \[tokens, F\].*got \[9\]"),
    ({"experts": torch.zeros(9).long()}, ValueError, r"experts \[tokens, k\].*\[9\]"),
    ({"down_A": torch.zeros(3, 21)}, ValueError, r"down_A \[experts, rank, F\].*\[3, 21\]"),
    ({"up": torch.zeros(9, 20)}, ValueError, r"up must be \[9, 21\] .*got \[9, 20\]"),
    (
        {"low_gate": torch.zeros(9, 14)},
        ValueError,
        r"low_gate must be \[9, 15\] for 9 tokens, F=21, 5 experts",
    ),
    ({"low_up": torch.zeros(8, 15)}, ValueError, r"low_up must be \[9, 15\].*got \[8, 15\]"),
    ({"gate_B": torch.zeros(5, 3, 21)}, ValueError, r"gate_B must be \[5, 21, 3\].*got \[5, 3, 21\]"),
    ({"up_B": torch.zeros(4, 21, 3)}, ValueError, r"up_B must be \[5, 21, 3\].*got \[4, 21, 3\]"),
    ({"down_A": torch.zeros(5, 3, 20)}, ValueError, r"down_A must be \[5, 3, 21\].*got \[5, 3, 20\]"),
    ({"weights": torch.zeros(9, 3)}, ValueError, r"weights must be \[9, 2\].*got \[9, 3\]"),
    ({"experts": torch.zeros(8, 2).long()}, ValueError, r"experts must be \[9, 2\].*got \[8, 2\]"),
    ({"state": torch.zeros(8, 6)}, ValueError, r"state must be \[9, 6\].*got \[8, 6\]"),
    ({"state": torch.zeros(6)}, ValueError, r"state must be \[9, 6\].*got \[6\]"),
    ({"fold_gate": torch.zeros(21, 5)}, ValueError, r"fold_gate must be \[21, 6\].*got \[21, 5\]"),
    ({"fold_up": torch.zeros(6, 21)}, ValueError, r"fold_up must be \[21, 6\].*got \[6, 21\]"),
    (
        {"up": torch.zeros(9, 21, device="meta")},
        ValueError,
        "up is on meta, gate on cpu; put them on one device",
    ),
    ({"experts": torch.zeros(9, 2).long().to("meta")}, ValueError, "experts is on meta, gate on cpu"),
    ({"experts": torch.zeros(9, 2)}, TypeError, "experts has dtype torch.float32; experts are integers"),
    ({"gate_B": torch.zeros(5, 21, 3).long()}, TypeError, "gate_B has dtype torch.int64; .* floating point"),
    (
        {"experts": torch.zeros(9, 6).long(), "weights": torch.zeros(9, 6)},
        ValueError,
        r"1\.\.5 experts.*got k=6",
    ),
    ({"fold_gate": None}, ValueError, "state, fold_gate and fold_up belong together: pass all three or none"),
    ({"state": None}, ValueError, "state, fold_gate and fold_up belong together"),
    ({"activation": "swoosh"}, ValueError, "unknown activation 'swoosh'; known are"),
    ({"dropout": 0.1}, ValueError, "dropout > 0 needs a seed: one int64 tensor"),
    ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout must lie in \[0, 1\), got -0.1"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; expected one of 'auto', 'torch'"),
]


@pytest.mark.parametrize("change, error, message", REFUSALS)
def test_refusals_name_argument_and_expectation(change, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    given = cast(operands(inner=6), torch.float32)
    with pytest.raises(error, match=message):
        expert_swiglu(**(given | change))


@pytest.mark.parametrize("wrong", [5, -1])
def test_id_out_of_range_is_an_error(wrong):
    """An id that names no expert never reads another expert's weights."""
    given = operands()
    given["experts"][3, 1] = wrong
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        expert_swiglu(**given)

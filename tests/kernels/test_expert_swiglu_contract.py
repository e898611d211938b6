"""`expert_swiglu` as an operator among others: dtypes, autocast, broken tokens, registration, ids."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphmoe_kernels.experts import pytorch, pytorch_blocks
from graphmoe_kernels.experts.op import flatten
from graphmoe_kernels.testing import SLACK, relative_error
from tests.kernels.expert_operands import (
    FLOATING,
    LATER_ROUND,
    PYTORCH_FORMS,
    SCALES,
    cast,
    operands,
    packed,
    results,
    run,
    take_form,
)


@pytest.fixture(params=PYTORCH_FORMS)
def form(request, monkeypatch):
    """Every form of the PyTorch path, whatever the sizes and on a CPU."""
    take_form(request.param, monkeypatch)


@pytest.fixture(params=["sorted", "gathered"])
def form_on_host(request, monkeypatch):
    """The forms that read ids."""
    take_form(request.param, monkeypatch)


def test_fp32_parameters_with_bf16_activations(form):
    """Adapters stay fp32 on a bf16 model: c and z are bf16, and the adapters' gradients come back in fp32."""
    given = operands(inner=6, scales=True)
    parameters = ("gate_B", "up_B", "down_A", "fold_gate", "fold_up", "routing_weights", *SCALES)
    mixed = {n: t.float() if n in parameters else t for n, t in cast(given, torch.bfloat16).items()}
    found, rounded = results(mixed), results(cast(given, torch.bfloat16))
    assert found["hidden"].dtype == found["low_down"].dtype == torch.bfloat16
    for name in parameters:
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], rounded[name]) <= SLACK[torch.bfloat16] * 2


def test_autocast_changes_nothing(form):
    """Dtypes are the caller's choice: fp32 is computed in fp32 inside autocast too, also in backward."""
    given = cast(operands(inner=6), torch.float32)
    plain = results(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(given)
    for name, exact in plain.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("inner", [None, 6], ids=["first round", "later round"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_token_stays_its_own_problem(bad, inner, form):
    """A broken token is NaN or infinite itself and moves no other token, with valid ids and no crash."""
    given = cast(operands(inner=inner), torch.float32)
    clean_c, clean_z = run(**given)
    given["gate"][4] = bad
    given["routing_weights"][4] = float("nan")
    c, z = run(**given)
    others = [i for i in range(9) if i != 4]
    assert not c[4].isfinite().any()
    assert torch.equal(c[others], clean_c[others])
    assert torch.equal(z[others], clean_z[others])


def test_second_derivatives_are_refused():
    """There is no double backward: asking for one is an error, not a silent zero."""
    given = operands()
    given["gate"].requires_grad_()
    c, _ = run(**given)
    (grad,) = torch.autograd.grad(c.square().sum(), given["gate"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"expert_swiglu_backward.* no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scale vectors"])
@pytest.mark.parametrize("inner, dropout", [(None, 0.0), (6, 0.5)], ids=["first round", "later round, dropout"])
def test_operator_is_registered_as_torch_expects(inner, dropout, scales):
    """Schema, fake, autograd and aot dispatch of operator and backward: what compile and export need."""
    given = cast(operands(inner=inner, scales=scales), torch.float32)
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    extras = {"dropout": dropout, "seed": torch.tensor([3])}
    biases = {"gate_bias": torch.randn(21), "up_bias": torch.randn(21)} if scales else {}
    flat = flatten(packed(given | extras | biases))
    torch.library.opcheck(torch.ops.graphmoe.expert_swiglu.default, (*flat, 1.5, "silu", "torch"))
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in flat]
    grads = torch.randn(9, 21), torch.randn(9, 15)
    floating = [t is not None for t in packed(given).floating()]
    for needed in (floating, [False] * len(floating), [i == 0 for i in range(len(floating))]):
        arguments = (*grads, *plain, 1.5, "silu", "torch", needed)
        torch.library.opcheck(torch.ops.graphmoe.expert_swiglu_backward.default, arguments)


@pytest.mark.oracle
@pytest.mark.parametrize("wanted", [*FLOATING, *LATER_ROUND, *SCALES])
def test_one_gradient_alone_is_that_of_all_together(wanted):
    """What is frozen gets no gradient, and no other input's gradient lands in its place."""
    given = operands(inner=6, scales=True)
    every = results(given)
    leaf = given[wanted].clone().requires_grad_()
    c, z = run(**(given | {wanted: leaf}), scale=1.5)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (c, z)]
    (found,) = torch.autograd.grad([c, z], leaf, upstream)
    assert torch.equal(found, every[wanted])


def test_scale_vectors_of_ones_change_nothing():
    """m = 1 is the expert without scale vectors."""
    given = operands(inner=6)
    ones = torch.ones(5, 21, dtype=torch.float64)
    for found, exact in zip(run(**given, gate_scale=ones, up_scale=ones), run(**given), strict=True):
        assert torch.equal(found, exact)


BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
IDS = pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])


@BACKENDS
@pytest.mark.parametrize("wrong", [5, -1, 2**40])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_id_out_of_range_is_refused(top_k, wrong, backend, form_on_host):
    """It would read another expert's weights, or make a count of its size: 8 TB for 2^40."""
    given = operands(top_k=top_k)
    given["expert_ids"][3, -1] = wrong
    with pytest.raises(ValueError, match=rf"expert_ids must be in 0\.\.4 \(there are 5\), got .*{wrong}"):
        run(**given, backend=backend)


@BACKENDS
def test_an_expert_twice_in_a_row_is_refused(backend, form_on_host):
    """One of the two would be lost in z and counted in c."""
    given = operands()
    given["expert_ids"][8] = 3
    with pytest.raises(ValueError, match="expert_ids must be distinct within a row"):
        run(**given, backend=backend)


def test_memory_that_stays_with_a_thread_is_nobody_else_s(form):
    """Made in inference mode it is written to in training too; no result lies in it; another thread has its own; and
    the default device is not asked where it is to lie."""

    def calls():
        with torch.inference_mode():
            run(**given)
        with torch.device("meta"):
            first = run(**given, dropout=0.3, seed=seed)
        kept = [t.clone() for t in first]
        results(given, dropout=0.3, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        return kept

    given, seed = cast(operands(inner=6), torch.float32), torch.tensor([3])
    with ThreadPoolExecutor(4) as pool:  # threads that have no memory yet
        found = [each.result() for each in [pool.submit(calls) for _ in range(8)]]
        there = pool.submit(pytorch_blocks.scratch, "base_gate", 1, 1, torch.float32).result()
    assert there.data_ptr() != pytorch_blocks.scratch("base_gate", 1, 1, torch.float32).data_ptr()
    for c, z in found:
        assert torch.equal(c, found[0][0])
        assert torch.equal(z, found[0][1])


@pytest.mark.parametrize("wrong", [[5, 0], [-1, 0], [2**40, 0], [3, 3]])
def test_a_token_with_wrong_ids_is_nan_where_nobody_reads_them(wrong, monkeypatch):
    """On a GPU reading them would be a sync: the token is NaN, as with Triton, and others are as they were."""
    take_form("stacked", monkeypatch)
    given = operands(inner=6, scales=True)
    exact = run(**given)
    given["expert_ids"][4] = torch.tensor(wrong)
    others = [i for i in range(9) if i != 4]
    for found, before in zip(run(**given), exact, strict=True):
        assert not found[4].isfinite().any()
        assert torch.equal(found[others], before[others])


class Launches(TorchDispatchMode):
    """Counts the calls of operators that compute, and refuses those that wait for a device."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            raise AssertionError(f"aten::{name} waits for the device")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert not any(i is not None and i.dtype is torch.bool for i in indices), "an index of bools waits"
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scale vectors"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_gpu_is_never_waited_for_and_gets_as_many_calls_for_every_size(dropout, scales, monkeypatch):
    """What a GPU is given, forward and backward: no read of a tensor by the host, and no loop over tokens, experts or
    slots. Blocks that suit a CPU's cache took 24,000 calls and 152 waits for 8,192 tokens."""
    take_form("stacked", monkeypatch)
    settings = {"dropout": dropout, "seed": torch.tensor([3])} if dropout else {}

    def calls(tokens, experts, top_k):
        given = operands(tokens, experts=experts, top_k=top_k, inner=6, scales=scales)
        arguments = packed(cast(given, torch.float32) | settings), 1.5, "silu"
        grads = torch.randn(tokens, 21), torch.randn(tokens, experts * 3)
        with Launches() as launches:
            pytorch.forward(*arguments)
            forward = launches.count
            pytorch.backward(*grads, *arguments, frozenset(FLOATING))
        return forward, launches.count - forward

    monkeypatch.setattr(pytorch_blocks, "BLOCK_BYTES", 1)  # a CPU would take many blocks
    few = calls(tokens=2, experts=3, top_k=2)
    assert calls(tokens=300, experts=3, top_k=2) == calls(tokens=300, experts=16, top_k=2) == few
    assert calls(tokens=40, experts=8, top_k=8) == calls(tokens=41, experts=16, top_k=4)
    forward, backward = (found - 175 * bool(dropout) for found in few)  # the counted mask's own
    assert forward <= 55
    assert backward <= 110
    take_form("sorted", monkeypatch)
    with pytest.raises(AssertionError, match="waits for the device"):
        calls(tokens=2, experts=3, top_k=2)


@BACKENDS
@IDS
def test_ids_of_every_integer_dtype(backend, dtype, form):
    """A narrow dtype must not wrap in the arithmetic on ids, nor bytes index as a mask; dropout reads ids too."""
    given = operands(inner=6)
    settings = {"dropout": 0.5, "seed": torch.tensor([3]), "backend": backend}
    exact = results(given, **settings)
    found = results(given | {"expert_ids": given["expert_ids"].to(dtype)}, **settings)
    for name, tensor in exact.items():
        assert torch.equal(found[name], tensor), name

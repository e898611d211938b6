"""`FusedGraphMoEFFN` on the Triton kernels: right in every dtype, few launches, compiled whole, refused by name."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_kernels.aot.trace import traced
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Launch, recorded
from graphmoe_kernels.meta_layer import layer_weights
from graphmoe_kernels.rethinking import RethinkingSpec, rethink
from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INTERMEDIATE = 32, 48
DECODE, SLOTS, PAIRS = 3, 66, 97  # a stream from 65 tokens on; of four experts' pairs from 97 on


def make_ffn(rounds: int, backend: str = "triton", **options: object) -> FusedGraphMoEFFN:
    """A small layer in which every term counts, in fp32."""
    settings = {"r": 4, "num_experts": 4, "gru_hidden_scale": 0.4, "lora_dropout": 0.0}
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE))
    config = GraphMoEConfig(rounds=rounds, backend=backend, init_lora_weights=False, **{**settings, **options})
    return FusedGraphMoEFFN(mlp, config).to(DEVICE)


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, count, HIDDEN, dtype=torch.float64).to(DEVICE, dtype)


# What allocates or renames memory and starts nothing on a device.
FREE = {
    "view",
    "_unsafe_view",
    "t",
    "slice",
    "detach",
    "empty",
    "new_empty",
    "alias",
    "expand",
    "split",
    "split_with_sizes",
    "transpose",
    "permute",
}
PRODUCTS = {"mm", "addmm_"}
OURS = {"route", "expert_swiglu", "gru_step"}


class Launches(TorchDispatchMode):
    """Counts what a forward starts: products, operators of ours, and everything else by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=["bf16 adapters", "fp32 adapters"])
@pytest.mark.parametrize("count", [DECODE, SLOTS, PAIRS], ids=["decode", "slots", "pairs"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_launches_of_a_forward(rounds, count, adapters, monkeypatch):
    """3T + 2 products (of few tokens T - 1 less where nobody looks on: the next test) and 3T - 1 kernels, 3T more where
    the experts are a stream; nothing else: no copy, cast, fill or concatenation. A stream multiplies H with M apart, in
    each later round, once for gate and once for up.
    """
    ffn = make_ffn(rounds).eval().to(torch.bfloat16)
    ffn.lora_graphmoe.to(adapters)
    x = tokens(count, torch.bfloat16)
    apart = []  # inside an operator, where a dispatch mode does not see them
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **o: (apart.append(a), mm(*a, **o))[1])
    with torch.no_grad():
        ffn(x)  # the kept fold is built
        apart.clear()
        with Launches() as seen, recorded() as launches:
            ffn(x)
    kernels = [launch.name for launch in launches]
    assert set(seen.operators) <= PRODUCTS | OURS, f"launches besides products and kernels: {seen.operators}"
    each = 3 if count == DECODE else 6
    assert len(kernels) == each * rounds - 1, Counter(kernels)
    assert len(apart) == (0 if count == DECODE else 2 * (rounds - 1))
    assert sum(seen.operators[name] for name in PRODUCTS) == 3 * rounds + 2, seen.operators


@pytest.mark.parametrize("count, products", [(1, 2 * 3 + 3), (DECODE, 2 * 3 + 3), (PAIRS, 3 * 3 + 2 + 2 * 2)])
@torch.no_grad()
def test_the_gru_reads_few_tokens_experts_by_one_product(count, products):
    """hidden and low_down lie side by side, as do Q and its part of low rank: 2T + 3 products in place of 3T + 2.
    A stream keeps them apart, and multiplies H with M by two products per later round.

    Counted by the profiler: what a dispatch mode sees goes through the registered operator, whose outputs cannot share
    memory.
    """
    ffn, x = make_ffn(3).eval().to(torch.bfloat16), tokens(count, torch.bfloat16)
    ffn(x)  # the kept fold is built
    with torch.profiler.profile() as profile, recorded() as launches:
        y = ffn(x)
    assert len(launches) == 3 * 3 - 1 + 3 * 3 * (count == PAIRS)
    found = Counter(event.key for event in profile.key_averages() for _ in range(event.count))
    assert found["aten::mm"] + found["aten::addmm_"] == products, found
    with Launches():
        assert relative_error(y, ffn(x)) < 2e-2  # by the registered operator


def started(rounds: int, count: int, backward: bool) -> Counter[str]:
    """What a folded layer with fp32 adapters starts in a forward for training, and perhaps its backward: our kernels by
    name, "products", and "others", what its operators start inside included.
    """
    weights = layer_weights(Sizes(HIDDEN, INTERMEDIATE, 13, 4, 2, 4, rounds, count), torch.float32)
    x = torch.empty(count, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with traced("sm_90") as steps:
        y = rethink(x, weights, RethinkingSpec(rounds, 2, scale=2.0), fold="always", backend="triton").y
        if backward:
            y.backward(torch.empty_like(x))
    return Counter(
        each.name if isinstance(each, Launch) else "others" if each.product is None else "products" for each in steps
    )


BACKWARD = ("count_tuples", "place_rows", "stream_backward_tokens", "stream_backward_weights", "stream_sum_tokens")


@pytest.mark.parametrize(
    "rounds, count, products, others",
    [(1, DECODE, 7, 18), (1, PAIRS, 7, 16), (3, DECODE, 41, 90), (3, PAIRS, 41, 84)],
    ids=["T=1, decode", "T=1, pairs", "T=3, decode", "T=3, pairs"],
)
def test_launches_of_a_backward(rounds, count, products, others):
    """8T - 1 kernels whatever the tokens: five of the experts in a round, two of the router, and one of each GRU step.

    Among the products are those of the fold and its gradients, that of the base's weights with x's gradient, and H M^T
    once more; of the others two of five are autograd's sums over rounds of what each round reads.
    """
    found = started(rounds, count, backward=True)
    found.subtract(started(rounds, count, backward=False))
    of_rounds = dict.fromkeys(("routing_backward", "routing_backward_router"), rounds)
    of_rounds |= {f"experts_{name}": rounds for name in BACKWARD}
    expected = of_rounds | {"gru_backward": rounds - 1, "products": products, "others": others}
    assert +found == +Counter(expected)


@pytest.mark.parametrize("fold", ["always", "never"])
@torch.no_grad()
def test_both_loops_pad_their_gru(fold):
    """Width 12 is padded to 16: of another, rows are not aligned, kernels spill and cuBLAS takes slow products."""
    ffn = make_ffn(3, fold=fold).eval()
    with recorded() as launches:
        ffn(tokens(DECODE))
    assert [each.arguments["width"] for each in launches if each.name == "gru_forward"] == [16, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [DECODE, SLOTS], ids=["decode", "slots"])
@pytest.mark.parametrize("fold", ["always", "never"])
def test_output_and_gradients_beside_the_torch_backend(fold, count, dtype):
    """Against the layer in fp64: no further off than twice the same layer on PyTorch, and some rounding."""
    ffn = make_ffn(3, fold=fold).to(dtype).train()
    x, upstream = tokens(count, dtype), tokens(count, dtype)
    errors = {}
    exact = None
    for backend, wide in (("torch", torch.float64), ("torch", dtype), ("triton", dtype)):
        layer = copy.deepcopy(ffn).to(wide)
        layer.lora_graphmoe["default"].config = copy.copy(ffn.lora_graphmoe["default"].config)
        layer.lora_graphmoe["default"].config.backend = backend
        leaf = x.to(wide).detach().requires_grad_()
        y = layer(leaf)
        y.backward(upstream.to(wide))
        found = {"y": y, "x": leaf.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        if exact is None:
            exact = found
        errors[backend, wide] = {name: relative_error(found[name], exact[name]) for name in exact}
    # A token whose routing is within rounding may choose otherwise on either backend: such draws are left out.
    slack = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, error in errors["triton", dtype].items():
        assert error <= 2 * errors["torch", dtype][name] + slack, name


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_layer_compiles_into_one_graph(dynamic):
    """Training, forward and backward, without a break; dynamic token counts compile nothing anew."""
    torch._dynamo.reset()
    ffn = make_ffn(2, fold="always").train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter, dynamic=dynamic)
    parameters = [p for p in ffn.parameters() if p.requires_grad]
    graphs = []
    for count in (9, 12) if dynamic else (9,):
        x, upstream = tokens(count), tokens(count)
        outcomes = []
        for run in (ffn, compiled):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            outcomes.append([y, *torch.autograd.grad(y, [leaf, *parameters], upstream)])
        for eager, graph in zip(*outcomes, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] <= 2


@torch.no_grad()
def test_token_counts_share_a_handful_of_graphs():
    """Decode, prefill and any count in between: few graphs, each right."""
    torch._dynamo.reset()
    ffn = make_ffn(2).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    for count in (5, 5, 6, 7, 1, 70, 80, 1, 33):
        x = tokens(count)
        torch.testing.assert_close(compiled(x), ffn(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 6


def test_autocast_runs_the_kernels_in_its_dtype():
    """fp32 weights under bf16 autocast: bf16 out, fp32 gradients, close to the PyTorch backend."""
    ffn = make_ffn(2).train()
    plain = copy.deepcopy(ffn)
    plain.lora_graphmoe["default"].config.backend = "torch"
    x = tokens(SLOTS)
    outcomes = []
    for layer in (ffn, plain):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        outcomes.append(y.detach())
        assert y.dtype == torch.bfloat16
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.grad is not None)
    assert relative_error(outcomes[0], outcomes[1]) < 2e-2


def test_dropout_recomputes_under_checkpointing():
    """Non-reentrant checkpointing replays seeds: the gradients are those without it."""
    ffn = make_ffn(2, lora_dropout=0.3, fold="always").train()
    x = tokens(9)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        ffn.zero_grad()
        y = torch.utils.checkpoint.checkpoint(ffn, x, use_reentrant=False) if checkpointed else ffn(x)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in ffn.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_fp64_is_refused_by_the_kernels_and_taken_by_auto():
    """``"triton"`` names the dtypes that it takes; ``"auto"`` computes fp64 on PyTorch, as it says."""
    ffn, x = make_ffn(2).double(), tokens(4, torch.float64)
    with pytest.raises(ValueError, match=r"is torch.float64: the Triton kernels take float32.*use backend='torch'"):
        ffn(x)
    assert make_ffn(2, "auto").double()(x).dtype == torch.float64


def test_no_tokens():
    """An empty batch goes through, backward too."""
    ffn = make_ffn(3).train()
    x = tokens(0).requires_grad_()
    y = ffn(x)
    y.sum().backward()
    assert y.shape == (1, 0, HIDDEN)
    assert all(not p.grad.any() for p in ffn.parameters() if p.grad is not None)

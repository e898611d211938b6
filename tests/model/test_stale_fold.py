"""A stale fold is a wrong answer: every way in which a weight can change, and the kept fold must follow.

The layer runs in evaluation without gradients, so that a fold is kept; then something changes; then it must give what
the literal loop (``fold="never"``, which keeps nothing) gives on the weights as they are now.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from graphmoe_kernels.rethinking import cache
from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

D, F = 32, 40
SIZES = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 1}
# A width that is padded, and one that is not: without padding a fold's tensors could be the weights themselves.
WIDTHS = {"G = 7": 0.22, "G = 16": 0.5}


def config(**options) -> GraphMoEConfig:
    """A small config in which every term counts."""
    defaults = {"r": 3, "lora_alpha": 6, "num_experts": 4, "top_k": 2, "lora_dropout": 0.1}
    return GraphMoEConfig(**(defaults | {"gru_hidden_scale": 0.22, "init_lora_weights": False} | options))


def make(dtype: torch.dtype = torch.float64, fused: bool = False, **options) -> FusedGraphMoEFFN:
    """A layer in evaluation mode, of random weights."""
    mlp = Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)) if fused else LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True))
    return FusedGraphMoEFFN(mlp.to(dtype), config(**options)).eval()


def hidden_states(dtype: torch.dtype = torch.float64) -> Tensor:
    """The x of every test."""
    return torch.randn(5, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@torch.no_grad()
def run(layer: FusedGraphMoEFFN, x: Tensor | None = None) -> Tensor:
    """y with the kept fold; twice, as the first call may be the one that builds it."""
    x = hidden_states(layer.base_layer.down_proj.weight.dtype) if x is None else x
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    return second


@torch.no_grad()
def literal(layer: FusedGraphMoEFFN, x: Tensor | None = None) -> Tensor:
    """y by the literal loop on the weights as they are now."""
    settings = layer.lora_graphmoe[layer.active_adapters[0]].config
    before, settings.fold = settings.fold, "never"
    try:
        return run(layer, x)
    finally:
        settings.fold = before


def assert_fresh(layer: FusedGraphMoEFFN, bound: float = 1e-11) -> None:
    """The kept fold is that of the weights as they are."""
    assert relative_error(run(layer), literal(layer)) <= bound


@pytest.fixture
def builds(monkeypatch) -> list:
    """One entry for every fold that a cache has built."""
    made: list = []
    original = cache.build_fold
    monkeypatch.setattr(cache, "build_fold", lambda *arguments: made.append(1) or original(*arguments))
    return made


def adapter(layer: FusedGraphMoEFFN) -> nn.Module:
    """The default adapter's modules."""
    return layer.lora_graphmoe["default"]


def random_state(layer: FusedGraphMoEFFN) -> dict[str, Tensor]:
    """Another set of weights under the layer's names."""
    return {name: 0.3 * torch.randn_like(t) for name, t in layer.state_dict().items()}


def optimizer_step(layer: FusedGraphMoEFFN, kind: type = torch.optim.AdamW, **options) -> None:
    """One step without leaving evaluation mode, with an evaluation between forward and step.

    Nothing calls train() or eval(), which would drop the fold; and the fold is kept again when the step comes.
    """
    optimizer = kind([p for p in layer.parameters() if p.requires_grad], lr=0.1, **options)
    loss = layer(hidden_states()).square().sum()
    run(layer)
    loss.backward()
    optimizer.step()


def training_step(layer: FusedGraphMoEFFN) -> None:
    """One step as a trainer takes it: Transformers' default is the fused AdamW."""
    layer.train()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    layer(hidden_states()).square().sum().backward()
    optimizer.step()
    layer.eval()


class ForeignOptimizer(torch.optim.Optimizer):
    """Writes past PyTorch's eyes, as optimizers with kernels of their own do (8-bit Adam, fused kernels)."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad.sign())


@torch.no_grad()
def in_place(layer: FusedGraphMoEFFN, name: str, write: Callable[[Tensor], object]) -> None:
    """Write into one parameter."""
    write(layer.get_parameter(name))


def data_written(layer: FusedGraphMoEFFN) -> None:
    """Values written through ``.data``: no version counter moves."""
    for p in adapter(layer).parameters():
        p.data.copy_(1.3 * p.data)


def data_replaced(layer: FusedGraphMoEFFN, times: int = 1) -> None:
    """Parameters given other storage, as FSDP and weight swapping do."""
    for _ in range(times):
        for p in layer.parameters():
            p.data = 1.1 * p.data


def new_parameter(layer: FusedGraphMoEFFN, owner: str, name: str) -> None:
    """One parameter replaced by another object."""
    module = layer.get_submodule(owner)
    setattr(module, name, nn.Parameter(1.5 * getattr(module, name).detach(), requires_grad=False))


def another_linear(layer: FusedGraphMoEFFN) -> None:
    """A projection of the base swapped for another module."""
    layer.base_layer.up_proj = nn.Linear(D, F, dtype=torch.float64)


def another_mlp(layer: FusedGraphMoEFFN) -> None:
    """The whole base swapped."""
    layer.base_layer = LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)).double()


def another_adapter(layer: FusedGraphMoEFFN) -> None:
    """A second adapter, activated."""
    layer.update_layer("second", config(r=5, gru_hidden_scale=0.5))
    layer.set_adapter("second")


def there_and_back(layer: FusedGraphMoEFFN) -> None:
    """A second adapter run once, and the first one written to meanwhile."""
    another_adapter(layer)
    run(layer)
    in_place(layer, "lora_graphmoe.default.router.weight", lambda w: w.mul_(-1))
    layer.set_adapter("default")


def container_replaced(layer: FusedGraphMoEFFN) -> None:
    """An adapter deleted and another one added under its name."""
    layer.delete_adapter("default")
    layer.update_layer("default", config())
    layer.set_adapter("default")


def rounded_and_back(layer: FusedGraphMoEFFN) -> None:
    """A cast down and up again: other values in tensors of the same dtype, perhaps at the same address."""
    layer.lora_graphmoe.to(torch.bfloat16).to(torch.float64)


def vector_written(layer: FusedGraphMoEFFN) -> None:
    """All parameters become views of one vector."""
    parameters = list(layer.parameters())
    nn.utils.vector_to_parameters(0.8 * nn.utils.parameters_to_vector(parameters), parameters)


def tensors_swapped(layer: FusedGraphMoEFFN) -> None:
    """A parameter exchanges its content with another tensor, as nn.Module.load_state_dict may be told to."""
    weight = layer.get_parameter(OUTPUT)
    torch.utils.swap_tensors(weight, nn.Parameter(2 * weight.detach()))


@torch.inference_mode()
def written_in_inference_mode(layer: FusedGraphMoEFFN) -> None:
    """Ordinary parameters written to inside torch.inference_mode."""
    adapter(layer).gru.output_proj.weight.mul_(2)


def setting(name: str, value: object) -> Callable[[FusedGraphMoEFFN], None]:
    """A setting of the adapter's config changed after the fact."""
    return lambda layer: setattr(adapter(layer).config, name, value)


OUTPUT = "lora_graphmoe.default.gru.output_proj.weight"
CHANGES: dict[str, Callable[[FusedGraphMoEFFN], object]] = {
    "training step": training_step,
    "optimizer step": lambda layer: optimizer_step(layer, foreach=False),
    "foreach optimizer step": lambda layer: optimizer_step(layer, foreach=True),
    "fused optimizer step": lambda layer: optimizer_step(layer, fused=True),
    "fused SGD step": lambda layer: optimizer_step(layer, torch.optim.SGD, fused=True),
    "foreign optimizer step": lambda layer: optimizer_step(layer, ForeignOptimizer),
    "load_state_dict": lambda layer: layer.load_state_dict(random_state(layer)),
    "load_state_dict, assign": lambda layer: layer.load_state_dict(random_state(layer), assign=True),
    "copy_": lambda layer: in_place(layer, OUTPUT, lambda w: w.copy_(torch.randn_like(w))),
    "one element": lambda layer: in_place(layer, OUTPUT, lambda w: w.__setitem__((0, 0), 9.0)),
    "nn.init": lambda layer: nn.init.normal_(adapter(layer).gru.update_gate.weight),
    "through a view": lambda layer: in_place(layer, OUTPUT, lambda w: w.view(-1)[:5].fill_(3.0)),
    "through a detached alias": lambda layer: layer.get_parameter(OUTPUT).detach().mul_(2),
    ".data, then eval()": lambda layer: (data_written(layer), layer.eval()),
    ".data, then train() and eval()": lambda layer: (layer.train(), data_written(layer), layer.eval()),
    ".data, then refold()": lambda layer: (data_written(layer), layer.refold()),
    ".data replaced": data_replaced,
    ".data replaced twice": lambda layer: data_replaced(layer, 2),
    "vector_to_parameters": vector_written,
    "swap_tensors": tensors_swapped,
    "inference mode": written_in_inference_mode,
    "set_adapter": another_adapter,
    "set_adapter there and back": there_and_back,
    "adapter replaced under its name": container_replaced,
    "cast down and up": rounded_and_back,
    "new router": lambda layer: new_parameter(layer, "lora_graphmoe.default.router", "weight"),
    "new A": lambda layer: new_parameter(layer, "lora_graphmoe.default.experts.up_proj", "A"),
    "new down_B": lambda layer: new_parameter(layer, "lora_graphmoe.default.experts.down_proj", "B"),
    "new base weight": lambda layer: new_parameter(layer, "base_layer.gate_proj", "weight"),
    "new base bias": lambda layer: new_parameter(layer, "base_layer.down_proj", "bias"),
    "base weight in place": lambda layer: in_place(layer, "base_layer.down_proj.weight", lambda w: w.mul_(2)),
    "base bias in place": lambda layer: in_place(layer, "base_layer.down_proj.bias", lambda w: w.add_(1)),
    "base linear swapped": another_linear,
    "base MLP swapped": another_mlp,
    "candidate_input": setting("candidate_input", "hidden_state"),
    "candidate_activation": setting("candidate_activation", "tanh"),
    "rounds": setting("rounds", 2),
    "top_k": setting("top_k", 1),
    "norm_topk_prob": setting("norm_topk_prob", False),
    "scale": lambda layer: setattr(adapter(layer), "scale", 0.7),
}


@pytest.mark.parametrize("scale", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fold_follows_every_change(change, scale, builds):
    """A fold is kept, a weight or setting changes, and the next forward is that of the layer as it is."""
    layer = make(gru_hidden_scale=scale)
    before = run(layer)
    assert len(builds) == 1, "there is a kept fold to go stale"
    change(layer)
    assert_fresh(layer)
    assert relative_error(run(layer), before) > 1e-6, "the change matters"
    count = len(builds)
    run(layer)
    assert len(builds) == count, "the new fold is kept in its turn"


@pytest.mark.parametrize("half", ["gate", "up"])
def test_fused_projection_changes(half):
    """Gate and up of a fused projection are views of one tensor: a write into either half is seen."""
    layer = make(fused=True)
    before = run(layer)
    with torch.no_grad():
        layer.base_layer.gate_up_proj.weight.chunk(2)[half == "up"].mul_(1.5)
    assert_fresh(layer)
    assert relative_error(run(layer), before) > 1e-6


@pytest.mark.parametrize("part", [OUTPUT, "base_layer.up_proj.weight"])
def test_storage_never_comes_back_as_another(part):
    """Storage given away and taken again by the allocator must not pass for the old values (seen 9 times in 20)."""
    layer = make()
    for _ in range(20):
        run(layer)
        parameter = layer.get_parameter(part)
        for _ in range(2):
            parameter.data = 1.05 * parameter.data
        assert_fresh(layer)


def test_data_write_alone_is_not_seen():
    """Documented: a write through ``.data`` leaves no trace, and `refold` is for whoever writes so."""
    layer = make()
    before = run(layer)
    in_place(layer, OUTPUT, lambda w: w.data.mul_(2))
    assert torch.equal(run(layer), before)
    layer.refold()
    assert_fresh(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_of_the_layer(dtype):
    """`.to(dtype)`: the fold is rebuilt in it; the bound is that of near ties, none of which this x has."""
    layer = make()
    before = run(layer)
    layer.to(dtype)
    y = run(layer)
    assert y.dtype == dtype
    assert relative_error(y, before) < 20 * torch.finfo(dtype).eps
    layer.double()
    assert_fresh(layer)
    assert relative_error(run(layer), before) < 20 * torch.finfo(dtype).eps


def test_autocast_and_not_in_turn():
    """The fold's dtype is part of what it is: with autocast and without, in any order."""
    layer = make(torch.float32)
    plain = run(layer)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = run(layer)
        assert relative_error(lowered, literal(layer)) < 0.05
    assert torch.equal(run(layer), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(layer), lowered)


def by_stream(layer: FusedGraphMoEFFN) -> FusedGraphMoEFFN:
    """torch.save and torch.load of the whole module."""
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": by_stream, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@pytest.mark.parametrize("twice", COPIES.values(), ids=COPIES)
def test_copies_keep_folds_of_their_own(twice):
    """A copied layer (EMA, evaluation workers) must neither use nor touch the original's fold."""
    layer = make()
    before = run(layer)
    twin = twice(layer)
    assert torch.equal(run(twin), before)
    in_place(twin, OUTPUT, lambda w: w.mul_(2))
    assert_fresh(twin)
    assert torch.equal(run(layer), before)
    in_place(layer, OUTPUT, lambda w: w.mul_(-1))
    assert_fresh(layer)
    assert_fresh(twin)


def test_refreshing_writes_into_no_weight():
    """Folds are refreshed in place; weights that were replaced, and live on elsewhere, must stay what they are."""
    layer = make(gru_hidden_scale=0.5)
    run(layer)
    originals = dict(layer.state_dict())  # the tensors themselves
    values = {name: t.clone() for name, t in originals.items()}
    layer.load_state_dict(random_state(layer), assign=True)
    assert_fresh(layer)
    assert all(torch.equal(originals[name], t) for name, t in values.items())


def test_functional_call():
    """torch.func.functional_call lends other weights for one call: neither they nor the own ones may be stale."""
    layer, x = make(), hidden_states()
    before = run(layer)
    lent = {name: 0.5 * p.detach() for name, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    twin.load_state_dict(lent)
    with torch.no_grad():
        found = torch.func.functional_call(layer, lent, (x,))
    assert relative_error(found, literal(twin)) <= 1e-11
    assert torch.equal(run(layer), before)


def test_fold_is_built_once_and_never_in_training(builds):
    """The cache is used: one build for many forwards of any length, none in training, without folds or in one round."""
    layer = make()
    with torch.no_grad():
        for count in (1, 7, 64, 1):
            layer(torch.randn(count, D, dtype=torch.float64))
    assert len(builds) == 1
    layer.train()
    for _ in range(2):
        layer(torch.randn(300, D, dtype=torch.float64)).sum().backward()
    assert len(builds) == 1
    for options in ({"fold": "never"}, {"rounds": 1}):
        run(make(**options))
    assert len(builds) == 1


@pytest.mark.parametrize("use", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("creation", [torch.inference_mode, torch.no_grad])
def test_inference_mode(creation, use):
    """Weights made inside torch.inference_mode have no version counter; the layer runs all the same."""
    with creation():
        layer = make()
    expected = literal(layer)
    with use():
        x = hidden_states()
        assert relative_error(layer(x), expected) <= 1e-11
        assert relative_error(layer(x), expected) <= 1e-11
    assert relative_error(run(layer), expected) <= 1e-11


def test_fold_built_in_inference_mode_serves_gradients_later():
    """Generate first, then ask for the gradient of x: the kept fold must be no inference tensor."""
    layer = make(inference_mode=True)
    x = hidden_states()
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    adapter(layer).config.fold = "never"
    (exact,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    assert relative_error(found, exact) <= 1e-11


def test_write_to_an_inference_tensor_needs_refold():
    """Documented with `.data`: a weight created in inference mode counts no versions either."""
    with torch.inference_mode():
        layer = make()
        before = run(layer)
        adapter(layer).gru.output_proj.weight.mul_(2)
        assert torch.equal(run(layer), before)
        layer.refold()
        assert_fresh(layer)

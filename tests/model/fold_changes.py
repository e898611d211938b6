"""Small layers, and every way in which a weight or setting of one can change, for the tests of stale folds."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

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


def data_of(projection: str, name: str) -> Callable[[FusedGraphMoEFFN], object]:
    """One tensor of the experts written through ``.data``, and eval() called."""

    def change(layer: FusedGraphMoEFFN) -> None:
        in_place(layer, f"{EXPERTS}.{projection}.{name}", lambda w: w.data.mul_(2))
        layer.eval()

    return change


@torch.inference_mode()
def written_in_inference_mode(layer: FusedGraphMoEFFN) -> None:
    """Ordinary parameters written to inside torch.inference_mode."""
    adapter(layer).gru.output_proj.weight.mul_(2)


def setting(name: str, value: object) -> Callable[[FusedGraphMoEFFN], None]:
    """A setting of the adapter's config changed after the fact."""
    return lambda layer: setattr(adapter(layer).config, name, value)


OUTPUT = "lora_graphmoe.default.gru.output_proj.weight"
EXPERTS = "lora_graphmoe.default.experts"
# The experts' tensors by the names that the operators give them; a kept fold holds a copy of each, whatever T is.
EXPERT_TENSORS = {
    f"{projection.removesuffix('_proj')}_{name}": (projection, name)
    for projection in ("gate_proj", "up_proj", "down_proj")
    for name in ("A", "B")
}
EXPERT_CHANGES: dict[str, Callable[[FusedGraphMoEFFN], object]] = {
    f"{name} {how}": change
    for name, (projection, tensor) in EXPERT_TENSORS.items()
    for how, change in (
        ("in place", partial(in_place, name=f"{EXPERTS}.{projection}.{tensor}", write=lambda w: w.mul_(2))),
        ("replaced", partial(new_parameter, owner=f"{EXPERTS}.{projection}", name=tensor)),
        (".data, then eval()", data_of(projection, tensor)),
    )
}
CHANGES: dict[str, Callable[[FusedGraphMoEFFN], object]] = {
    **EXPERT_CHANGES,
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
    "scale": lambda layer: layer.set_scale("default", 0.7),
}
# Changes of the GRU, which a layer of one round does not have.
_GRU_CHANGES = (
    *("copy_", "one element", "nn.init", "through a view", "through a detached alias", "swap_tensors"),
    *("inference mode", "candidate_input", "candidate_activation", "rounds"),
)
ONE_ROUND_CHANGES = {name: change for name, change in CHANGES.items() if name not in _GRU_CHANGES}


def by_stream(layer: FusedGraphMoEFFN) -> FusedGraphMoEFFN:
    """torch.save and torch.load of the whole module."""
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": by_stream, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}

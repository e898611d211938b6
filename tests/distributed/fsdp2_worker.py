"""What test_fsdp2.py runs in two processes: training, evaluation and generation of models that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from graphmoe_kernels.testing import relative_error
from graphmoe_model.layers.experts import Router
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from tests.model.method_models import adapted, config, decoder_layers, randomise, trained_parameters
from tests.model.method_oracles import HIDDEN, form_config, small_mlp
from tests.model.tiny_models import tiny_model, tokens

STEPS = 3
EVALUATIONS = 150


def shard_layers(model: PeftModel) -> None:
    """Each decoder layer, and what is left as the root: how accelerate and most scripts do it."""
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)


def shard_root(model: PeftModel) -> None:
    """The whole model as one: what Trainer and accelerate come to with a PEFT model."""
    fully_shard(model)


SHARDINGS: dict[str, Callable[[PeftModel], None]] = {
    "layers": shard_layers,
    "root": shard_root,
}


def model_of(form: str, **options: Any) -> PeftModel:
    """The same model on both ranks, every term of which counts."""
    torch.manual_seed(0)
    model = adapted(form, **options)
    randomise(model)
    return model


def whole(tensor: Tensor | None) -> Tensor | None:
    """A shard's tensor; a collective, so on all ranks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def micro_batch(step: int, rank: int) -> Tensor:
    """Other tokens on each rank, and other numbers of them from step to step."""
    return tokens(2, 8 + 3 * step, seed=2 * step + rank)


def steps(model: nn.Module, ranks: list[int]) -> dict[str, Any]:
    """Train on the micro-batches of some ranks, one after the other: losses, gradients and trained parameters."""
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.01)
    losses, gradients = [], {}
    for step in range(STEPS):
        for rank in ranks:
            ids = micro_batch(step, rank)
            loss = model.train()(input_ids=ids, labels=ids).loss
            (loss / len(ranks)).backward()
            losses.append(loss.detach())
        gradients |= {f"{step}.{name}": whole(p.grad) for name, p in trained_parameters(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: whole(p.detach()) for name, p in trained_parameters(model).items()}
    return {"losses": torch.stack(losses), "gradients": gradients, "parameters": parameters}


def greatest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of the tensor that differs most."""
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)


def train(form: str, sharding: str) -> dict[str, float]:
    """Two ranks' training against one process that accumulates both micro-batches."""
    alone = model_of(form)
    expected = steps(alone, [0, 1])
    model = model_of(form)
    SHARDINGS[sharding](model)
    found = steps(model, [distributed.get_rank()])
    ids = tokens(2, 9, seed=99)
    with torch.no_grad():
        evaluated = relative_error(model.eval()(input_ids=ids).logits, alone.eval()(input_ids=ids).logits)
    return {
        "losses": relative_error(found["losses"], expected["losses"][distributed.get_rank() :: 2]),
        "gradients": greatest_difference(found["gradients"], expected["gradients"]),
        "parameters": greatest_difference(found["parameters"], expected["parameters"]),
        "evaluation": evaluated,
    }


def train_all(forms: list[str]) -> dict[str, dict[str, float]]:
    """`train` for every form and sharding."""
    return {f"{form}, {sharding}": train(form, sharding) for form in forms for sharding in SHARDINGS}


class Block(nn.Module):
    """An MLP and, where the form has experts there, a linear; a forward gives the output of each."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = form_config(form)
        self.mlp: nn.Module = FusedGraphMoEFFN(small_mlp().float(), settings)
        self.linear: nn.Module = nn.Linear(HIDDEN, HIDDEN)
        if settings.base_method.attention == "experts":
            self.linear = RoutedLoRALinear(self.linear, settings)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.mlp(x), self.linear(x)]


@torch.no_grad()
def evaluate(form: str, same_memory: bool) -> list[int]:
    """Write new weights into the shards and evaluate, again and again: how often each output was that of the weights.

    Nothing calls train() or eval() on the sharded block in between, and no optimizer steps: only the writes could tell.

    Args:
        form: of the block.
        same_memory: gather into the same memory each time, as an allocator that keeps memory (CUDA's) comes to; else
            it is the C library that gives memory out, and sometimes the same.
    """
    block, twin, x = Block(form).eval(), Block(form), torch.randn(5, HIDDEN)
    names, factors = list(trained_parameters(block)), (0.5, 2.0)  # exact, so that there are two states in turn
    expected = []
    for factor in factors:
        for name in names:
            twin.get_parameter(name).mul_(factor)
        expected.append(twin.eval()(x))  # eval() forgets its folds
    fully_shard(block, reshard_after_forward=True)
    shards, right = [block.get_parameter(name).to_local() for name in names], [0, 0]
    with mock.patch.object(_fsdp_param, "free_storage") if same_memory else nullcontext():
        for number in range(EVALUATIONS):
            for shard in shards:
                shard.mul_(factors[number % 2])
            for part, (y, wanted) in enumerate(zip(block(x), expected[number % 2], strict=True)):
                right[part] += relative_error(y, wanted) < 1e-5
    return right


def evaluate_all(forms: list[str]) -> dict[str, list[int]]:
    """`evaluate` for every form, in the same memory and in whatever memory comes."""
    return {f"{form}, same_memory={same}": evaluate(form, same) for form in forms for same in (True, False)}


def generate(sharding: str) -> dict[str, Any]:
    """Generate with FSDP not told of it, and told; the ranks' prompts and answers are of different lengths."""
    rank = distributed.get_rank()
    prompt, settings = tokens(2, 5 + rank, seed=rank), {"max_new_tokens": 6 + 2 * rank, "do_sample": False}
    model = model_of("graphmoe-mixlora").eval()
    expected = model.generate(input_ids=prompt, **settings)
    SHARDINGS[sharding](model)
    message = raised(lambda: model.generate(input_ids=prompt, **settings))
    register_fsdp_forward_method(model, "generate")
    equal = torch.equal(model.generate(input_ids=prompt, **settings), expected)
    losses = steps(model, [rank])["losses"]  # training goes on afterwards
    return {"message": message, "equal": equal, "trains": bool(losses.isfinite().all())}


def shard_experts(model: PeftModel) -> None:
    """Of each MLP the experts by themselves."""
    for layer in decoder_layers(model):
        fully_shard(layer.mlp.lora_graphmoe["default"].experts)


def shard_projection(model: PeftModel) -> None:
    """One projection of the wrapped MLP, inside of a sharded decoder layer."""
    for layer in decoder_layers(model):
        fully_shard(layer.mlp.base_layer.up_proj)
        fully_shard(layer)


def shard_router(model: PeftModel) -> None:
    """The router of an attention linear with experts."""
    for layer in decoder_layers(model):
        fully_shard(layer.self_attn.q_proj.lora_graphmoe["default"].router)


def split_tensors(model: PeftModel) -> None:
    """Tensor parallelism on an adapted MLP's projection."""
    plan = {"mlp.base_layer.down_proj": RowwiseParallel()}
    for layer in decoder_layers(model):
        parallelize_module(layer, init_device_mesh("cpu", (2,)), plan)


def fsdp1(model: PeftModel, **settings: Any) -> nn.Module:
    """FSDP 1 around each decoder layer and the model, with flat parameters that keep the original ones' names."""
    policy = ModuleWrapPolicy({type(decoder_layers(model)[0]), *settings.pop("classes", ())})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), **settings
    )


def attach_second(model: PeftModel) -> None:
    """A further adapter on a sharded model."""
    shard_layers(model)
    model.add_adapter("second", config("graphmoe-mixlora"))


def refuse() -> dict[str, str]:
    """The messages for everything that is sharded where it must not be, and when."""
    ids, messages = tokens(2, 8), {}
    below = {"experts": shard_experts, "projection": shard_projection, "tensors": split_tensors}
    for name, shard in below.items():
        model = model_of("graphmoe-mixlora")
        shard(model)
        messages[name] = raised(lambda model=model: model(input_ids=ids))
    model = model_of("graphmoe-mola")
    shard_router(model)
    messages["linear's router"] = raised(lambda: model(input_ids=ids))

    model = model_of("graphmoe-mixlora")
    messages["second adapter"] = raised(lambda: attach_second(model))
    messages["second adapter's trace"] = str(list(model.peft_config))
    for form in ("graphmoe-mixlora", "graphmoe-mola"):
        base = tiny_model()
        for layer in base.model.layers:
            fully_shard(layer)
        before = [name for name, _ in base.named_modules()]
        messages[f"{form} after FSDP"] = raised(lambda base=base, form=form: get_peft_model(base, config(form)))
        messages[f"{form}'s trace"] = str(before == [name for name, _ in base.named_modules()])
    base = tiny_model()
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in base.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), plan)
    messages["after tensor parallelism"] = raised(lambda: get_peft_model(base, config("graphmoe-mixlora")))

    wrapped = fsdp1(model_of("graphmoe-mixlora"), classes=[Router])
    messages["FSDP 1 below"] = raised(lambda: wrapped(input_ids=ids))
    return messages


def train_fsdp1() -> dict[str, float]:
    """Two ranks' training under FSDP 1 against one process; later losses say whether the steps were right."""
    alone = model_of("graphmoe-mixlora")
    expected = steps(alone, [0, 1])
    model = fsdp1(model_of("graphmoe-mixlora"))
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.01)
    losses = []
    for step in range(STEPS):
        ids = micro_batch(step, distributed.get_rank())
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    ids = tokens(2, 9, seed=99)
    with torch.no_grad():
        evaluated = relative_error(model.eval()(input_ids=ids).logits, alone.eval()(input_ids=ids).logits)
    expected_losses = expected["losses"][distributed.get_rank() :: 2]
    return {"losses": relative_error(torch.stack(losses), expected_losses), "evaluation": evaluated}


def raised(call: Callable[[], Any]) -> str:
    """The message of the exception that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"

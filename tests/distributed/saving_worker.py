"""Saves and loads of adapters whose tensors are spread over two processes, for test_saving.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import Tensor, distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.model.adapter_folders import contents
from tests.model.tiny_models import tiny_model, tiny_peft_model, tokens


def trained_model(**options: Any) -> PeftModel:
    """A model with an adapter that changes its output, with a norm inside of each decoder layer trained beside it."""
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, "modules_to_save": ["input_layernorm"], "use_dora": True, "rounds": 2}
    return tiny_peft_model(**{**settings, **options})


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step on rows that differ by rank."""
    ids = tokens(seed=distributed.get_rank())
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def refusal(save: Callable[[], None], folder: str) -> tuple[str, bool]:
    """What a save of every rank is refused with, and whether the folder is then as before, byte for byte."""
    before, message = contents(Path(folder)), "not refused"
    distributed.barrier()
    try:
        save()
    except RuntimeError as error:
        message = f"{type(error).__name__}: {error}"
    distributed.barrier()
    return message, contents(Path(folder)) == before


def fsdp2(folder: str, checkpointing: bool) -> dict[str, Any]:
    """Save and load under FSDP2, with the decoder layers wrapped for activation checkpointing or not."""
    first = distributed.get_rank() == 0
    model = trained_model()
    if first:
        model.save_pretrained(folder)
    distributed.barrier()
    mesh = init_device_mesh("cpu", (2,))
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        if checkpointing:
            layers[index] = checkpoint_wrapper(layer)
        fully_shard(layers[index], mesh=mesh)
    fully_shard(model, mesh=mesh)
    one_step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    found: dict[str, Any] = {"sharded": refusal(lambda: model.save_pretrained(folder), folder)}
    shards = peft.get_peft_model_state_dict(model)
    found["shards"] = {name: list(shard.shape) for name, shard in shards.items()}

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = {name: shard.full_tensor() for name, shard in shards.items()}
    found["empty"] = refusal(lambda: model.save_pretrained(folder, state_dict={}), folder)
    model.save_pretrained(folder, state_dict=state, is_main_process=first)
    distributed.barrier()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(folder, "default", is_trainable=True)
    loaded = {name: shard.full_tensor() for name, shard in peft.get_peft_model_state_dict(model).items()}
    found["own"], found["loaded"] = own, loaded
    return found


def zero3(folder: str) -> dict[str, Any]:
    """Save and load under DeepSpeed ZeRO-3, after a step."""
    import deepspeed

    from tests.distributed.on_cpu import shard_on_cpu

    shard_on_cpu()
    first = distributed.get_rank() == 0
    model = trained_model()
    if first:
        model.save_pretrained(folder)
    distributed.barrier()
    engine = _engine(model, stage=3)
    _engine_step(engine)
    found: dict[str, Any] = {"sharded": refusal(lambda: model.save_pretrained(folder), folder)}
    found["own"] = _gathered(model)
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        model.save_pretrained(folder, is_main_process=first)
        distributed.barrier()
        found["embeddings"] = refusal(lambda: model.save_pretrained(folder, save_embedding_layers=True), folder)
    distributed.barrier()
    state = engine._zero3_consolidated_16bit_state_dict()
    model.save_pretrained(f"{folder}-consolidated", state_dict=state, is_main_process=first)
    distributed.barrier()
    with torch.no_grad(), deepspeed.zero.GatheredParameters(_trained(model), modifier_rank=0):
        for parameter in _trained(model):
            parameter.zero_()
    model.load_adapter(folder, "default", is_trainable=True)
    found["loaded"] = _gathered(model)
    _engine_step(engine, lr=0.0)
    found["after a step of 0"] = _gathered(model)
    return found


def zero_init(folder: str) -> dict[str, Any]:
    """Load an adapter into a base whose weights ZeRO-3 has partitioned as they were made, Trainer's order.

    Its folder holds untrained embeddings too, which go into the partitioned base.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from tests.distributed.on_cpu import shard_on_cpu

    shard_on_cpu()
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    kept = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero})
    base = tiny_model(seed=1)  # other embeddings than the saved ones
    assert all(parameter.numel() == 0 for parameter in base.parameters())
    found: dict[str, Any] = {}
    try:
        PeftModel.from_pretrained(base, f"{folder}-other")
    except ValueError as error:
        found["misfit"] = str(error)
    model = PeftModel.from_pretrained(base, folder)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found["loaded"] = {
            name: tensor.clone()
            for name, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=True).items()
        }
    del kept
    return found


def _engine(model: PeftModel, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(_trained(model), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _engine_step(engine: Any, lr: float = 0.1) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    ids = tokens(seed=distributed.get_rank())
    engine.train()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gathered(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by their names in a checkpoint."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(_trained(model)):
        return {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}

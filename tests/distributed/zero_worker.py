"""What test_zero.py runs in two processes: models that DeepSpeed's ZeRO partitions, in the order that Trainer has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from graphmoe_model.layers.routed_layer import RoutedLayer
from graphmoe_model.parameters import parameters_by_component
from graphmoe_model.storage.weight_management import true_shape
from tests.distributed.fsdp2_worker import raised
from tests.model.method_models import config, trained_parameters
from tests.model.tiny_models import tokens

STEPS = 3
LENGTHS = (12, 800)  # tokens of each rank in one step: on either side of fold="auto"'s break-even


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; at stage 3 no parameter is so small that it stays whole."""
    partition = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": partition,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 unless said otherwise
    }


@contextmanager
def partitioned(stage: int = 3) -> Iterator[None]:
    """As a Trainer's arguments with ``deepspeed=`` do: models that are loaded inside are made under zero.Init."""
    held = HfDeepSpeedConfig(settings(stage))
    with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):  # takes minutes to compile; gloo serves
        yield
    del held


def micro_batch(step: int, rank: int) -> Tensor:
    return tokens(1, LENGTHS[rank], seed=2 * step + rank)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    ids = micro_batch(step, rank)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One whose steps are in proportion to the gradients: Adam's turn the rounding of small ones into full steps."""
    return torch.optim.SGD(trained_parameters(model).values(), lr=0.1, momentum=0.9)


def initialised(model: PeftModel, stage: int) -> Any:
    """DeepSpeed's engine around a model."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings(stage))
    return engine


def train(engine: Any) -> list[float]:
    losses = []
    engine.train()
    for step in range(STEPS):
        loss = loss_of(engine, step, distributed.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def gathered_copies(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, whole; a collective."""
    named = trained_parameters(model)
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def still_gathered(model: nn.Module) -> list[str]:
    """The parameters that are whole between forwards, and the layers that keep a fold."""
    whole = [n for n, p in model.named_parameters() if hasattr(p, "ds_status") and p.ds_status.name == "AVAILABLE"]
    kept = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, RoutedLayer) and any(cache.fold is not None for cache in layer._folds.values())
    ]
    return whole + kept


def attach(forms: dict[str, dict[str, Any]], base: str) -> dict[str, dict[str, Any]]:
    """Attach fresh adapters to models under zero.Init: their tensors, and the shapes that the base's then have."""
    results = {}
    for form, options in forms.items():
        with partitioned():
            model = AutoModelForCausalLM.from_pretrained(base)
            torch.manual_seed(0)
            model = get_peft_model(model, config(form, **options))
        layer = model.get_base_model().model.layers[0]
        shapes = {tuple(p.shape) for p in layer.parameters() if hasattr(p, "ds_id")}
        adapter = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
        results[form] = {"base": shapes, "adapter": adapter}
    return results


def run(stage: int, base: str, adapter: str, saved: str) -> dict[str, Any]:
    """Load an adapter under zero.Init, train with 12 and 800 tokens in the same step, evaluate, generate and save."""
    rank = distributed.get_rank()
    with partitioned(stage):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
        engine = initialised(model, stage)
        losses = train(engine)
        parameters = gathered_copies(model)
        engine.eval()
        with torch.no_grad():
            logits = engine(input_ids=evaluated(rank)).logits
        generated = model.generate(input_ids=evaluated(0)[:, : 5 + rank], max_new_tokens=4 + rank, do_sample=False)
        left = still_gathered(model)
        shapes = {name: tuple(true_shape(p)) for name, p in trained_parameters(model).items()}
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            model.save_pretrained(saved, is_main_process=rank == 0)
        second = raised(lambda: model.add_adapter("second", config("graphmoe-mixlora")))
    return {
        "losses": losses,
        "parameters": parameters,
        "logits": logits,
        "generated": generated,
        "left": left,
        "shapes": shapes,
        "counts": parameters_by_component(model),
        "second adapter": second,
    }


def evaluated(rank: int) -> Tensor:
    """What a rank evaluates: 12 tokens, or 800."""
    return tokens(1, LENGTHS[rank], seed=5)

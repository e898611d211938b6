"""Drawn configurations: refused with the model as it was, or attached with the base's output, and gone again."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from graphmoe_model import GraphMoEConfig
from tests.drawing import assert_clear, make_draws
from tests.model.attaching import snapshot
from tests.model.config_draws import settings
from tests.model.tiny_models import logits, tiny_model, tokens

# What the messages call a field, or what they say of several.
ALSO = ("PEFT", "rank", "experts", "DoRA", "task type")


@functools.cache
def base() -> tuple[nn.Module, torch.Tensor]:
    model = tiny_model()
    return model, logits(model)


def check(given: dict[str, Any]) -> None:
    names = (*given, *ALSO)
    try:
        config = GraphMoEConfig(**{"r": 4, "num_experts": 3, "gru_hidden_scale": 0.25, **given})
    except Exception as error:
        assert_clear(error, names, also_from=("peft",))
        return
    plain, expected = base()
    model = copy.deepcopy(plain)
    before = snapshot(model)
    try:
        adapted = get_peft_model(model, config)
    except Exception as error:
        assert_clear(error, names, also_from=("peft",))
        assert snapshot(model) == before, "a refusal must leave the model as it was"
        return
    if config.backend == "triton":
        return  # the kernels have tests of their own
    found = logits(adapted)
    assert found.isfinite().all()
    # Whole MLPs under weights that do not sum to one are less than the MLP, by definition.
    whole = config.norm_topk_prob or config.base_method.routers != "layer"
    if config.init_lora_weights and config.task_type != "SEQ_CLS" and whole:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not config.inference_mode:
        assert any(p.requires_grad for p in adapted.parameters())
        if config.router_aux_loss_coef < 1e30:
            assert adapted.train()(input_ids=tokens(), labels=tokens()).loss.isfinite()
    adapted.unload()
    assert torch.equal(logits(model), expected), "unload() must give the base back"


def test_drawn_configurations():
    make_draws(check, settings(), examples=60, seed=21)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_drawn_configurations(seed):
    make_draws(check, settings(), examples=300, seed=seed)

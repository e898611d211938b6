"""A fold is kept only where every write to its sources is seen, and ranks choose it alike."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from peft import get_peft_model
from torch import nn

from graphmoe_model.storage.weight_management import (
    WeightManager,
    allowed_fold,
    keeps_folds,
    true_shape,
    weight_manager,
)
from tests.model.fold_changes import assert_fresh, make, run
from tests.model.tiny_models import VOCABULARY, tiny_config, tiny_model


def under_fsdp(layer: nn.Module) -> None:
    layer._is_fsdp_managed_module = True  # as FSDP 1 and 2 mark every module inside of what they shard


def under_zero3(layer: nn.Module) -> None:
    for number, parameter in enumerate(layer.parameters()):
        parameter.ds_id = number


def under_zero2(layer: nn.Module) -> None:
    for parameter in layer.lora_graphmoe.parameters():
        parameter._hp_mapping = None


def offloaded(layer: nn.Module) -> None:
    hook = AlignDevicesHook(execution_device=torch.device("cpu"))
    hook.offload = True
    layer.base_layer.down_proj._hf_hook = hook


def manager(layer: nn.Module) -> WeightManager:
    down = layer.base_layer.down_proj
    return weight_manager(layer, down, layer.lora_graphmoe["default"].experts.gate_proj.A)


MANAGERS = {
    WeightManager.FSDP: under_fsdp,
    WeightManager.ZERO3: under_zero3,
    WeightManager.OFFLOAD: offloaded,
    WeightManager.ZERO: under_zero2,
}


@pytest.mark.parametrize("expected", MANAGERS, ids=lambda m: m.name)
def test_managed_weights_keep_no_fold(expected):
    """A fold that was kept before is given up too: it would hold the memory of weights that are shards by now."""
    layer = make()
    assert manager(layer) is WeightManager.LAYER
    run(layer)
    assert layer._folds["default"].fold is not None
    MANAGERS[expected](layer)
    assert manager(layer) is expected
    assert_fresh(layer)
    cache = layer._folds["default"]
    assert keeps_folds(expected) == (cache.fold is not None)
    if not keeps_folds(expected):
        assert cache._kept is None, "no weight is held"


def test_deepspeed_ranks_choose_alike():
    """DeepSpeed pairs gradients and gathers of ranks by their order, so no rank may choose by its tokens."""
    assert allowed_fold(WeightManager.ZERO3, "auto") == "never"
    assert allowed_fold(WeightManager.ZERO, "auto") == "always", "in training"
    with torch.no_grad():
        assert allowed_fold(WeightManager.ZERO, "auto") == "auto"
    for manager in WeightManager:
        for asked in ("always", "never"):
            assert allowed_fold(manager, asked) == asked
    for manager in (WeightManager.LAYER, WeightManager.FSDP, WeightManager.OFFLOAD):
        assert allowed_fold(manager, "auto") == "auto"


def test_shapes_of_partitioned_parameters():
    """ZeRO-3 leaves a parameter without elements, and remembers its shape."""
    parameter = nn.Parameter(torch.empty(0))
    assert true_shape(parameter) == (0,)
    parameter.ds_shape = torch.Size([7, 3])
    assert true_shape(parameter) == (7, 3)


def test_tokens_are_counted_by_the_true_shape():
    """A partitioned embedding has no rows to count; it is neither taken for no embedding nor for an empty one."""
    model = tiny_model()
    weight = model.get_input_embeddings().weight
    weight.ds_shape = weight.shape
    weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"embed_tokens has {VOCABULARY} tokens, so there is no token 999"):
        get_peft_model(model, tiny_config(trainable_token_indices=[3, 999]))

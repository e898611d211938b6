"""PEFT's helpers on a model with experts: they act on the experts too, or refuse the model by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import peft.optimizers
import pytest
import torch
from peft import (
    LoraConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.optimizers import lorafa, loraplus
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import nn

from graphmoe_model import create_loraplus_optimizer
from graphmoe_model.layers.routed_layer import RoutedLayer
from graphmoe_model.tuner import peft_helpers
from tests.model.attaching import snapshot
from tests.model.method_models import adapted, as_lora, config, trained_parameters
from tests.model.method_oracles import FORMS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model, tokens

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("form", FORMS)
def test_lora_plus_gives_b_its_rate(form):
    """Every B and magnitude has ratio * lr, every A, router and matrix of the GRU lr; each is there once."""
    model = adapted(form)
    optimizer = peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=8)
    found = rates(model, optimizer)
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(trained_parameters(model))
    for name, rate in found.items():
        fast = ("lora_B.default.weight", ".B", "magnitude", "lora_magnitude_vector.default.weight", "candidate.bias")
        assert rate == (4.0 if name.endswith(fast) else 0.5), name


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_lora_plus_has_pefts_groups(form):
    """One expert's tensors get the rate and the weight decay that LoRA's have on the same linears."""
    ours, settings = adapted(form), {"lr": 0.5, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.25}
    theirs_config = LoraConfig(r=config(form).r, target_modules=LINEARS, use_dora=config(form).use_dora)
    theirs = get_peft_model(tiny_model(), theirs_config)
    make = loraplus.create_loraplus_optimizer

    def groups(model: nn.Module) -> dict[str, tuple[float, float]]:
        optimizer = make(model, torch.optim.SGD, **settings)
        names = {id(p): name for name, p in model.named_parameters()}
        held = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        parameters = trained_parameters(model)
        moved = {name: nn.Parameter(torch.full_like(parameters[name], index)) for index, name in enumerate(held)}
        renamed = as_lora(moved) if model is ours else moved
        return {name: list(held.values())[int(tensor.flatten()[0])] for name, tensor in renamed.items()}

    assert groups(ours) == groups(theirs)


def test_lora_plus_trains():
    """A step moves B by the ratio more than A: with SGD exactly by rate times gradient."""
    model = adapted("graphmoe-mixlora").double()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=4)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    optimizer.step()
    for name, rate in rates(model, optimizer).items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad, msg=name)


EARLY = """
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
import torch
from tests.model.test_peft_helpers import check_early
from tests.model.tiny_models import logits, tiny_model, tiny_peft_model
check_early(create_loraplus_optimizer, create_lorafa_optimizer)
model = tiny_peft_model(init_lora_weights=False)
with rescale_adapter_scale(model, 0):
    assert torch.equal(logits(model), logits(tiny_model()))
"""


def check_early(create_loraplus: Callable, create_lorafa: Callable) -> None:
    """PEFT's own functions refuse the model, and leave LoRA's A as trainable as they were."""
    model = tiny_peft_model()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="create_loraplus_optimizer was imported before graphmoe_model"):
        create_loraplus(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=2)
    with pytest.raises(NotImplementedError, match="LoRA-FA is not supported with GraphMoE"):
        create_lorafa(model, r=4, lora_alpha=8, lr=1.0)
    assert snapshot(model) == before


def test_helpers_that_a_program_had_before():
    """`from peft.optimizers import ...` above `import graphmoe_model` gets PEFT's own: nothing may slip through."""
    check_early(peft_helpers._peft_loraplus, lorafa.create_lorafa_optimizer.__wrapped__)


@pytest.mark.slow
def test_helpers_imported_before_this_package():
    """The same in a process that really imports them first."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", EARLY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


REFUSED: dict[str, tuple[Callable, type[Exception], str]] = {
    "LoRA-FA": (
        lambda model, _: peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1),
        NotImplementedError,
        r"LoRA-FA is not supported with GraphMoE.*requires_grad_\(False\).*torch.optim.AdamW",
    ),
    "LoRA-FA by its class": (
        lambda model, _: lorafa.LoraFAOptimizer(
            [{"params": list(model.parameters()), "names": [name for name, _ in model.named_parameters()]}]
        ),
        NotImplementedError,
        "LoRA-FA is not supported with GraphMoE",
    ),
    "Riemannian": (
        lambda model, _: peft.optimizers.create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.1),
        NotImplementedError,
        "would leave the experts out; use torch.optim.AdamW",
    ),
    "preparing a hotswap": (
        lambda model, _: prepare_model_for_compiled_hotswap(model, target_rank=8),
        NotImplementedError,
        r"hotswapping is not supported with GraphMoE. Load .*set_adapter\('new'\)",
    ),
    "hotswap": (
        lambda model, folder: hotswap_adapter(model, str(folder), "default", torch_device="cpu"),
        NotImplementedError,
        "hotswapping is not supported with GraphMoE",
    ),
    "conversion to LoRA": (
        lambda model, _: convert_to_lora(model, 4),
        TypeError,
        "do not support LoRA conversion: .*FusedGraphMoEFFN",
    ),
    "intruders": (lambda model, _: reduce_intruder_dimension(model), ValueError, "not using LoRA"),
    "merging": (lambda model, _: model.merge_and_unload(), NotImplementedError, "cannot be merged"),
    "weighted sums": (
        lambda model, _: model.add_weighted_adapter(["default"], [1.0], "both"),
        NotImplementedError,
        "routing and rethinking are nonlinear in them; train one adapter on the data of both, switch between them",
    ),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_for_lora_alone_is_refused(call, error, message, tmp_path):
    """By name and before anything has changed: acting on the attention's LoRA alone would be another method."""
    model = tiny_peft_model(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model, tmp_path)
    assert snapshot(model) == before


def test_lora_models_keep_pefts_helpers(tmp_path):
    """This package is imported, the model is plain LoRA: nothing is refused."""
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    optimizer = peft.optimizers.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=2)
    assert set(rates(model, optimizer).values()) == {0.5, 1.0}
    assert peft.optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    assert peft.optimizers.create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=0.1)
    prepare_model_for_compiled_hotswap(model, target_rank=16)


# --- what PEFT says of a model ---------------------------------------------------------------------------------------


def test_status():
    """Layers, adapters, devices and gradients are counted as for LoRA; a disabled model says so."""
    model = tiny_peft_model()
    model.add_adapter("second", tiny_config())
    status = get_model_status(model)
    assert (status.adapter_model_type, status.peft_types) == (
        "GraphMoEModel",
        dict.fromkeys(model.peft_config, "GRAPHMOE"),
    )
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (10, True, ["default"])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.available_adapters == ["default", "second"]
    layers = {layer.name: layer for layer in get_layer_status(model)}
    mlp = layers["model.model.layers.0.mlp"]
    assert (mlp.module_type, mlp.devices) == ("FusedGraphMoEFFN", {"default": ["cpu"], "second": ["cpu"]})
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def test_set_requires_grad():
    """Experts, routers and the GRU follow, of the named adapter alone."""
    model = tiny_peft_model()
    model.add_adapter("second", tiny_config())
    model.set_requires_grad("default", requires_grad=False)
    assert not trained_parameters(model)
    model.set_requires_grad("second")
    assert trained_parameters(model).keys() == {name for name, _ in model.named_parameters() if ".second." in name}


def test_an_adapters_state_goes_into_another_model():
    """get_peft_model_state_dict and set_peft_model_state_dict, with a model that PEFT only injected into."""
    model = tiny_peft_model(init_lora_weights=False)
    state = get_peft_model_state_dict(model)
    assert not any("default" in name for name in state)
    injected = inject_adapter_in_model(tiny_config(), tiny_model(), "other")
    assert sum(isinstance(module, RoutedLayer) for module in injected.modules()) == 2
    set_peft_model_state_dict(injected, state, adapter_name="other")
    assert torch.equal(logits(injected), logits(model))


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["", "with a trained head"])
def test_unload_gives_back_what_was_there(saved):
    """PEFT would leave the trained copy in the head's place: the docstring promises the base model."""
    base = tiny_model()
    expected, head = logits(base), base.lm_head
    model = get_peft_model(
        base, tiny_config(modules_to_save=saved, trainable_token_indices=[5], init_lora_weights=False)
    )
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(1)
    assert not torch.allclose(logits(model), expected)
    unloaded = model.unload()
    assert unloaded.lm_head is head
    assert torch.equal(logits(unloaded), expected)
    assert not hasattr(unloaded, "peft_config")
    again = logits(get_peft_model(unloaded, tiny_config(modules_to_save=saved)))
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_dtypes_of_adapters_on_a_half_precision_base():
    """fp32 as PEFT casts them; with autocast_adapter_dtype=False the base's, but for the experts' magnitudes."""
    for autocast in (True, False):
        model = get_peft_model(tiny_model().bfloat16(), tiny_config(use_dora=True), autocast_adapter_dtype=autocast)
        dtypes = {name: p.dtype for name, p in trained_parameters(model).items()}
        kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        experts = {name for name in dtypes if name.endswith("_proj.magnitude")}
        assert kept == (set(dtypes) if autocast else experts)
        assert logits(model).dtype == torch.bfloat16

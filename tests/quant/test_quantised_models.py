"""Models that Transformers loads quantised, with an adapter: attach, train, save, reload, generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

from graphmoe_kernels.testing import relative_error
from graphmoe_model import GraphMoEConfig
from graphmoe_model.conversion import read_adapter, to_moe_peft
from graphmoe_model.layers.routed_layer import RoutedLayer
from tests.model.method_models import trained_parameters
from tests.model.tiny_models import logits, tiny_config, tokens, train_step
from tests.quant.bases import MODELS, load_model, save_model

pytestmark = pytest.mark.quant

TRAINABLE = [name for name in MODELS if name != "torchao int8 dynamic"]
KINDS = pytest.mark.parametrize("kind", TRAINABLE)
# LLM.int8() rounds inputs in evaluation, where the last bit may move one to another step.
TOLERANCE = dict.fromkeys(TRAINABLE, 1e-5) | {"int8": 0.02}
METHODS = {
    "graphmoe": {},
    "graphmoe with dora": {"use_dora": True},
    "mola with dora": {"method": "mola", "use_dora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


def adapted(folder: Path, kind: str, **options) -> PeftModel:
    """An adapter of which every term counts."""
    return get_peft_model(load_model(folder, kind), tiny_config(init_lora_weights=False, **options))


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in trained_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@KINDS
def test_from_attaching_to_generating(kind, method, folder, tmp_path):
    """What README's first lines do, on a quantised base."""
    base = load_model(folder, kind)
    before = logits(base)
    model = get_peft_model(base, tiny_config(**method))
    assert relative_error(logits(model), before) <= TOLERANCE[kind]
    losses = [train_step(model) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.3
    trained = logits(model)
    assert relative_error(trained, before) > 0.05
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_model(folder, kind), tmp_path)
    assert torch.equal(logits(loaded), trained)
    prompt = {"input_ids": tokens(1, 4), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**prompt), model.eval().generate(**prompt))
    with model.disable_adapter():
        assert torch.equal(logits(model), before), "training changed nothing of the base"
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@KINDS
def test_folded_models_train_as_literal_ones(kind, method, folder):
    found = {}
    model = adapted(folder, kind, **method)
    for fold in ("always", "never"):
        for layer in model.modules():
            if isinstance(layer, RoutedLayer):
                layer.active_config().fold = fold
        found[fold] = gradients(model)
    assert found["always"].keys() == found["never"].keys()
    off = {name: relative_error(g, found["never"][name]) for name, g in found["always"].items()}
    assert max(off.values()) <= 1e-4, off  # rounding through two layers of attention; one layer's is held to 1e-5


@pytest.mark.parametrize("kind", ["nf4", "nf4 in bf16 storage", "int8"])
def test_prepared_for_kbit_training_with_checkpointing(kind, folder):
    """As QLoRA's recipe has it: norms in fp32, inputs with a gradient, layers run again in the backward pass."""
    prepared = prepare_model_for_kbit_training(
        load_model(folder, kind), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model, plain = get_peft_model(prepared, tiny_config(init_lora_weights=False)), adapted(folder, kind)
    with torch.no_grad():
        for name, parameter in trained_parameters(plain).items():
            parameter.copy_(trained_parameters(model)[name])
    found, expected = gradients(model), gradients(plain)
    off = {name: relative_error(found[name], gradient) for name, gradient in expected.items()}
    assert max(off.values()) <= 1e-5, off


def test_kbit_preparation_at_its_default_is_told_what_to_pass(folder):
    """Reentrant checkpointing is its default, and runs layers without a gradient for the routers."""
    model = get_peft_model(prepare_model_for_kbit_training(load_model(folder, "nf4")), tiny_config())
    with pytest.raises(RuntimeError, match=r"gradient_checkpointing_kwargs=\{'use_reentrant': False\}"):
        train_step(model)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_modules_to_save(kind, folder, tmp_path):
    model = adapted(folder, kind, modules_to_save=["lm_head"])
    train_step(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load_model(folder, kind), tmp_path)), trained)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_an_adapter_trained_on_a_quantised_base_is_converted(kind, folder, tmp_path):
    """``graphmoe convert`` reads no base: what was trained on 4 bits becomes PEFT's own LoRA, which merges there."""
    model = adapted(folder, kind, method="lora", num_experts=None)
    model.save_pretrained(tmp_path / "ours")
    to_moe_peft(read_adapter(tmp_path / "ours"), tmp_path / "lora")
    lora = PeftModel.from_pretrained(load_model(folder, kind), tmp_path / "lora")
    assert lora.peft_config["default"].peft_type == "LORA"
    assert relative_error(logits(lora), logits(model)) <= TOLERANCE[kind]


# --- a base that passes no gradient ----------------------------------------------------------------------------------

REFUSED = r"self_attn.q_proj \(a Linear with a weight of type Int8Tensor\) passes no gradient to its input"


@pytest.mark.parametrize("targets", [None, ["mlp"]], ids=str)
def test_a_base_without_gradient_is_refused_when_attaching(targets, folder):
    """Also where the linears that pass none are not adapted: the layers in front of them would train wrongly."""
    base = load_model(folder, "torchao int8 dynamic")
    before = logits(base)
    with pytest.raises(TypeError, match=rf"{REFUSED}.*without is_trainable=True"):
        get_peft_model(base, tiny_config(target_modules=targets))
    assert not any(isinstance(module, RoutedLayer) for module in base.modules())
    assert torch.equal(logits(base), before)


def test_an_adapter_for_evaluation_loads_on_a_base_without_gradient(folder, tmp_path):
    """Trained on weights, evaluated with rounded inputs; training it on is refused."""
    model = adapted(folder, "torchao int8")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_model(folder, "torchao int8 dynamic"), tmp_path)
    assert relative_error(logits(loaded), logits(model)) < 0.1
    with pytest.raises(TypeError, match=REFUSED):
        PeftModel.from_pretrained(load_model(folder, "torchao int8 dynamic"), tmp_path, is_trainable=True)


def test_a_config_for_inference_asks_for_no_gradient(folder):
    config: GraphMoEConfig = tiny_config(inference_mode=True)
    model = get_peft_model(load_model(folder, "torchao int8 dynamic"), config)
    assert logits(model).isfinite().all()

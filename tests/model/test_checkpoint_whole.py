"""An adapter is saved whole or not at all, whatever wraps its modules; here without other processes.

Tensors that are spread over processes are tested in tests/distributed/test_saving.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from graphmoe_model import collect_routing
from tests.model.adapter_folders import CONFIG, WEIGHTS, contents
from tests.model.loaders import LOADERS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model, tokens

BESIDE = {"modules_to_save": ["input_layernorm"], "trainable_token_indices": [3, 5]}


def model_with(**options) -> PeftModel:
    """An adapter that changes the output, with a norm in every decoder layer and two embeddings trained beside it."""
    torch.manual_seed(1)
    model = tiny_peft_model(init_lora_weights=False, use_dora=True, rounds=2, **{**BESIDE, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.3)
    return model


def wrap_layers(model: PeftModel, wrap) -> None:
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(list(layers)):
        layers[index] = wrap(layer)


def wrap_mlps(model: PeftModel, wrap) -> None:
    for layer in model.get_base_model().model.layers:
        layer.mlp = wrap(layer.mlp)


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "checkpointed layers": (wrap_layers, checkpoint_wrapper),
    "checkpointed MLPs": (wrap_mlps, checkpoint_wrapper),
    "offloaded and checkpointed": (wrap_layers, lambda layer: offload_wrapper(checkpoint_wrapper(layer))),
    "compiled layers": (wrap_layers, compiled),
    "compiled MLPs": (wrap_mlps, compiled),
    "checkpointed and compiled": (wrap_layers, lambda layer: compiled(checkpoint_wrapper(layer))),
}


@pytest.mark.parametrize("where, wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_modules_are_saved_and_loaded_by_their_plain_names(where, wrapper, tmp_path):
    """Of a model whose layers FSDP's activation checkpointing wraps, nothing was saved, without a word."""
    model = model_with()
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain")
    where(model, wrapper)
    model.save_pretrained(tmp_path / "wrapped")
    plain, wrapped = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "wrapped"))
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(str(tmp_path / "wrapped"), "default")
    with torch.compiler.set_stance("force_eager"):  # it is the names that are tested
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "wrapped")), expected)


@pytest.mark.parametrize("where", [wrap_layers, wrap_mlps])
def test_wrapped_layers_keep_their_names_in_statistics(where):
    model = model_with().eval()
    where(model, checkpoint_wrapper)
    with collect_routing(model) as routing, torch.no_grad():
        model.base_model.model(input_ids=tokens(), use_cache=False)
    assert [*routing.load()] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_state_dict_with_the_names_of_wrappers_is_taken(tmp_path):
    """As DistributedDataParallel and a compiled model give it; also to PEFT's own function."""
    model = model_with()
    state = model.state_dict()
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module."):
        model.save_pretrained(tmp_path / prefix, state_dict={prefix + name: t for name, t in state.items()})
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / prefix)), logits(model))
    assert (
        peft.get_peft_model_state_dict(torch.compile(model), unwrap_compiled=True).keys()
        == load_file(tmp_path / "module." / WEIGHTS).keys()
    )


def test_what_a_wrapped_model_lacks_is_noticed_when_loading(tmp_path):
    """With PEFT's prefixes of wrapped modules, no tensor was missing from any checkpoint."""
    model = model_with(modules_to_save=None, trainable_token_indices=None)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state.pop("base_model.model.model.layers.0.mlp.lora_graphmoe.router.weight")
    wrap_layers(model, checkpoint_wrapper)
    with pytest.raises(ValueError, match=r"layers.0.mlp.lora_graphmoe.default.router.weight: missing from the checkp"):
        peft.set_peft_model_state_dict(model, state)


ROUTER = "base_model.model.model.layers.1.mlp.lora_graphmoe.default.router.weight"
NORM = "base_model.model.model.layers.1.input_layernorm.modules_to_save.default.weight"
NOT_WHOLE = {
    "nothing": (
        lambda state: {},
        r"of \d+ tensors are not in the state dict: .* and \d+ more\. .*empty: gathered",
    ),
    "one missing": (
        lambda state: without(state, ROUTER),
        rf"1 of \d+ tensors are not in the state dict: {ROUTER}\. A",
    ),
    "a module beside it missing": (lambda state: without(state, NORM), rf"1 of \d+ tensors are not in .*{NORM}"),
    "empty": (lambda state: {**state, ROUTER: torch.empty(0)}, r"1 of \d+ tensors are of another shape .* \(\[0\]\)"),
    "a part": (lambda state: {**state, ROUTER: state[ROUTER][:2]}, r"of another shape than in the model \(\[2, 32\]"),
    "no data": (
        lambda state: {**state, ROUTER: state[ROUTER].to("meta")},
        r"without data \(meta device\): .* device",
    ),
}


def without(state: dict, name: str) -> dict:
    return {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("change, message", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_what_is_not_whole_is_refused_and_leaves_what_was_there(change, message, safe_serialization, tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.lora_graphmoe["default"].router.weight.add_(1)
    state = change(model.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)'default' was not saved, and one that was there stays.*" + message):
        model.save_pretrained(tmp_path, state_dict=state, safe_serialization=safe_serialization)
    assert contents(tmp_path) == before
    assert not model.peft_config["default"].inference_mode


def test_a_second_adapter_that_is_not_whole_keeps_the_first_from_being_saved(tmp_path):
    model = model_with(modules_to_save=None, trainable_token_indices=None)
    model.add_adapter("other", tiny_config())
    name = ROUTER.replace(".default.", ".other.")
    with pytest.raises(RuntimeError, match="'other' was not saved"):
        model.save_pretrained(tmp_path / "new", state_dict=without(model.state_dict(), name))
    assert not (tmp_path / "new").exists()


def test_a_frozen_adapter_that_a_state_dict_of_trained_tensors_lacks_is_named(tmp_path):
    """Trainer gathers trained tensors alone under ZeRO-3, and saves all adapters: a frozen reference is not there."""
    model = model_with(modules_to_save=None, trainable_token_indices=None)
    model.add_adapter("reference", tiny_config())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.warns(UserWarning, match=r"saved without the adapters 'reference': they are frozen"):
        model.save_pretrained(tmp_path, state_dict=trained)
    assert not (tmp_path / "reference").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    with pytest.raises(RuntimeError, match=r"'reference' was not saved.*selected_adapters=\['default'\]"):
        model.save_pretrained(tmp_path, state_dict=trained, selected_adapters=["default", "reference"])


def test_only_the_main_process_writes(tmp_path):
    model_with().save_pretrained(tmp_path / "adapter", is_main_process=False, state_dict={})
    model_with().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_transformers_own_save_is_whole_too(tmp_path):
    """Of a model with an adapter but without a PeftModel."""
    model = tiny_model()
    model.add_adapter(tiny_config(init_lora_weights=False))
    expected = logits(model)
    wrap_layers_of = model.model.layers
    for index, layer in enumerate(list(wrap_layers_of)):
        wrap_layers_of[index] = checkpoint_wrapper(layer)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    with pytest.raises(RuntimeError, match="tensors are not in the state dict"):
        model.save_pretrained(tmp_path / "new", state_dict={})
    assert not (tmp_path / "new" / WEIGHTS).exists()


@pytest.mark.parametrize("text", ['{"peft_type": "GRAPH', "", "[]"], ids=["cut off", "empty", "a list"])
@pytest.mark.parametrize("loader", ["PeftModel", "AutoModel.load_adapter"])
def test_a_damaged_configuration_is_named(loader, text, tmp_path):
    """It was a bare JSONDecodeError; the weights say whose it is."""
    tiny_model().save_pretrained(tmp_path)
    tiny_peft_model().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=rf"{CONFIG} \({len(text)} bytes\) holds no JSON object: it is cut off or dam"):
        LOADERS[loader](tmp_path)

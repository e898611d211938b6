"""What convert writes, a loader loads: configurations and tensors that belong to no model are refused when read."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from graphmoe_model.conversion import from_moe_peft, read_adapter, write_adapter
from tests.model.peer_format import peer_settings, peer_tensors, write_peer
from tests.model.tiny_models import logits, tiny_model, tiny_peft_model

pytestmark = pytest.mark.methods

SAFETENSORS = "adapter_model.safetensors"
MLP = "base_model.model.model.layers.1.mlp.lora_graphmoe"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_peft_model(target_modules=["mlp", "q_proj"]).save_pretrained(folder)
    return folder


def changed(saved: Path, folder: Path, settings: dict | None = None, rename: tuple[str, str] | None = None) -> Path:
    """A copy of the saved adapter with other settings, and other names of tensors."""
    folder.mkdir()
    config = json.loads((saved / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(saved / SAFETENSORS)
    save_file({name.replace(*rename) if rename else name: t for name, t in tensors.items()}, folder / SAFETENSORS)
    return folder


UNLOADABLE = {
    "a pattern that selects nothing": ({"target_modules": "x"}, None, "(target_modules='x', .* does not select .*mlp"),
    "a part of the modules": ({"target_modules": ["mlp"]}, None, r"does not select model.layers.0.self_attn.q_proj, "),
    "a module without tensors": (
        {"target_modules": ["mlp", "q_proj", "k_proj"]},
        None,
        "k_proj: in target_modules, but it has no tensors",
    ),
    "another layer": ({"layers_to_transform": [5]}, None, "does not select model.layers.0.*\n- layer 5: in layers_to_"),
    "one layer of two": ({"layers_to_transform": 0}, None, "does not select model.layers.1.mlp, .*layers.1.self_attn"),
    "excluded": ({"exclude_modules": ["mlp"]}, None, "does not select model.layers.0.mlp, model.layers.1.mlp"),
    "other digits": (None, (".layers.1.", ".layers.\u0663."), "layers.\u0663.mlp: '\u0663' is no number of a layer"),
    "a leading zero": (None, (".layers.1.", ".layers.01."), "model.layers.01.mlp: '01' is no number of a layer"),
    "10^30 layers": (None, (".layers.1.", f".layers.1{'0' * 30}."), f"'1{'0' * 30}' is no number of a layer"),
    "numbers by layer": ({"num_experts": [4, 3]}, None, r"num_experts=\[4, 3\] gives other numbers .*: 4 in model.lay"),
    "fewer layers in the list": ({"num_experts": [4]}, None, r"num_experts=\[4\] gives other numbers than the tensors"),
    "numbers by pattern": ({"num_experts": "3-4"}, None, "num_experts='3-4' gives other numbers than the tensors have"),
    "a pattern of no model": ({"num_experts": "3-5-4"}, None, "num_experts='3-5-4' gives other numbers"),
}


@pytest.mark.parametrize("case", UNLOADABLE)
def test_an_adapter_that_nothing_loads_is_refused(case, saved, tmp_path):
    """The check would come too late in the loader: the source may be gone by then."""
    settings, rename, message = UNLOADABLE[case]
    folder = changed(saved, tmp_path / "source", settings, rename)
    with pytest.raises(ValueError, match=f"(?s)is not whole.*{message}" if message[0] != "(" else f"(?s){message[1:]}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": [4, 4]},
        {"num_experts": [4, 4, 8]},
        {"num_experts": "4-8"},
        {"target_modules": None},
        {"target_modules": r".*\\.(mlp|q_proj)"},
        {"layers_to_transform": [0, 1]},
    ],
    ids=str,
)
def test_every_form_that_some_model_has_is_read(settings, saved, tmp_path):
    """A third layer without an adapter, or a model of more layers, may be what the numbers are for."""
    settings = json.loads(json.dumps(settings).replace("\\\\\\\\", "\\\\"))
    read_adapter(changed(saved, tmp_path / "source", settings))


def test_a_changed_adapter_is_checked_when_it_is_written(saved, tmp_path):
    adapter = read_adapter(saved)
    config = dataclasses.replace(adapter.config, layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"does not select model\.layers\.0\.mlp"):
        write_adapter(dataclasses.replace(adapter, config=config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_adapter(adapter, tmp_path / "out")
    assert torch.equal(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "out")),
        logits(PeftModel.from_pretrained(tiny_model(), saved)),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_converted(bad, saved, tmp_path):
    """They would compute NaN in the new format too, where nobody looks for the training run that diverged."""
    tensors = load_file(saved / SAFETENSORS)
    tensors[f"{MLP}.router.weight"][2, 3] = bad
    folder = changed(saved, tmp_path / "ours")
    save_file(tensors, folder / SAFETENSORS)
    with pytest.raises(ValueError, match=rf"NaN or infinite values in {MLP}\.router\.weight: training has diverged"):
        read_adapter(folder)
    settings = peer_settings("MOLA")
    theirs = {name: t.fill_(bad) if "experts.1." in name else t for name, t in peer_tensors(settings).items()}
    with pytest.raises(ValueError, match=r"NaN or infinite values in mola\.layers\.0.* and 20 more: training"):
        from_moe_peft(write_peer(tmp_path / "theirs", settings, theirs))


def test_tensors_without_elements_are_refused(tmp_path):
    """A projection may have any size in one layer, but for none."""
    settings = peer_settings("LORA")
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    tensors = peer_tensors(settings) | {name: torch.zeros(0, 4)}
    with pytest.raises(ValueError, match=r"k_proj\.lora_B\.weight: \[0, 4\], which holds nothing"):
        from_moe_peft(write_peer(tmp_path, settings, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression"),
        ({"target_modules": 3}, "target_modules must be a regular expression, or a list of module names, got 3"),
        ({"rank_pattern": 3}, "rank_pattern must be a dict .* got 3"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern must be a dict .* got \['q_proj'\]"),
        ({"layers_to_transform": "01"}, "layers_to_transform must be a layer's index .* got '01'"),
        ({"modules_to_save": 3}, "modules_to_save must be a list of module names"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a model's name or null, got 3"),
        ({"r": "4"}, "r must be an integer of at least 1, got '4'"),
        ({"r": 10**18}, "r must be at most 65536"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
    ],
)
def test_settings_of_lora_that_are_of_another_type(changes, message, tmp_path):
    """One line, where PEFT's own configuration class would fail somewhere inside or accept them."""
    settings = peer_settings("LORA")
    with pytest.raises(ValueError, match=message):
        from_moe_peft(write_peer(tmp_path, {**settings, **changes}, peer_tensors(settings)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "x"}, "lora_alpha must be a number that is positive, got 'x'"),
        ({"num_experts": True}, "num_experts must be a whole number, got True"),
        ({"lora_dropout": []}, r"lora_dropout must be a number that is in \[0, 1\), got \[\]"),
        ({"router_aux_loss_coef": True}, "router_aux_loss_coef must be a number, got True"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be a model's name or null"),
        ({"expert_lora": {"r": "3"}}, r"rank_pattern\['mlp'\] must be an integer of at least 1, got '3'"),
    ],
)
def test_settings_of_mixtures_that_are_of_another_type(changes, message, tmp_path):
    settings = peer_settings("MIXLORA")
    with pytest.raises(ValueError, match=message):
        from_moe_peft(write_peer(tmp_path, {**settings, **changes}, peer_tensors(settings)))

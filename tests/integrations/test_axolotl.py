"""The plugin for Axolotl: what it declares, attaches, loads, refuses, and what of it reaches the training loss.

Where Axolotl imports, these run against it (0.19.0 was tried). Where it does not, they run against
`tests.integrations.stand_in`, which has the names of 0.19.0 that the plugin uses and none of Axolotl's own checks;
`test_axolotl_package.py` has what only the real package can show.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model

from graphmoe_model import RouterLossCallback, router_loss
from tests.integrations.configurations import BLOCK, FOLDER, KEYS, ROOT, parsed
from tests.model.tiny_models import logits, tiny_model, tokens, train_step


def test_the_adapter_is_declared(plugin):
    """Without it Axolotl refuses `adapter: graphmoe`; as lora_like it would be made plain LoRA."""
    (own,) = plugin.get_adapter_capabilities()
    assert (own.name, own.lora_like, own.relora) == ("graphmoe", False, False)


@pytest.mark.parametrize(
    "title, block, keys",
    [
        ("GraphMoE(MixLoRA)", {"rounds": 2, "router_aux_loss_coef": "2e-2", "top_k": None}, {"lora_dropout": 0.1}),
        ("MixLoRA", {"rounds": 1}, {"peft_use_rslora": True, "lora_rank_pattern": {"q_proj": 2}}),
        ("LoRAMoE", {"method": "loramoe", "rounds": 1}, {"lora_target_modules": ["mlp"]}),
        ("MoLA", {"method": "mola", "rounds": 1, "num_experts": "2-4"}, {"peft_layers_to_transform": [0]}),
        ("GraphMoE(MixDoRA)", {}, {"peft_use_dora": True, "peft_ensure_weight_tying": True}),
    ],
)
def test_a_yaml_file_s_keys_are_the_adapter_s(package, plugin, check, title, block, keys):
    """A key that is read and dropped trains another model than the file describes."""
    check(graphmoe={**BLOCK, **block}, **keys)
    model, config = plugin.load_adapter(tiny_model(), parsed(graphmoe={**BLOCK, **block}, **keys))
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"] is config
    own = config.to_dict() | {"title": config.title}
    fields = sys.modules["graphmoe_axolotl.settings"].LORA_KEYS
    asked = {**KEYS, **keys, **{name: v for name, v in {**BLOCK, **block}.items() if v is not None}}
    wanted = {fields.get(k, k): float(v) if v == "2e-2" else v for k, v in asked.items()} | {"title": title}
    found = {k: sorted(v) if isinstance(v := own[k], set) else v for k in wanted if k not in ("adapter", "graphmoe")}
    assert found == {k: wanted[k] for k in found}
    assert config.task_type == "CAUSAL_LM"
    assert config.top_k == (4 if title == "LoRAMoE" else 2)


def test_other_adapters_are_left_to_axolotl(plugin, check):
    assert plugin.load_adapter(tiny_model(), parsed(adapter="lora")) is None
    assert plugin.add_callbacks_pre_trainer(parsed(adapter="lora"), None) == []
    with pytest.raises(ValueError, match=r"block graphmoe: is there, but adapter is 'lora'.*leave the block out"):
        check(adapter="lora")


def test_the_configuration_alone_for_trl(plugin):
    model, config = plugin.load_adapter(tiny_model(), parsed(), config_only=True)
    assert model is None
    assert config.rounds == 3


@pytest.mark.parametrize(
    "block, message",
    [
        ({"round": 2}, r"graphmoe\.round does not exist; did you mean rounds\?"),
        ({"experts_per_moon": 2}, r"graphmoe\.experts_per_moon does not exist.*num_experts, top_k, rounds"),
        ({"r": 2}, r"graphmoe\.r has another place: write lora_r beside the block"),
        ({"lora_r": 2}, r"graphmoe\.lora_r has another place: write lora_r beside the block"),
        ({"rounds": 0}, r"rounds must be .*got 0 \(in the YAML file rounds is graphmoe\.rounds\)"),
        ({"rounds": "three"}, r"rounds must be .*'three'"),
        ({"router_aux_loss_coef": "little"}, r"router_aux_loss_coef must be .*'little'"),
        ({"method": "moe"}, r"method.*'moe'.*'mixlora'"),
        ({"top_k": 5}, r"top_k=5 exceeds num_experts=4.*top_k is graphmoe\.top_k"),
    ],
)
def test_an_option_that_does_not_fit_is_named(check, block, message):
    """A misspelt option would train with a default, and nobody would know."""
    with pytest.raises(ValueError, match=message):
        check(graphmoe={**BLOCK, **block})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"lora_r": 0}, r"r must be .*got 0 \(in the YAML file r is lora_r\)"),
        ({"lora_fan_in_fan_out": True}, r"fan_in_fan_out=True.*is lora_fan_in_fan_out"),
        ({"lora_target_parameters": ["experts"]}, r"target_parameters=.*is lora_target_parameters"),
        ({"peft_init_lora_weights": "pissa"}, r"init_lora_weights='pissa'.*is peft_init_lora_weights"),
        ({"lora_target_linear": True}, r"lora_target_linear=True does not work with adapter: graphmoe.*leave it out"),
        ({"load_in_4bit": True}, r"load_in_4bit=True .*leave it out"),
        ({"load_in_8bit": True}, r"load_in_8bit=True .*leave it out"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, r"peft=.*loftq_config"),
        ({"lora_mlp_kernel": True}, r"lora_mlp_kernel=True .*without experts; leave it out"),
        ({"lora_on_cpu": True}, r"lora_on_cpu=True .*leave it out"),
        ({"merge_lora": True}, r"merge_lora=True .*load base and adapter by PEFT"),
        ({"rl": "dpo"}, r"rl: dpo does not work with the router loss.*set graphmoe\.router_aux_loss_coef: 0"),
        (
            {"rl": "dpo", "lora_model_dir": "a", "graphmoe": {"router_aux_loss_coef": 0}},
            r"lora_model_dir='a' would be ignored.*leave it out",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            r"gradient_checkpointing_kwargs=.*set use_reentrant: false, or graphmoe\.router_aux_loss_coef: 0",
        ),
    ],
)
def test_a_key_of_axolotl_s_that_does_not_fit_is_named(check, keys, message):
    """Axolotl would take these for its own LoRA and drop them here without a word."""
    with pytest.raises(ValueError, match=message):
        check(**keys)


@pytest.mark.parametrize("autocast, dtype", [(None, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_the_adapter_s_precision_is_the_file_s(plugin, autocast, dtype):
    """PEFT trains adapters in fp32 on a base in bf16 unless told otherwise, and so does Axolotl."""
    model, _ = plugin.load_adapter(tiny_model().bfloat16(), parsed(peft_autocast_adapter_dtype=autocast))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_names_that_select_no_mlp_are_refused_with_the_file_s_key(plugin):
    with pytest.raises(ValueError, match=r"selects no gated MLP.*target_modules is lora_target_modules"):
        plugin.load_adapter(tiny_model(), parsed(lora_target_modules=["q_proj", "v_proj"]))


def test_options_beside_their_block_are_refused(plugin):
    """Axolotl's schema drops what it does not know."""
    plugin.register({**KEYS, "learning_rate": 1e-4})
    for key in ("rounds", "graphmoe_rounds"):
        with pytest.raises(ValueError, match=f"{key}: Axolotl drops options here; write them in the block graphmoe:"):
            plugin.register({**KEYS, key: 2})
    plugin.register({"adapter": "lora", "rounds": 2})


def test_checkpointing_is_not_reentrant_unless_asked(check):
    """Axolotl's own default for adapters is, under which the router loss has no gradient."""
    found = check(gradient_checkpointing=True)
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}


def saved(plugin: Any, folder: Path) -> tuple[PeftModel, torch.Tensor]:
    model, _ = plugin.load_adapter(tiny_model(), parsed(lora_dropout=0.05))
    train_step(model)
    model.save_pretrained(folder)
    return model, logits(model)


def test_a_saved_adapter_is_gone_on_with(plugin, tmp_path):
    _, before = saved(plugin, tmp_path)
    for keys in ({"lora_r": None, "lora_alpha": None, "graphmoe": None}, {}, {"lora_dropout": 0.05}):
        model, config = plugin.load_adapter(tiny_model(), parsed(lora_model_dir=str(tmp_path), **keys))
        assert torch.equal(logits(model), before)
        assert config.lora_dropout == 0.05
        assert any(p.requires_grad for p in model.parameters())
    model, _ = plugin.load_adapter(tiny_model(), parsed(lora_model_dir=str(tmp_path)), inference=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_saved_adapter_of_another_kind_is_refused(plugin, tmp_path):
    saved(plugin, tmp_path / "own")
    other = parsed(lora_model_dir=str(tmp_path / "own"), lora_r=8, graphmoe={"num_experts": 8})
    with pytest.raises(ValueError, match=r"lora_r=8, saved 4; graphmoe\.num_experts=8, saved 4\. Leave these keys out"):
        plugin.load_adapter(tiny_model(), other)
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"lora_model_dir=.*of type .*LORA.*set adapter"):
        plugin.load_adapter(tiny_model(), parsed(lora_model_dir=str(tmp_path / "lora")))


def test_a_trained_adapter_loads_by_peft_in_another_process(plugin, tmp_path):
    """Without the plugin and without Axolotl: what is saved is an adapter as any other of this package."""
    _, before = saved(plugin, tmp_path)
    torch.save(before, tmp_path / "logits.pt")
    code = f"""
import torch, graphmoe_model, sys
from peft import PeftModel
from tests.model.tiny_models import logits, tiny_model
model = PeftModel.from_pretrained(tiny_model(), {str(tmp_path)!r})
assert torch.equal(logits(model), torch.load({str(tmp_path / "logits.pt")!r}))
assert not any("axolotl" in name for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_the_router_loss_is_in_the_training_loss(plugin):
    """The adapter's own coefficient times Eq. 8, and nothing of it with 0; the log gets it by a callback."""
    losses = {}
    for coefficient in (0.0, 0.5):
        config = parsed(graphmoe={**BLOCK, "router_aux_loss_coef": coefficient})
        torch.manual_seed(0)
        model, _ = plugin.load_adapter(tiny_model(), config)
        callbacks = plugin.add_callbacks_pre_trainer(config, model)
        assert [type(own) for own in callbacks] == [RouterLossCallback] * (coefficient > 0)
        model.train()
        losses[coefficient] = model(input_ids=tokens(), labels=tokens()).loss.item()
    model(input_ids=tokens())
    assert losses[0.5] - losses[0.0] == pytest.approx(router_loss(model).item(), rel=1e-4)
    assert losses[0.5] > losses[0.0]


def test_the_example_s_group_of_the_optimizer_is_the_grus(plugin):
    """Axolotl finds a group's parameters by a part of their names."""
    (group,) = yaml.safe_load((FOLDER / "graphmoe.yaml").read_text())["lr_groups"]
    model, _ = plugin.load_adapter(tiny_model(), parsed())
    names = {name for name, _ in model.named_parameters()}
    assert {n for n in names if any(part in n for part in group["modules"])} == {n for n in names if ".gru." in n}

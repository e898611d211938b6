"""Exported models: the logits of the PEFT model to the bit, without PEFT, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphmoe_inference import LoRALinear, RethinkingMLP, RoutedLinear, load_for_inference, read_export
from graphmoe_inference.folder import BASE, CONFIG
from graphmoe_kernels import register_activation
from graphmoe_model.exporting import export_for_inference
from graphmoe_tables.methods import METHODS, PRESETS
from tests.model.method_models import adapted, randomise
from tests.model.questions_made import byte_level
from tests.model.tiny_models import ARCHITECTURES, tiny_config, tiny_model, tokens

IDS = tokens(2, 9)
ROOT = Path(__file__).resolve().parents[2]


def routed(form: str = "graphmoe-mixlora", base: Any = None, **options: Any) -> PeftModel:
    """A model with an adapter in which every term counts."""
    torch.manual_seed(1)
    model = adapted(form, base or tiny_model(), **options)
    randomise(model)
    return model.eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("form", PRESETS)
def test_logits_are_those_of_the_peft_model_to_the_bit(form, tmp_path):
    """Every method, plain and with DoRA: prefill, one token, and a continuation by the cache."""
    model = routed(form)
    export_for_inference(model, tmp_path / "out")
    loaded = load_for_inference(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded, IDS[:1, :1]), logits(model, IDS[:1, :1]))
    given = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(**given), model.generate(**given))
    kinds = {type(module) for module in loaded.modules()} & {RethinkingMLP, LoRALinear, RoutedLinear}
    attention = {"lora": {LoRALinear}, "experts": {RoutedLinear}, None: set()}
    assert kinds == {RethinkingMLP} | attention[METHODS[PRESETS[form]["method"]].attention]
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind, tmp_path):
    """Fused gate and up, biases, other names, dropouts of the MLP itself."""
    model = routed(base=tiny_model(kind))
    export_for_inference(model, tmp_path / "out")
    assert torch.equal(logits(load_for_inference(tmp_path / "out")), logits(model))


def test_tied_embeddings_are_written_once(tmp_path):
    model = routed(base=tiny_model(tie_word_embeddings=True))
    export_for_inference(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / BASE / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert torch.equal(logits(load_for_inference(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("options", [{"fold": "never"}, {"candidate_input": "hidden_state"}, {"use_rslora": True}])
def test_settings_of_the_adapter_are_kept(options, tmp_path):
    model = routed(**options)
    export_for_inference(model, tmp_path / "out")
    assert torch.equal(logits(load_for_inference(tmp_path / "out")), logits(model))


def test_half_precision_and_a_base_of_another(tmp_path):
    """A bf16 base with its fp32 adapter to the bit; loaded in another dtype it runs in that one."""
    tiny_model().save_pretrained(tmp_path / "base")
    for form in ("graphmoe-mixdora", "graphmoe-mola"):
        # Loaded in bf16, as users do: `.to` would round the rotary frequencies too, which no file holds.
        model = routed(form, AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
        export_for_inference(model, tmp_path / form)
        loaded = load_for_inference(tmp_path / form)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(model))
        wide = load_for_inference(tmp_path / form, dtype=torch.float32)
        assert logits(wide).dtype == torch.float32
        torch.testing.assert_close(logits(wide), logits(model).float(), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_base_that_was_cast_after_loading(dtypes, tmp_path):
    """Its configuration names the dtype before, and loading would cast the weights to that one."""
    before, after = dtypes
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=before).to(after)
    torch.manual_seed(2)
    for parameter in base.parameters():  # no bf16 number holds these
        torch.nn.init.normal_(parameter, std=0.05)
    base.model.rotary_emb.inv_freq.data = base.model.rotary_emb.original_inv_freq.float()
    model = routed(base=base)
    export_for_inference(model, tmp_path / "out")
    loaded = load_for_inference(tmp_path / "out")
    assert loaded.dtype == after
    state = {name: own for name, own in base.state_dict().items() if "norm" in name}
    assert all(torch.equal(loaded.state_dict()[name], own) for name, own in state.items())
    assert len(state) == 5
    if after == torch.float32:
        assert torch.equal(logits(loaded), logits(model))


def test_some_layers_and_linears_alone(tmp_path):
    """What an adapter is not on stays the base's, and the adapter that is active is the one that is written."""
    model = routed(layers_to_transform=[1], target_modules=["mlp", "q_proj"])
    model.add_adapter("other", tiny_config(rounds=1, init_lora_weights=False))
    exported = export_for_inference(model, tmp_path / "one")
    assert list(exported.mlps) == ["model.layers.1.mlp"]
    assert list(exported.linears) == ["model.layers.1.self_attn.q_proj"]
    assert torch.equal(logits(load_for_inference(tmp_path / "one")), logits(model))
    model.set_adapter("other")
    exported = export_for_inference(model, tmp_path / "two")
    assert (exported.title, len(exported.mlps)) == ("MixLoRA", 2)
    assert torch.equal(logits(load_for_inference(tmp_path / "two")), logits(model))


def test_the_model_stays_as_it_was(tmp_path):
    model = routed()
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    export_for_inference(model, tmp_path / "out")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_folds_are_computed_when_it_is_loaded(tmp_path, monkeypatch):
    """And not in the first forward, whose user waits."""
    export_for_inference(routed(), tmp_path / "out")
    loaded = load_for_inference(tmp_path / "out")
    for module in loaded.modules():
        if isinstance(module, RethinkingMLP):
            assert module._fold.fold is not None
            monkeypatch.setattr(module._fold, "build", lambda *_, **__: pytest.fail("built again"))
    logits(loaded)


WITHOUT_PEFT = """
import sys

if sys.argv[2] == "hidden":
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
    sys.modules["peft"] = None
import torch
from transformers import AutoTokenizer
from graphmoe_inference import load_for_inference

model = load_for_inference(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/base")
inputs = tokenizer("the river grows", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist())
loaded = {name for name in ("peft", "graphmoe_model") if sys.modules.get(name) is not None}
assert not loaded, loaded
"""


@pytest.mark.parametrize("peft", ["hidden", "installed"])
def test_it_generates_without_peft(peft, tmp_path):
    """In a process where there is none, and in one that has it and never loads it."""
    tokenizer = byte_level()
    model = routed(base=tiny_model(vocab_size=len(tokenizer)))
    export_for_inference(model, tmp_path / "out", tokenizer)
    command = [sys.executable, "-c", WITHOUT_PEFT, str(tmp_path / "out"), peft]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    inputs = tokenizer("the river grows", return_tensors="pt")
    own = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert json.loads(done.stdout) == own[0].tolist()


def test_nothing_takes_the_folder_for_the_base_alone(tmp_path):
    """Transformers would else load it, without the adapter and without a word."""
    export_for_inference(routed(), tmp_path / "out")
    with pytest.raises((ValueError, KeyError), match="graphmoe"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises((ValueError, OSError, KeyError)):
        AutoTokenizer.from_pretrained(tmp_path / "out")


def test_servers_find_tokenizer_and_generation_settings_in_the_folder_itself(tmp_path):
    """vLLM looks nowhere else, and without the second it would stop at other tokens than the base."""
    tokenizer = byte_level()
    model = routed(base=tiny_model(vocab_size=len(tokenizer)))
    model.get_base_model().generation_config.eos_token_id = [2, 5]
    export_for_inference(model, tmp_path / "out", tokenizer)
    for folder in (tmp_path / "out", tmp_path / "out" / BASE):
        assert (folder / "tokenizer.json").is_file()
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    with pytest.raises((ValueError, KeyError), match="graphmoe"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def other_activation() -> Any:
    """A model whose MLPs hold an activation that was registered."""
    register_activation("exported_wave", wave, lambda x: 1 + torch.cos(x) / 2)
    model = tiny_model()
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = wave
    return model


def wave(x: torch.Tensor) -> torch.Tensor:
    return x + torch.sin(x) / 2


def test_a_registered_activation_is_exported_by_its_name(tmp_path):
    model = routed(base=other_activation())
    exported = export_for_inference(model, tmp_path / "out")
    assert exported.mlps["model.layers.0.mlp"].activation == "exported_wave"
    assert torch.equal(logits(load_for_inference(tmp_path / "out")), logits(model))


@pytest.fixture
def exported(tmp_path) -> Path:
    export_for_inference(routed(), tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_says_by_what(exported):
    found = read_export(exported)
    assert found.title == "GraphMoE(MixLoRA)"
    assert {"graphmoe", "torch", "transformers", "peft"} == set(found.made_by)
    assert json.loads((exported / CONFIG).read_text())["base_config"]["model_type"] == "llama"

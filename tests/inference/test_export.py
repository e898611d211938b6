"""Exported models: the logits of the PEFT model to the bit, without PEFT, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphmoe_inference import LoRALinear, RethinkingMLP, RoutedLinear, load_for_inference, read_export
from graphmoe_inference.folder import BASE, CONFIG, WEIGHTS
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


def full(tmp_path: Path) -> PeftModel:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    return routed()


def nowhere(_: Path) -> PeftModel:
    """As offloading leaves it."""
    model = routed()
    norm = model.base_model.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"))
    return model


def scaled(tmp_path: Path) -> PeftModel:
    model = routed()
    model.base_model.model.model.layers[0].mlp.set_scale("default", 0.5)
    return model


REFUSED = {
    "a base": (lambda _: tiny_model(), TypeError, "expected a PeftModel with a GraphMoE adapter, got LlamaForCausalLM"),
    "PEFT's LoRA": (
        lambda _: get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
        TypeError,
        "is of LoraConfig, not of GraphMoE",
    ),
    "another scale": (scaled, ValueError, r"layers\.0\.mlp counts 0\.5 times what it was trained with"),
    "no weights": (nowhere, ValueError, r"model\.norm\.weight holds no whole weight here"),
    "a full folder": (full, ValueError, "is there already; name a new folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(case, tmp_path):
    make, kind, message = REFUSED[case]
    model = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message):
        export_for_inference(model, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    """A folder that is there is whole."""

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphmoe_model.exporting.export.save_file", full_disk)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        export_for_inference(routed(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exported(tmp_path) -> Path:
    export_for_inference(routed(), tmp_path / "out")
    return tmp_path / "out"


def damage(folder: Path, change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


BROKEN = {
    "no folder": (lambda f: None, "nowhere", "there is no folder"),
    "an adapter": (lambda f: (f / "adapter_config.json").touch(), "", "is an adapter; graphmoe export makes"),
    "another model": (lambda f: damage(f, lambda c: c.pop("graphmoe")), "", "is no model that graphmoe export wrote"),
    "no description": (lambda f: (f / CONFIG).write_text("{"), "", "is no model that graphmoe export wrote"),
    "a newer format": (lambda f: damage(f, lambda c: c["graphmoe"].update(format=2)), "", "is of format 2, and this"),
    "a field less": (lambda f: damage(f, lambda c: c["graphmoe"].pop("rounds")), "", "is damaged: .*rounds"),
    "other weights": (lambda f: (f / WEIGHTS).write_bytes(b"x"), "", "is not the file that config.json describes"),
    "no base": (lambda f: (f / BASE / "config.json").unlink(), "", "base holds no model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_folders_are_named(case, exported):
    change, name, message = BROKEN[case]
    change(exported)
    with pytest.raises(ValueError, match=message):
        load_for_inference(exported / name if name else exported)


def test_modules_and_tensors_that_do_not_fit_are_named(exported):
    def renamed(config: Any) -> None:
        mlps = config["graphmoe"]["mlps"]
        mlps["model.layers.7.mlp"] = mlps.pop("model.layers.1.mlp")

    damage(exported, renamed)
    with pytest.raises(ValueError, match=r"has the tensor model\.layers\.1\.mlp\.\S+, which is of no module"):
        load_for_inference(exported)


def test_what_was_written_says_by_what(exported):
    found = read_export(exported)
    assert found.title == "GraphMoE(MixLoRA)"
    assert {"graphmoe", "torch", "transformers", "peft"} == set(found.made_by)
    assert json.loads((exported / CONFIG).read_text())["base_config"]["model_type"] == "llama"

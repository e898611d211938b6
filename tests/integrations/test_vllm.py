"""Exported models in vLLM: found, loaded, their logits, and what is refused.

These run against `tests.integrations.vllm_stand_in`, which loads and calls models as vLLM 0.33.0 does and has none of
its kernels; `test_vllm_package.py` has what only the real package can show.
"""

from __future__ import annotations

import gc
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from graphmoe_inference import LoRALinear, RethinkingMLP, RoutedLinear, load_for_inference
from graphmoe_inference.folder import BASE, CONFIG, WEIGHTS
from graphmoe_model.exporting import export_for_inference
from tests.integrations import vllm_models
from tests.integrations.vllm_models import FOLDER, ROOT, STAND_IN, engine, loaded, logits
from tests.model.method_models import adapted, randomise
from tests.model.questions_made import byte_level
from tests.model.tiny_models import tiny_model, tokens

IDS = tokens(3, 9)
# Of logits up to ten and more. Both compute the same products; attention is put together in another order of sums.
CLOSE = {"atol": 2e-4, "rtol": 1e-5}


def exported(folder: Path, form: str = "graphmoe-mixlora", base: Any = None, **options: Any) -> Path:
    """A folder with an adapter in which every term counts."""
    torch.manual_seed(1)
    model = adapted(form, base or tiny_model(), **options)
    randomise(model)
    tokenizer = byte_level() if model.config.vocab_size > 64 else None
    export_for_inference(model.eval(), folder, tokenizer)
    return folder


@pytest.fixture
def vllm(monkeypatch):
    with vllm_models.stand_in(monkeypatch):
        yield


@torch.no_grad()
def own_logits(folder: Path) -> torch.Tensor:
    return load_for_inference(folder)(input_ids=IDS).logits


METHODS = ["lora", "dora", "mixlora", "mixdora", "graphmoe-mixlora", "graphmoe-mixdora", "loramoe", "graphmoe-doramoe"]
METHODS += ["mola", "moda", "graphmoe-mola"]


@pytest.mark.parametrize("form", METHODS)
def test_logits_are_those_of_the_exported_model(vllm, form, tmp_path):
    folder = exported(tmp_path / "out", form)
    model, settings = loaded(folder)
    own = own_logits(folder)
    torch.testing.assert_close(logits(model, settings, IDS), own, **CLOSE)
    base = AutoModelForCausalLM.from_pretrained(folder / BASE)
    assert (base(input_ids=IDS).logits - own).abs().max() > 0.1  # the adapter counts


@pytest.mark.parametrize("form", METHODS)
def test_layers_are_those_of_the_exported_model_to_the_bit(vllm, form, tmp_path):
    """Nothing is merged into a weight, where it would be rounded: the sums are in the order in which they were."""
    folder = exported(tmp_path / "out", form)
    model, _ = loaded(folder)
    own = load_for_inference(folder)
    kinds = (RethinkingMLP, LoRALinear, RoutedLinear)
    expected = [module for module in own.modules() if isinstance(module, kinds)]
    found = [module for module in model.modules() if isinstance(module, kinds)]
    assert sorted(type(m).__name__ for m in found) == sorted(type(m).__name__ for m in expected)
    for layer in range(2):
        theirs, ours = model.base.model.layers[layer], own.model.layers[layer]
        x = torch.randn(11, 32, generator=torch.Generator().manual_seed(layer))
        with torch.inference_mode():
            assert torch.equal(theirs.mlp.layer(x), ours.mlp(x))
            separate = [getattr(ours.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
            if hasattr(theirs.self_attn.qkv_proj, "layer"):
                assert torch.equal(theirs.self_attn.qkv_proj.layer(x), torch.cat(separate, dim=-1))
                assert torch.equal(theirs.self_attn.o_proj.layer(x), ours.self_attn.o_proj(x))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "phi3"])
def test_every_architecture(vllm, kind, tmp_path):
    """Biases of the attention, norms in it, files whose projections are fused."""
    folder = exported(tmp_path / "out", base=tiny_model(kind))
    model, settings = loaded(folder)
    torch.testing.assert_close(logits(model, settings, IDS), own_logits(folder), **CLOSE)


BASES = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"mlp_bias": True, "attention_bias": True},
}


@pytest.mark.parametrize("case", BASES)
def test_other_bases(vllm, case, tmp_path):
    folder = exported(tmp_path / "out", base=tiny_model(**BASES[case]))
    model, settings = loaded(folder)
    torch.testing.assert_close(logits(model, settings, IDS), own_logits(folder), **CLOSE)


def test_some_layers_and_linears_alone(vllm, tmp_path):
    folder = exported(tmp_path / "out", layers_to_transform=[1], target_modules=["mlp", "k_proj"])
    model, settings = loaded(folder)
    assert len([m for m in model.modules() if isinstance(m, RethinkingMLP | LoRALinear)]) == 2
    torch.testing.assert_close(logits(model, settings, IDS), own_logits(folder), **CLOSE)


def test_half_precision(vllm, tmp_path):
    """A bf16 base with its fp32 adapter: layers to the bit."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    folder = exported(tmp_path / "out", base=base)
    model, settings = loaded(folder)
    assert settings.model_config.dtype == torch.bfloat16
    own = load_for_inference(folder)
    x = torch.randn(11, 32).bfloat16()
    with torch.inference_mode():
        assert torch.equal(model.base.model.layers[0].mlp.layer(x), own.model.layers[0].mlp(x))
    assert logits(model, settings, IDS).dtype == torch.bfloat16


def test_folds_are_computed_when_it_is_loaded(vllm, tmp_path, monkeypatch):
    """A CUDA graph's capture computes none, and the first request waits for none."""
    model, settings = loaded(exported(tmp_path / "out"))
    for module in model.modules():
        if isinstance(module, RethinkingMLP):
            monkeypatch.setattr(module._fold, "build", lambda *_, **__: pytest.fail("built again"))
    logits(model, settings, IDS)


def test_compiled_graphs_see_one_operator(vllm, tmp_path):
    """vLLM compiles a model's layers in one graph, for any number of tokens."""
    model, settings = loaded(exported(tmp_path / "out"))
    mlp, x = model.base.model.layers[0].mlp, torch.randn(7, 32)
    gc.collect()  # the operator of an earlier test's plugin takes the name in torch.ops with it when it goes
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    context = sys.modules["vllm.forward_context"]
    compiled = torch.compile(mlp, backend=backend, fullgraph=True, dynamic=True)
    with context.set_forward_context([7], settings), torch.inference_mode():
        assert torch.equal(compiled(x), mlp(x))
        assert torch.equal(compiled(x[:3]), mlp(x[:3]))
    assert len(seen) == 1
    assert seen[0].startswith("graphmoe_vllm.layer")


def test_the_configuration_is_the_base_s_and_goes_to_other_processes(vllm, tmp_path):
    config = engine(exported(tmp_path / "out")).model_config.hf_config
    assert type(config) is LlamaConfig
    assert (config.architectures, config.num_key_value_heads) == (["GraphMoEForCausalLM"], 2)
    assert pickle.loads(pickle.dumps(config)).graphmoe["rounds"] == 3


def test_tokenizer_and_generation_settings_are_where_vllm_looks(vllm, tmp_path):
    """In the folder itself: without its generation_config.json vLLM stops at one of several end tokens alone."""
    base = tiny_model(vocab_size=len(byte_level()))
    base.generation_config.eos_token_id = [2, 5]
    folder = exported(tmp_path / "out", base=base)
    found = engine(folder).model_config.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(found)
    assert tokenizer("the river").input_ids == byte_level()("the river").input_ids
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 5]


def test_transformers_refuses_the_folder_where_the_plugin_is_registered(vllm, tmp_path):
    """It knows the model type then; it still finds no weights to load the base alone from."""
    folder = exported(tmp_path / "out")
    with pytest.raises(OSError, match="model"):
        AutoModelForCausalLM.from_pretrained(folder)


WITHOUT_PEFT = f"""
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("peft", "graphmoe_model") else find_spec(name, *rest)
sys.modules["peft"] = sys.modules["graphmoe_model"] = None
sys.path[:0] = [{str(STAND_IN)!r}, {str(FOLDER)!r}]
import torch, graphmoe_vllm
from vllm.config import ModelConfig, VllmConfig
graphmoe_vllm.register()
graphmoe_vllm.register()
assert "torch.cuda" not in sys.modules or not torch.cuda.is_initialized()
assert "graphmoe_vllm.model" not in sys.modules
from vllm.model_executor.model_loader import get_model
get_model(VllmConfig(ModelConfig(sys.argv[1])))
"""


def test_neither_peft_nor_the_training_package_is_imported(tmp_path):
    folder = exported(tmp_path / "out")
    command = [sys.executable, "-c", WITHOUT_PEFT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def changed(folder: Path, change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def without(folder: Path, name: str, lost: str) -> None:
    tensors = load_file(folder / name)
    del tensors[lost]
    save_file(tensors, folder / name)


def of_gemma(config: Any) -> None:
    config["base_config"] |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}


def quantised(config: Any) -> None:
    config["base_config"]["quantization_config"] = {"quant_method": "gptq"}


def on_the_head(config: Any) -> None:
    config["graphmoe"]["linears"]["lm_head"] = {"scale": 1.0, "num_experts": None}


def further_layer(config: Any) -> None:
    mlps = config["graphmoe"]["mlps"]
    mlps["model.layers.7.mlp"] = mlps["model.layers.1.mlp"]


REFUSED = {
    "another base": (lambda f: changed(f, of_gemma), {}, "the base is a GemmaForCausalLM .*types llama, mistral"),
    "a classifier": (
        lambda f: changed(f, lambda c: c["base_config"].update(architectures=["LlamaForSequenceClassification"])),
        {},
        "the base is a LlamaForSequenceClassification",
    ),
    "a quantised base": (lambda f: changed(f, quantised), {}, "the base is quantised .*export the adapter over"),
    "no exported model": (lambda f: changed(f, lambda c: c.pop("base_config")), {}, "has no base_config and graphmoe"),
    "other weights": (lambda f: (f / WEIGHTS).write_bytes(b"x"), {}, "is not the file that config.json describes"),
    "a newer format": (lambda f: changed(f, lambda c: c["graphmoe"].update(format=9)), {}, "is of format 9, and this"),
    "no such layer": (lambda f: changed(f, further_layer), {}, r"layers\.7\.mlp: .*no such module; export"),
    "lm_head": (lambda f: changed(f, on_the_head), {}, "has an adapter on lm_head.*load_for_inference"),
    "tensor parallel": (None, {"parallel": {"tensor_parallel_size": 2}}, "tensor_parallel_size is 2.*set it to 1"),
    "pipeline parallel": (None, {"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size is 2"),
    "quantisation": (None, {"quantization": "fp8"}, "quantization is 'fp8'.*leave --quantization out"),
    "vLLM's LoRA": (None, {"lora_config": object()}, "leave --enable-lora out"),
    "made-up weights": (None, {"load": {"load_format": "dummy"}}, "load_format is 'dummy'.*use auto"),
}


# Of linears that vLLM has as the base has them, and of those that it fuses, each part.
LINEARS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{name}_proj" for name in "qkvo")]


@pytest.mark.parametrize("linear", LINEARS)
def test_a_base_that_lacks_weights_is_not_served_from_what_memory_held(vllm, linear, tmp_path):
    folder, lost = exported(tmp_path / "out"), f"model.layers.1.{linear}.weight"
    without(folder, f"{BASE}/model.safetensors", lost)
    with pytest.raises(ValueError, match=re.escape(f"base lacks weights: ['{lost}']; export")):
        loaded(folder)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(vllm, case, tmp_path):
    change, engine_settings, message = REFUSED[case]
    folder = exported(tmp_path / "out")
    if change is not None:
        change(folder)
    with pytest.raises(ValueError, match=message):
        loaded(folder, **engine_settings)


def test_a_model_without_its_adapter_computes_nothing(vllm, tmp_path):
    """A loader that makes weights up would serve the base."""
    from graphmoe_vllm.model import GraphMoEForCausalLM

    model = GraphMoEForCausalLM(vllm_config=engine(exported(tmp_path / "out")))
    with pytest.raises(RuntimeError, match="weights were not loaded"):
        model(IDS[0], torch.arange(9))


def test_weights_are_loaded_once(vllm, tmp_path):
    """Later ones would go into the base's layers, which nothing reads."""
    model, _ = loaded(exported(tmp_path / "out"))
    with pytest.raises(RuntimeError, match="are loaded once"):
        model.load_weights([])

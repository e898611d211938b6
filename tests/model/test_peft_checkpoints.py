"""Saving and loading adapters: the same model from every loader, nothing loaded in part, nothing half-written."""

import json
import os
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graphmoe_model import GraphMoEConfig
from tests.model.loaders import LOADERS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model, train_step

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A base model's folder with a trained adapter of it in 'adapter', and the adapter's logits."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), tiny_config(init_lora_weights=False))
    train_step(model)
    model.save_pretrained(folder / "adapter")
    return folder, logits(model)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_saved_model(loader, saved):
    folder, expected = saved
    model = LOADERS[loader](folder)
    assert torch.equal(logits(model), expected)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert bool(trainable) == (loader == "trainable")
    assert not any(p.device.type == "meta" for p in model.parameters())


def test_a_checkpoint_holds_the_documented_tensors(saved):
    """Their names and shapes are a contract: D=32, F=48, n=4, r=4, G=8."""
    shapes = {name: tuple(t.shape) for name, t in load_file(saved[0] / "adapter" / WEIGHTS).items()}
    for layer in (0, 1):
        prefix = f"base_model.model.model.layers.{layer}"
        experts, gru = f"{prefix}.mlp.lora_graphmoe.experts", f"{prefix}.mlp.lora_graphmoe.gru"
        expected = {
            f"{prefix}.mlp.lora_graphmoe.router.weight": (4, 32),
            **{f"{experts}.{name}.A": (4, 4, 32) for name in ("gate_proj", "up_proj")},
            **{f"{experts}.{name}.B": (4, 48, 4) for name in ("gate_proj", "up_proj")},
            f"{experts}.down_proj.A": (4, 4, 48),
            f"{experts}.down_proj.B": (4, 32, 4),
            **{f"{gru}.{name}.weight": (8, 40) for name in ("update_gate", "reset_gate", "candidate")},
            f"{gru}.candidate.bias": (8,),
            f"{gru}.output_proj.weight": (32, 8),
            **{f"{prefix}.self_attn.{name}_proj.lora_A.weight": (4, 32) for name in "qkvo"},
            **{f"{prefix}.self_attn.{name}_proj.lora_B.weight": (32, 4) for name in "qo"},
            **{f"{prefix}.self_attn.{name}_proj.lora_B.weight": (16, 4) for name in "kv"},
        }
        for name, shape in expected.items():
            assert shapes.pop(name) == shape, name
    assert not shapes


def test_one_round_has_no_gru(tmp_path):
    model = tiny_peft_model(rounds=1, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    assert not any(".gru." in name for name in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_several_adapters_are_saved_and_loaded_apart(tmp_path):
    model = tiny_peft_model(init_lora_weights=False)
    model.add_adapter("second", tiny_config(init_lora_weights=False, num_experts=3, rounds=2))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again), expected["default"])
    again.set_adapter("second")
    assert torch.equal(logits(again), expected["second"])

    bare = tiny_model()
    bare.load_adapter(str(tmp_path))
    with pytest.warns(UserWarning, match="multiple adapters"):
        bare.load_adapter(str(tmp_path / "second"), adapter_name="second")
    for name in ("second", "default"):
        bare.set_adapter(name)
        assert torch.equal(logits(bare), expected[name])
    bare.disable_adapters()
    assert torch.equal(logits(bare), logits(tiny_model()))
    bare.enable_adapters()
    bare.delete_adapter("second")
    assert torch.equal(logits(bare), expected["default"])


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtypes_on_a_bf16_base(autocast, saved):
    """PEFT keeps adapters in fp32 by default and in the base's dtype on request; both run and train."""
    model = PeftModel.from_pretrained(
        tiny_model().bfloat16(), saved[0] / "adapter", autocast_adapter_dtype=autocast, is_trainable=True
    )
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_step(model)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head", "embed_tokens"]}, {"trainable_token_indices": [5, 6, 7]}]
)
def test_further_trained_modules_are_saved_and_disabled(settings, tmp_path):
    """PEFT's own wrappers beside the adapter: trained, saved, loaded, and off with the adapter."""
    model = tiny_peft_model(**settings)
    train_step(model)
    model.save_pretrained(tmp_path)
    assert any("lora_" not in name for name in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))


# --- checkpoints that do not fit -------------------------------------------------------------------------------------

ROUTER = "base_model.model.model.layers.0.mlp.lora_graphmoe.router.weight"
LORA_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: {**state, ROUTER: state[ROUTER][:3].clone(), LORA_A: state[LORA_A][:2].clone()},
            r"(?s)layers.0.mlp.lora_graphmoe.default.router.weight: \[3, 32\] in the checkpoint, \[4, 32\] in the model"
            r".*layers.1.self_attn.q_proj.lora_A.default.weight: \[2, 32\] in the checkpoint, \[4, 32\] in the model",
        ),
        (
            lambda state: {name: t for name, t in state.items() if name not in (ROUTER, LORA_A)},
            r"(?s)default.router.weight: missing from the checkpoint.*lora_A.default.weight: missing",
        ),
        (
            lambda state: {**state, ROUTER.replace("layers.0", "layers.5"): state[ROUTER].clone()},
            r"layers.5.mlp.lora_graphmoe.router.weight: not in the model",
        ),
    ],
    ids=["sizes", "missing", "unexpected"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message, low_cpu_mem_usage, saved, tmp_path):
    """PEFT itself only warns of missing tensors: a router would stay random."""
    (tmp_path / CONFIG).write_text((saved[0] / "adapter" / CONFIG).read_text())
    save_file(change(load_file(saved[0] / "adapter" / WEIGHTS)), tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_an_adapter_of_another_model_is_refused(saved):
    with pytest.raises(
        ValueError,
        match=r"(?s)gate_proj.A: \[4, 4, 32\] in the checkpoint, \[4, 4, 64\] in the model.*\n- and 26 more of 34$",
    ):
        PeftModel.from_pretrained(tiny_model(hidden_size=64), saved[0] / "adapter")


def test_an_adapter_with_another_config_is_refused(saved, tmp_path):
    """A config edited by hand: more experts than the tensors have."""
    config = json.loads((saved[0] / "adapter" / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "num_experts": 8}))
    (tmp_path / WEIGHTS).write_bytes((saved[0] / "adapter" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"router.weight: \[4, 32\] in the checkpoint, \[8, 32\] in the model"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_offloading_of_adapters_is_refused(saved):
    """An option that is set after the config has been checked."""
    with pytest.raises(ValueError, match="ephemeral_gpu_offload=True"):
        PeftModel.from_pretrained(tiny_model(), saved[0] / "adapter", ephemeral_gpu_offload=True)


# --- saving as a whole -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_written(state, path, metadata=None):
    """What a full disk does to the weights."""
    save_file(state, path, metadata=metadata)
    Path(path).write_bytes(Path(path).read_bytes()[:1000])
    raise OSError("no space left on device")


def fail(*args, **kwargs):
    raise OSError("no space left on device")


@pytest.mark.parametrize("where", ["weights", "config"])
def test_a_failure_while_saving_leaves_the_old_adapter_whole(where, tmp_path, monkeypatch):
    model = tiny_peft_model(init_lora_weights=False)
    model.add_adapter("second", tiny_config(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's")
    before, expected = contents(tmp_path), logits(model)
    train_step(model)
    if where == "weights":
        monkeypatch.setattr(peft.peft_model, "safe_save_file", half_written)
    else:
        monkeypatch.setattr(GraphMoEConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert not model.peft_config["default"].inference_mode
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_process_that_dies_while_saving_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    """No handler runs: the old files must not have been touched."""
    model = tiny_peft_model(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    child = os.fork()
    if child == 0:
        with monkeypatch.context() as patch:
            patch.setattr(peft.peft_model, "safe_save_file", lambda state, path, metadata: os._exit(17))
            model.save_pretrained(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_saving_again_replaces_the_adapter_and_keeps_the_rest(tmp_path):
    """What a model card says, and files of others, stay."""
    model = tiny_peft_model(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "\nWritten by a user.\n")
    train_step(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    assert (tmp_path / "notes.txt").read_text() == "the user's"
    assert "Written by a user." in (tmp_path / "README.md").read_text()
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG, WEIGHTS, "notes.txt"]


def test_only_the_main_process_writes(tmp_path):
    tiny_peft_model().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not contents(tmp_path)


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        tiny_peft_model().save_pretrained(tmp_path / "file")


def test_other_methods_are_saved_as_ever(tmp_path, monkeypatch):
    """The wrapped save_pretrained is every PEFT model's."""
    folders = []
    original = peft.peft_model.safe_save_file

    def record(state, path, metadata):
        folders.append(Path(path).parent)
        original(state, path, metadata=metadata)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", record)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert folders == [tmp_path]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))

"""Embeddings and other modules that PEFT trains and saves beside the adapter: this method loads what LoRA loads."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphmoe_model.conversion import from_moe_peft, read_adapter, to_moe_peft, write_adapter
from tests.model.adapter_folders import CONFIG, WEIGHTS
from tests.model.tiny_models import VOCABULARY, logits, tiny_config, tiny_model, tiny_peft_model, train_step

BOTH = ["lm_head", "embed_tokens"]
IDS = torch.tensor([[3, 5, 6, 7, 5, 9], [6, 6, 8, 1, 4, 5]])

# tied, settings of the config, options of save_pretrained, tokens added to the vocabulary
CASES = {
    "embed_tokens": (False, {"modules_to_save": ["embed_tokens"]}, {}, 0),
    "lm_head of a tied model": (True, {"modules_to_save": ["lm_head"]}, {}, 0),
    "saved embeddings": (False, {}, {"save_embedding_layers": True}, 0),
    "saved and trained embedding": (False, {"modules_to_save": ["embed_tokens"]}, {"save_embedding_layers": True}, 0),
    "both, saved, tied": (True, {"modules_to_save": BOTH}, {"save_embedding_layers": True}, 0),
    "resized": (False, {}, {}, 3),
    "resized and trained": (True, {"modules_to_save": BOTH}, {}, 3),
    "tokens of a tied model": (True, {"trainable_token_indices": [5, 6]}, {}, 0),
    "tokens, saved, tied": (True, {"trainable_token_indices": [5, 6]}, {"save_embedding_layers": True}, 0),
    "tokens, resized, tied": (True, {"trainable_token_indices": [5, VOCABULARY]}, {}, 3),
    "tied together": (True, {"modules_to_save": BOTH, "ensure_weight_tying": True}, {}, 0),
    "tied together by one": (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, {}, 3),
    "tokens tied together": (
        True,
        {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}, "ensure_weight_tying": True},
        {},
        0,
    ),
}
# One of every kind of name in the file; the other cases are combinations.
DEFAULT = {
    *("lm_head of a tied model", "both, saved, tied", "resized", "tokens, saved, tied", "tied together"),
}


def base(folder: Path, added: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if added:
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCABULARY + added, mean_resizing=False)
    return model.eval()


def saved(folder: Path, make, tied: bool, settings: dict, save: dict, added: int) -> Tensor:
    """A trained and saved adapter's logits; the base is in ``folder``, the adapter in its 'adapter'."""
    tiny_model(tie_word_embeddings=tied).save_pretrained(folder)
    model = get_peft_model(base(folder, added), make(**settings))
    train_step(model, input_ids=IDS)
    model.save_pretrained(folder / "adapter", **save)
    return logits(model, IDS)


def lora(**settings) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False, **settings)


def ours(**settings):
    return tiny_config(init_lora_weights=False, rounds=2, **settings)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "case", [case if case in DEFAULT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_plain_lora_saves_and_loads_this_method_saves_and_loads(case, tmp_path):
    """The same further tensors in the file, and the same model from it, as the first adapter and as a further one."""
    tied, settings, save, added = CASES[case]
    beside = {}
    for name, make in {"lora": lora, "ours": ours}.items():
        folder = tmp_path / name
        expected = saved(folder, make, tied, dict(settings), save, added)
        beside[name] = {key for key in load_file(folder / "adapter" / WEIGHTS) if ".lora_" not in key}
        model = PeftModel.from_pretrained(base(folder, added), folder / "adapter")
        assert torch.equal(logits(model, IDS), expected), name
        model = get_peft_model(base(folder, added), make())
        model.load_adapter(folder / "adapter", "second")
        model.set_adapter("second")
        assert torch.equal(logits(model, IDS), expected), name
    assert beside["ours"] == beside["lora"]


def test_tied_copies_are_trained_as_one():
    """ensure_weight_tying: both ends of the model read one trained tensor, as with LoRA."""
    for make in (lora, ours):
        config = make(modules_to_save=list(BOTH), ensure_weight_tying=True)
        model = get_peft_model(tiny_model(tie_word_embeddings=True), config)
        train_step(model, input_ids=IDS)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight
        assert not torch.equal(embedding.modules_to_save["default"].weight, embedding.original_module.weight)


def test_a_second_adapter_from_the_same_config_with_modules_to_save(tmp_path):
    """As TRL makes its reference copy. The first one's name stands inside the saved module's wrapper."""
    config = tiny_config(modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    model.add_adapter("reference", config)
    expected = {}
    for name in ("default", "reference"):
        model.set_adapter(name)
        train_step(model)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    again.load_adapter(tmp_path / "reference", "reference")
    for name in ("reference", "default"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])


def test_embeddings_saved_with_an_adapter_that_does_not_train_them(tmp_path):
    """Another adapter of the model does, so the names in the file are those of wrapped modules."""
    model = tiny_peft_model(modules_to_save=["embed_tokens"])
    model.add_adapter("second", tiny_config(init_lora_weights=False))
    model.set_adapter("second")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["second"], save_embedding_layers=True)
    assert any(".original_module." in name for name in load_file(tmp_path / "second" / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "second")), expected)


def rewritten(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


HEAD = "base_model.model.lm_head"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: {**state, f"{HEAD}.modules_to_save.weight": state[f"{HEAD}.weight"] + 1},
            r"lm_head.modules_to_save.weight: a copy of .*lm_head.modules_to_save.default.weight, and differs from it",
        ),
        (
            lambda state: {name: t for name, t in state.items() if name != f"{HEAD}.weight"},
            r"fit the adapter 'default'.*\n- base_model.model.lm_head.weight: missing from the checkpoint",
        ),
        (
            lambda state: {**state, f"{HEAD}.weight": state[f"{HEAD}.weight"].to(torch.int64)},
            r"lm_head.modules_to_save.default.weight: torch.int64 in the checkpoint, torch.float32 in the model",
        ),
    ],
    ids=["copy", "missing", "integers"],
)
def test_saved_modules_that_are_not_whole_are_refused_by_name(change, message, tmp_path):
    """And leave the model as it was: the same modules, trainable as before."""
    tiny_peft_model(modules_to_save=["lm_head"]).save_pretrained(tmp_path, save_embedding_layers=True)
    rewritten(tmp_path, change)
    model = tiny_model()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = tiny_peft_model()
    expected = logits(other)
    with pytest.raises(ValueError, match=message.replace("default", "second")):
        other.load_adapter(tmp_path, "second")
    assert list(other.peft_config) == ["default"]
    assert not any(".second" in name for name in other.state_dict())
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
@pytest.mark.parametrize("loader", ["AutoModel", "load_adapter"])
def test_transformers_own_loader_refuses_what_it_would_leave_out(loader, settings, tmp_path):
    """It logs a report and runs the base model's embeddings; PEFT's loaders give the adapter."""
    tiny_model().save_pretrained(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), tiny_config(**settings))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path)
    name = next(iter(settings))
    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained if loader == "AutoModel" else bare.load_adapter
    with pytest.raises(ValueError, match=rf"has {name}=.*Transformers' loader leaves out.*AutoPeftModelForCausalLM"):
        load(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ["both, saved, tied", "tied together"])
def test_a_converted_adapter_keeps_its_embeddings(case, tmp_path):
    """To PEFT's LoRA, from it again, and from GraphMoE's format to itself."""
    tied, settings, save, added = CASES[case]

    def make(**more):
        return tiny_config(method="lora", num_experts=1, init_lora_weights=False, **more)

    expected = saved(tmp_path, make, tied, dict(settings), save, added)
    adapter = read_adapter(tmp_path / "adapter")
    to_moe_peft(adapter, tmp_path / "lora")
    write_adapter(from_moe_peft(tmp_path / "lora"), tmp_path / "back")
    write_adapter(adapter, tmp_path / "again")
    for name in ("lora", "back", "again"):
        model = PeftModel.from_pretrained(base(tmp_path, added), tmp_path / name)
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_of_another_size_say_what_to_do(tmp_path):
    """The one thing to do after a resize in training; the shapes alone would not say it."""
    saved(tmp_path, tiny_config, False, {}, {}, 3)
    wanted = (
        rf"trained with {VOCABULARY + 3} tokens: call model\.resize_token_embeddings\({VOCABULARY + 3}\) on the base"
    )
    with pytest.raises(ValueError, match=wanted):
        PeftModel.from_pretrained(base(tmp_path, 0), tmp_path / "adapter")

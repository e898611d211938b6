"""The digest of a configuration in both files of an adapter, and what every loader does with it."""

import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graphmoe_model import GraphMoEConfig
from graphmoe_model.checkpoints.digest import FIELD, METADATA, config_digest
from graphmoe_model.conversion import read_adapter, write_adapter
from tests.model.adapter_folders import CONFIG, PICKLE, WEIGHTS, loaded, mixture, two_models
from tests.model.loaders import LOADERS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model

MIXTURE = "holds the configuration of one save and the weights of another"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A base model's folder with a mixture in 'adapter'."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny_model().save_pretrained(folder)
    models = two_models()
    for model in models.values():
        model.peft_config["default"].base_model_name_or_path = str(folder)
    shutil.move(mixture(folder / "saves", models), folder / "adapter")
    return folder


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_refuses_a_mixture(loader, mixed):
    """Its tensors have the shapes that its configuration asks for, so nothing else would."""
    with pytest.raises(ValueError, match=f"{MIXTURE}.*save or fetch the adapter again"):
        LOADERS[loader](mixed)


def test_the_converter_and_further_adapters_refuse_a_mixture(mixed):
    with pytest.raises(ValueError, match=MIXTURE):
        read_adapter(mixed / "adapter")
    model = tiny_peft_model()
    for name in ("second", "default"):
        with pytest.raises(ValueError, match=MIXTURE):
            model.load_adapter(mixed / "adapter", name)
    assert list(model.peft_config) == ["default"]


def test_a_refused_mixture_leaves_the_model_as_it_was(mixed):
    model = tiny_model()
    before = [id(module) for module in model.modules()]
    for load in (model.load_adapter, lambda folder: PeftModel.from_pretrained(model, folder)):
        with pytest.raises(ValueError, match=MIXTURE):
            load(str(mixed / "adapter"))
        assert [id(module) for module in model.modules()] == before


def test_a_mixture_of_pickles_is_refused(tmp_path):
    folder = mixture(tmp_path, two_models(), safe_serialization=False)
    assert (folder / PICKLE).exists()
    with pytest.raises(ValueError, match=MIXTURE):
        loaded(folder)


def test_both_files_carry_the_digest_of_the_configuration(tmp_path):
    """Of all adapters in a folder, as PEFT and as the converter save them; the tensors stay what they were."""
    model = tiny_peft_model(init_lora_weights=False)
    model.add_adapter("second", tiny_config(rounds=2))
    model.save_pretrained(tmp_path)
    write_adapter(read_adapter(tmp_path), tmp_path / "third")
    for folder in (tmp_path, tmp_path / "second", tmp_path / "third"):
        settings = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt", METADATA: settings[FIELD]}
        assert settings[FIELD] == config_digest(settings)
    assert torch.equal(loaded(tmp_path), logits(model))
    first, third = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "third" / WEIGHTS)
    assert all(torch.equal(first[name], third[name]) for name in first | third)


def test_the_order_of_sets_does_not_count_and_every_setting_does():
    settings = {"target_modules": ["mlp", "q_proj"], "top_k": 2}
    assert config_digest(settings) == config_digest({"top_k": 2, "target_modules": ["q_proj", "mlp"], FIELD: "old"})
    assert config_digest(settings) != config_digest({**settings, "top_k": 1})


def test_a_configuration_may_be_edited_and_weights_rewritten(tmp_path):
    """By hand, or by a tool that drops metadata: the digest tells saves apart, it seals nothing."""
    model = tiny_peft_model(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "top_k": 1}))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert again.peft_config["default"].top_k == 1
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    assert torch.equal(loaded(tmp_path), logits(again))
    del settings[FIELD]  # as saved before there were digests
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    assert torch.equal(loaded(tmp_path), logits(model))


def test_a_configuration_in_memory_may_be_changed_or_be_another(tmp_path):
    """Given as config=, it is what the user wants; one that was read from the folder of another save is refused."""
    models = two_models()
    folder = mixture(tmp_path, models)
    config = PeftConfig.from_pretrained(str(tmp_path / "two"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), folder, config=config)), logits(models["two"]))
    config = GraphMoEConfig.from_pretrained(str(tmp_path / "one"))
    with pytest.raises(ValueError, match=MIXTURE):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "two", config=config)
    config.top_k = 2
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "one", config=config)
    assert not torch.equal(logits(model), logits(models["one"]))


def test_a_trained_on_and_saved_again_adapter_gets_a_digest_of_its_own(tmp_path):
    tiny_peft_model().save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", is_trainable=True)
    model.peft_config["default"].top_k = 1
    model.save_pretrained(tmp_path / "second")
    digests = [json.loads((tmp_path / name / CONFIG).read_text())[FIELD] for name in ("first", "second")]
    assert digests[0] != digests[1]
    assert torch.equal(loaded(tmp_path / "second"), logits(model))

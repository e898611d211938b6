"""Base models: loaded as they are asked for, or refused with what is wrong and within seconds."""

from __future__ import annotations

import socket

import pytest
import torch

from graphmoe_model.base_models import (
    ModelSource,
    hub,
    load_base_config,
    load_base_model,
    load_config,
    load_tokenizer,
)
from graphmoe_model.profiling.models import saved_model
from tests.model.questions_made import byte_level
from tests.model.tiny_models import tiny_model


def test_a_base_whose_files_lack_weights_is_refused(tmp_path):
    """Transformers makes them up and warns; every score would be noise."""
    model = tiny_model()
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lack weights: model\.layers\.1\.mlp"):
        load_base_model(ModelSource(str(tmp_path)))


def test_a_base_whose_files_do_not_fit_its_configuration_is_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.config.intermediate_size *= 2
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit its configuration: weights have other sizes"):
        load_base_model(ModelSource(str(tmp_path)))


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "none"}', "{}"])
def test_a_configuration_that_is_none_is_refused(config, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    for load in (load_base_model, load_base_config):
        with pytest.raises(ValueError, match=f"cannot .*{tmp_path}"):
            load(ModelSource(str(tmp_path)))
    with pytest.raises(ValueError, match=f"cannot read the configuration of the model '{tmp_path}'"):
        load_config(str(tmp_path))


def test_a_base_is_loaded_in_the_dtype_that_is_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert load_base_model(ModelSource(str(tmp_path))).dtype == torch.float32
    assert load_base_model(ModelSource(str(tmp_path), dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_folders_without_a_model_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json.*name the folder of a saved model"):
        ModelSource(str(tmp_path))
    with pytest.raises(ValueError, match=r"has no file b\.gguf; it has no \.gguf file"):
        ModelSource(str(tmp_path), gguf_file="b.gguf")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"it has a\.gguf: name it by --gguf-file"):
        ModelSource(str(tmp_path))
    with pytest.raises(ValueError, match=r"it has a\.gguf: .* else write it out"):
        load_config(str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"is a file; name its folder, and the file by --gguf-file: {tmp_path} and a\.g"
    ):
        ModelSource(str(tmp_path / "a.gguf"))
    with pytest.raises(ValueError, match=r"has no file b\.gguf; it has a\.gguf"):
        ModelSource(str(tmp_path), gguf_file="b.gguf")
    with pytest.raises(ValueError, match="quantised already"):
        ModelSource(str(tmp_path), gguf_file="a.gguf", bits=4)
    with pytest.raises(ValueError, match="there is no folder /no/such"):
        ModelSource("/no/such")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that does not answer, and must then not be asked again; the cache of its models."""
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # the client's own, once and for seconds
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the hub was asked all the same"))
    return tmp_path


LOADERS = {
    "model": load_base_model,
    "tokenizer": load_tokenizer,
    "configuration": load_base_config,
    "shape": lambda source: load_config(source.name),
    "profiled model": lambda source: saved_model(source.name, None, torch.device("cpu")),
}


@pytest.mark.parametrize("what", LOADERS)
def test_a_hub_that_does_not_answer_is_said_at_once(what, no_hub):
    """Transformers tries for more than a minute."""
    with pytest.raises(ValueError, match=r"'org/none': it is neither a folder here nor in the cache.*be reached"):
        LOADERS[what](ModelSource("org/none"))


@pytest.mark.parametrize("what", LOADERS)
def test_a_hub_that_does_not_answer_is_not_needed_for_what_is_in_the_cache(what, no_hub):
    snapshot = no_hub / "models--org--there" / "snapshots" / ("0" * 40)
    tiny_model().save_pretrained(snapshot)
    byte_level().save_pretrained(snapshot)
    (no_hub / "models--org--there" / "refs").mkdir()
    (no_hub / "models--org--there" / "refs" / "main").write_text("0" * 40)
    assert LOADERS[what](ModelSource("org/there")) is not None

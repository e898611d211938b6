"""What an export refuses, and what loading one does: each by its name, and nothing is left or lost."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from graphmoe_inference import load_for_inference
from graphmoe_inference.folder import BASE, CONFIG, WEIGHTS, digest
from graphmoe_model.exporting import export_for_inference
from tests.inference.test_export import logits, routed
from tests.model.tiny_models import tiny_config, tiny_model


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


def contradictory(_: Path) -> PeftModel:
    """Settings that Transformers loads with a warning and does not save."""
    model = routed()
    model.get_base_model().generation_config.update(temperature=0.9, do_sample=False)
    return model


def mixed_dtypes(_: Path) -> PeftModel:
    model = routed(base=tiny_model().bfloat16())
    model.get_base_model().model.norm.float()
    return model


def classifier(_: Path) -> PeftModel:
    base = AutoModelForSequenceClassification.from_config(tiny_model().config)
    return get_peft_model(base, tiny_config(task_type="SEQ_CLS"))


REFUSED = {
    "LoRA on embeddings": (
        lambda _: get_peft_model(tiny_model(), tiny_config(target_modules=["mlp", "embed_tokens"])),
        ValueError,
        r"the adapter is on model\.embed_tokens, of the kind Embedding, and an export holds",
    ),
    "a classifier": (
        classifier,
        ValueError,
        "the base is a LlamaForSequenceClassification, and an export is of a causal",
    ),
    "settings of generation": (contradictory, ValueError, "contradict each other.*temperature.*generation_config.json"),
    "several dtypes": (mixed_dtypes, ValueError, r"dtypes \(.* in bfloat16, model\.norm\.weight is in float32\)"),
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


def test_the_current_folder_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path):
        with pytest.raises(ValueError, match=r"is the current folder, .*name a new one"):
            export_for_inference(routed(), name)
    export_for_inference(routed(), "a/../new")
    assert (tmp_path / "new" / CONFIG).is_file()


@pytest.mark.parametrize("kilobytes", [8, 64])  # in the base's weights, in the adapter's
def test_an_export_that_breaks_off_leaves_nothing(kilobytes, tmp_path):
    """A folder that is there is whole: the system lets files grow no longer, as a full disk does."""
    model = routed(base=tiny_model(num_hidden_layers=1), num_experts=16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
        with pytest.raises(ValueError, match=r"out cannot be written: .*; free space there, or name another folder"):
            export_for_inference(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_export_into_one_folder(tmp_path, monkeypatch):
    """The first that is done has it; neither removes what the other writes."""
    model = routed()

    def other(*arguments: Any) -> str:
        monkeypatch.setattr("graphmoe_model.exporting.export.digest", digest)
        export_for_inference(model, tmp_path / "out")
        return digest(*arguments)

    monkeypatch.setattr("graphmoe_model.exporting.export.digest", other)
    with pytest.raises(ValueError, match="cannot be written"):
        export_for_inference(model, tmp_path / "out")
    assert torch.equal(logits(load_for_inference(tmp_path / "out")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_goes_with_the_next(tmp_path):
    (tmp_path / ".saving-killed" / "out" / BASE).mkdir(parents=True)
    export_for_inference(routed(), tmp_path / "another")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


@pytest.fixture
def exported(tmp_path) -> Path:
    export_for_inference(routed(), tmp_path / "out")
    return tmp_path / "out"


def damage(folder: Path, change: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def resized(folder: Path, name: str, size: int | None = 7) -> None:
    """Give the base a tensor of another size, or none."""
    file = folder / BASE / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file({**tensors, **({} if size is None else {name: torch.ones(size)})}, file, {"format": "pt"})


def renamed_activation(folder: Path) -> None:
    damage(folder, lambda config: config["graphmoe"]["mlps"]["model.layers.0.mlp"].update(activation="elsewhere"))


BROKEN = {
    "no folder": (lambda f: None, "nowhere", "there is no folder"),
    "an adapter": (lambda f: (f / "adapter_config.json").touch(), "", "is an adapter; graphmoe export makes"),
    "another model": (lambda f: damage(f, lambda c: c.pop("graphmoe")), "", "is no model that graphmoe export wrote"),
    "no description": (lambda f: (f / CONFIG).write_text("{"), "", "is no model that graphmoe export wrote"),
    "a newer format": (lambda f: damage(f, lambda c: c["graphmoe"].update(format=2)), "", "is of format 2, and this"),
    "a field less": (lambda f: damage(f, lambda c: c["graphmoe"].pop("rounds")), "", "is damaged: .*rounds"),
    "other weights": (lambda f: (f / WEIGHTS).write_bytes(b"x"), "", "is not the file that config.json describes"),
    "no base": (lambda f: (f / BASE / "config.json").unlink(), "", "base holds no whole model"),
    "half a base": (lambda f: os.truncate(f / BASE / "model.safetensors", 3000), "", "base holds no whole model"),
    "a smaller base": (
        lambda f: resized(f, "model.norm.weight"),
        "",
        r"weights of other sizes: \['model\.norm",
    ),
    "a weight less": (lambda f: resized(f, "model.norm.weight", None), "", r"base lacks weights: \['model\.norm"),
    "a weight more": (
        lambda f: resized(f, "score.weight", 2),
        "",
        r"weights that its class does not take: \['score\.weight'\]",
    ),
    "an activation": (renamed_activation, "", "unknown activation 'elsewhere'.*register_activation"),
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

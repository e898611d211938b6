"""Adapters that FSDP2 and DeepSpeed ZeRO-3 spread over processes: saved whole by the calls that refusals name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.distributed import saving_worker
from tests.distributed.launch import launch
from tests.model.adapter_folders import WEIGHTS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model

pytestmark = pytest.mark.distributed

NOT_SAVED = "NotWhole: the adapter 'default' was not saved, and one that was there stays as it was: "


class Saved:
    """What the ranks of a run found, and the folder they saved into."""

    def __init__(self, folder: Path, worker: Any, *arguments: Any) -> None:
        self.folder = folder
        self.ranks = launch(worker, str(folder), *arguments, timeout=150)
        self.file = load_file(folder / WEIGHTS)


@pytest.fixture(scope="module", params=[False, True], ids=["", "checkpointing"])
def fsdp2(request, tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("fsdp2") / "adapter", saving_worker.fsdp2, request.param)


@pytest.fixture(scope="module")
def zero3(tmp_path_factory) -> Saved:
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    return Saved(tmp_path_factory.mktemp("zero3") / "adapter", saving_worker.zero3)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_loads(run: Saved) -> None:
    """In one process, as it was when it was saved, on every rank."""
    model = PeftModel.from_pretrained(tiny_model(), run.folder)
    assert (logits(model) - logits(tiny_model())).abs().max() > 0.1
    for rank in run.ranks:
        assert_same(run.file, rank["own"])
        assert_same(rank["loaded"], rank["own"])


def assert_refused(run: Saved, what: str, message: str) -> None:
    """On every rank, and the folder is byte for byte what it was."""
    for rank in run.ranks:
        text, untouched = rank[what]
        assert untouched
        assert text.startswith(NOT_SAVED), text
        for part in message.split("|"):
            assert part in text


def test_shards_of_fsdp2_are_refused(fsdp2):
    """They failed deep inside of safetensors; the message names the calls that gather them."""
    assert_refused(
        fsdp2,
        "sharded",
        "tensors are spread over processes (DTensor, as FSDP2 makes them)|every rank makes them|trainer.save_model(|"
        "accelerator.get_state_dict(model)|get_model_state_dict(model, options=StateDictOptions(full_state_dict=True",
    )
    assert len(fsdp2.ranks[0]["shards"]) == len(fsdp2.file)


def test_the_empty_state_dict_of_other_ranks_is_refused(fsdp2):
    """Nothing was saved, without a word, over what the first rank had saved."""
    assert_refused(fsdp2, "empty", "not in the state dict|is_main_process=rank == 0")


def test_the_named_call_saves_what_fsdp2_has_sharded(fsdp2):
    """Also with the layers wrapped for activation checkpointing, of which nothing was saved, and loads it back."""
    assert_loads(fsdp2)


def test_partitions_of_zero3_are_refused(zero3):
    """Tensors of shape (0,) were written."""
    assert_refused(
        zero3,
        "sharded",
        "tensors are spread over processes (DeepSpeed ZeRO-3)|every rank makes them|trainer.save_model(|"
        "accelerator.get_state_dict(engine)|stage3_gather_16bit_weights_on_model_save|GatheredParameters([p for p in",
    )
    assert_refused(zero3, "embeddings", "2 of 58 tensors are spread|embed_tokens.weight, base_model.model.lm_head.wei")


def test_the_named_calls_save_what_zero3_has_partitioned(zero3):
    """And it loads into the engine's partitions, with true shapes compared and the optimizer's copy renewed."""
    assert_loads(zero3)
    assert_same(load_file(Path(f"{zero3.folder}-consolidated") / WEIGHTS), zero3.file)
    for rank in zero3.ranks:
        assert_same(rank["after a step of 0"], rank["own"])


def test_an_adapter_loads_into_a_base_under_zero_init(tmp_path):
    """Its embeddings were compared with the empty tensors that are in the place of partitioned ones."""
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    options = {"init_lora_weights": False, "modules_to_save": ["input_layernorm"]}
    tiny_peft_model(**options).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    other = get_peft_model(tiny_model(vocab_size=32), tiny_config(**options))
    other.save_pretrained(tmp_path / "adapter-other", save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    for rank in launch(saving_worker.zero_init, str(tmp_path / "adapter"), timeout=150):
        assert "embed_tokens.weight: [32, 32] in the checkpoint, [64, 32] in the model" in rank["misfit"]
        assert_same(rank["loaded"], saved)

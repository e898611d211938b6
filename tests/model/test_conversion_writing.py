"""What is not written: adapters that a format cannot hold, into folders in use, or by halves."""

import dataclasses
import re
import resource
from pathlib import Path

import pytest
import torch

from graphmoe_model.conversion import attention_lora, from_moe_peft, to_moe_peft, to_peft, with_rounds, write_adapter
from tests.model.peer_format import MLP, peer_settings, write_peer

pytestmark = pytest.mark.methods

BIN, SAFETENSORS = "adapter_model.bin", "adapter_model.safetensors"


def contains(error: pytest.ExceptionInfo, *texts: str) -> None:
    for text in texts:
        assert text in str(error.value), text


def imported(tmp_path, kind="MIXLORA", **settings):
    return from_moe_peft(write_peer(tmp_path / "theirs", peer_settings(kind, **settings)))


# --- to MoE-PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "use_dora: it has no place for magnitudes"),
        ({"num_experts": [3, 3]}, r"num_experts=\[3, 3\]: it has one number of experts for all layers"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False: its routing weights are divided by their sum"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform or exclude_modules"),
        ({"exclude_modules": ["model.layers.2.mlp"]}, "layers_to_transform or exclude_modules"),
        ({"task_type": "SEQ_CLS"}, "task_type=.*it is for causal language models"),
        ({"lora_dropout": 0.0}, "lora_dropout=0: its readers demand more than 0.*1e-9"),
        ({"lora_alpha": 6.5}, r"lora_alpha=6\.5: its readers demand a whole number"),
        (
            {"rank_pattern": {"q_proj": 2}},
            "its attention projections all have the same rank .* r=2 alpha=6, r=4 alpha=6",
        ),
        ({"alpha_pattern": {"layers.1.mlp": 2}}, "its MLPs all have the same rank and alpha"),
    ],
)
def test_what_moe_pefts_format_cannot_hold(changes, text, tmp_path):
    """Each with its reason, and nothing is written."""
    adapter = imported(tmp_path)
    adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, **changes))
    with pytest.raises(ValueError, match=text):
        to_moe_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_reason_against_an_export_is_named(tmp_path):
    adapter = with_rounds(imported(tmp_path), 2)
    config = dataclasses.replace(adapter.config, norm_topk_prob=False, use_dora=True, lora_dropout=0.0)
    with pytest.raises(ValueError, match="MoE-PEFT's format cannot hold this adapter") as error:
        to_moe_peft(dataclasses.replace(adapter, config=config), tmp_path / "out")
    contains(error, "rounds=2", "norm_topk_prob=False", "use_dora", "lora_dropout=0")


def test_ranks_of_the_mlps_alone_are_mixloras(tmp_path):
    adapter = imported(tmp_path, "MOLA")
    config = dataclasses.replace(adapter.config, rank_pattern={"mlp": 2})
    with pytest.raises(ValueError, match="its MLPs and attention have the same rank and alpha"):
        to_moe_peft(dataclasses.replace(adapter, config=config), tmp_path / "out")


def test_lora_with_rounds_is_no_lora(tmp_path):
    with pytest.raises(ValueError, match="PEFT's LoRA format cannot hold this adapter:\n- rounds=2: it has no GRU"):
        to_moe_peft(with_rounds(imported(tmp_path, "LORA"), 2), tmp_path / "out")


def test_modules_that_moe_peft_does_not_know(tmp_path):
    adapter = imported(tmp_path)
    for old, new, text in [
        (".mlp.", ".feed_forward.", "feed_forward: it knows only mlp, self_attn.dense"),
        ("layers.1.mlp", "layers.2.mlp", "layer 2 lacks self_attn.k_proj"),
        ("layers.1.", "layers.2.", "layer 1: all tensors missing"),
        ("model.model.layers.1.", "model.other.layers.1.", "layers of model.layers, other.layers"),
    ]:
        tensors = {name.replace(old, new): tensor for name, tensor in adapter.tensors.items()}
        with pytest.raises(ValueError, match=re.escape(text)):
            to_moe_peft(dataclasses.replace(adapter, tensors=tensors), tmp_path / "out")
    tensors = {**adapter.tensors, "base_model.model.lm_head.weight": torch.zeros(64, 32)}
    config = dataclasses.replace(adapter.config, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save or trainable_token_indices"):
        to_moe_peft(dataclasses.replace(adapter, config=config, tensors=tensors), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (
            "LORAMOE",
            {},
            "LoRAMoE adapter has no LoRA on the attention to save: the method has nothing on the attention",
        ),
        ("MOLA", {}, "routed experts, which no LoRA of PEFT can hold"),
        ("MIXLORA", {"target_modules": list(MLP)}, "it adapts the MLPs alone"),
    ],
)
def test_adapters_without_lora_on_the_attention(kind, changes, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        attention_lora(imported(tmp_path, kind, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 0, -1, 2.0, True, "3"])
def test_rounds_that_are_none(rounds, tmp_path):
    with pytest.raises(ValueError, match="rounds must be an integer of at least 2"):
        with_rounds(imported(tmp_path), rounds)


def test_a_gru_is_not_replaced_and_settings_are_its_own(tmp_path):
    adapter = imported(tmp_path)
    with pytest.raises(ValueError, match="has 2 rounds, and GRUs trained for them: rounds are added"):
        with_rounds(with_rounds(adapter, 2), 3)
    with pytest.raises(ValueError, match="top_k: no setting of the GRU; there are gru_hidden_scale"):
        with_rounds(adapter, 2, top_k=1)
    with pytest.raises(ValueError, match="unknown candidate_input 'x'"):
        with_rounds(adapter, 2, candidate_input="x")
    with pytest.raises(ValueError, match="gives a GRU of width 0"):
        with_rounds(adapter, 2, gru_hidden_scale=0.01)


# --- the target folder -----------------------------------------------------------------------------------------------

WRITERS = {"graphmoe": write_adapter, "peft": to_peft, "moe-peft": to_moe_peft, "attention-lora": attention_lora}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_in_use_is_left_alone_unless_asked(writer, tmp_path):
    adapter = imported(tmp_path, "LORA" if writer == "peft" else "MIXLORA")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        WRITERS[writer](adapter, tmp_path / "file")
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for name in (BIN, SAFETENSORS):
        (target / name).write_text("old")
    with pytest.raises(FileExistsError, match="is not empty"):
        WRITERS[writer](adapter, target)
    assert (target / BIN).read_text() == "old"
    WRITERS[writer](adapter, target, overwrite=True)
    weights = BIN if writer == "moe-peft" else SAFETENSORS
    assert {path.name for path in target.iterdir()} == {"adapter_config.json", weights, "notes.txt"}
    WRITERS[writer](adapter, tmp_path / "a" / "new" / "one")
    (tmp_path / "empty").mkdir()
    WRITERS[writer](adapter, tmp_path / "empty")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    adapter = imported(tmp_path)
    write_adapter(adapter, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def full(tensors: dict, path: Path, **kwargs) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphmoe_model.conversion.adapter.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="No space left"):
        write_adapter(with_rounds(adapter, 2), tmp_path / "old", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_of_the_system(writer, tmp_path):
    """Not of safetensors' or of torch's writers, which nobody expects: the command line ends in one line."""
    adapter = imported(tmp_path, "LORA" if writer == "peft" else "MIXLORA")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # Python ignores the signal, so writes fail with EFBIG
    try:
        with pytest.raises(OSError, match="cannot be written"):
            WRITERS[writer](adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_the_configuration_in_memory_stays_as_it_is(tmp_path):
    """inference_mode is for the file."""
    adapter = imported(tmp_path)
    write_adapter(adapter, tmp_path / "out")
    assert adapter.config.inference_mode is False
    assert adapter.config == imported(tmp_path / "again").config

"""What a conversion refuses, by its message: nothing is read in part, run unasked, or written where it does not fit."""

import json
import os
import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from graphmoe_model.conversion import from_moe_peft, read_adapter
from tests.model.peer_format import KINDS, MLP, peer_settings, peer_tensors, write_peer
from tests.model.tiny_models import tiny_peft_model

pytestmark = pytest.mark.methods

KIND = pytest.mark.parametrize("kind", KINDS)
BIN, SAFETENSORS = "adapter_model.bin", "adapter_model.safetensors"


def contains(error: pytest.ExceptionInfo, *texts: str) -> None:
    for text in texts:
        assert text in str(error.value), text


def imported(tmp_path, kind="MIXLORA", **settings):
    return from_moe_peft(write_peer(tmp_path / "theirs", peer_settings(kind, **settings)))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    settings = peer_settings("MIXLORA")
    folder = write_peer(tmp_path / "theirs", settings)
    torch.save({**peer_tensors(settings), "x": Attack()}, folder / BIN)
    with pytest.raises(ValueError, match=r"could run code.*not read.*safetensors"):
        from_moe_peft(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("read", [from_moe_peft, read_adapter])
def test_folders_without_an_adapter(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*snapshot_download"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{peft_type")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object .* got list"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type 'IA3'"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["MIXLORA", "LORA"])
def test_weight_files_that_are_absent_doubled_or_damaged(kind, tmp_path):
    settings = peer_settings(kind)
    folder = write_peer(tmp_path, settings)
    save_file(peer_tensors(settings), folder / SAFETENSORS)
    with pytest.raises(ValueError, match=r"holds both adapter_model\.safetensors and adapter_model\.bin"):
        from_moe_peft(folder)
    (folder / SAFETENSORS).unlink()
    whole = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model\.bin is (damaged|no plain file)"):
        from_moe_peft(folder)
    (folder / BIN).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"):
        from_moe_peft(folder)
    (folder / SAFETENSORS).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        from_moe_peft(folder)


def test_what_is_no_dictionary_of_tensors(tmp_path):
    settings = peer_settings("MIXLORA")
    folder = write_peer(tmp_path, settings)
    torch.save([torch.zeros(2)], folder / BIN)
    with pytest.raises(ValueError, match="dictionary of tensors by name, got list"):
        from_moe_peft(folder)
    torch.save({**peer_tensors(settings), "step": 7, "ids": torch.zeros(2, dtype=torch.int64)}, folder / BIN)
    with pytest.raises(ValueError, match=r"floating point tensors.*'step' \(int\), 'ids' \(torch.int64\)"):
        from_moe_peft(folder)


# --- tensors ---------------------------------------------------------------------------------------------------------


@KIND
def test_missing_superfluous_and_misshapen_tensors_are_all_named_at_once(kind, tmp_path):
    settings = peer_settings(kind)
    tensors = peer_tensors(settings)
    names = sorted(name for name in tensors if ".1.mlp." in name)
    wrong, missing = names[0], names[-1]
    shape = list(tensors[wrong].shape)
    tensors[wrong] = torch.zeros(shape[0], shape[1] + 1)
    del tensors[missing]
    extra = names[1].replace(".1.mlp.", ".1.mlp.extra.") if kind == "LORA" else f"{names[1]}.extra"
    tensors["classifier"] = torch.zeros(2)
    tensors[extra] = torch.zeros(2)
    if kind == "LORA":
        del tensors[extra]
    with pytest.raises(ValueError, match="is not whole") as error:
        from_moe_peft(write_peer(tmp_path, settings, tensors))
    contains(
        error, f"{wrong}: [{shape[0]}, {shape[1] + 1}], expected {shape}", f"{missing}: missing", "classifier: has"
    )
    if kind != "LORA":
        contains(error, f"{extra}: has no place")
    assert str(error.value).count("\n- ") == (3 if kind == "LORA" else 4)


@KIND
def test_a_rank_that_is_not_the_files(kind, tmp_path):
    settings = peer_settings(kind)
    with pytest.raises(ValueError, match=r"lora_A\.weight: \[4, 32\], expected \[5, 32\]"):
        from_moe_peft(write_peer(tmp_path, {**settings, "r": 5}, peer_tensors(settings)))


@pytest.mark.parametrize("kind", ["MIXLORA", "LORAMOE", "MOLA"])
@pytest.mark.parametrize(("number", "text"), [(4, r"experts\.3\..*: missing"), (2, r"experts\.2\..*: has no place")])
def test_a_number_of_experts_that_is_not_the_files(kind, number, text, tmp_path):
    settings = peer_settings(kind)
    with pytest.raises(ValueError, match=text):
        from_moe_peft(write_peer(tmp_path, {**settings, "num_experts": number}, peer_tensors(settings)))


@KIND
def test_a_layer_that_is_missing(kind, tmp_path):
    """Also a far one, at no cost."""
    settings = peer_settings(kind)
    tensors = {name.replace("layers.1.", "layers.1000000000."): t for name, t in peer_tensors(settings).items()}
    with pytest.raises(ValueError, match="layers 1 to 999999999: all tensors missing"):
        from_moe_peft(write_peer(tmp_path, settings, tensors))


def test_another_methods_tensors(tmp_path):
    with pytest.raises(ValueError, match=r"begins with mixlora\.layers\.<number>; they are called mola\.layers\.0"):
        from_moe_peft(write_peer(tmp_path, peer_settings("MIXLORA"), peer_tensors(peer_settings("MOLA"))))


@pytest.mark.parametrize(("linear", "kind"), [("fc1", "MIXLORA"), ("gate_up_proj", "MOLA"), ("gate_up_proj", "LORA")])
def test_mlps_without_gate_up_and_down(linear, kind, tmp_path):
    settings = peer_settings(kind)
    tensors = {name.replace("gate_proj", linear): tensor for name, tensor in peer_tensors(settings).items()}
    settings["target_modules"] = [linear if name == "gate_proj" else name for name in settings["target_modules"]]
    with pytest.raises(ValueError, match=f"adapts {linear} in the MLPs; only MLPs of gate_proj, up_proj, down_proj"):
        from_moe_peft(write_peer(tmp_path, settings, tensors))


def test_adapters_without_experts(tmp_path):
    with pytest.raises(ValueError, match="adapts no linear of the MLPs"):
        imported(tmp_path, "MOLA", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"one MLP per layer; it has none: PEFT loads such an adapter as it is"):
        imported(tmp_path, "LORA", target_modules=["q_proj"])


@pytest.mark.parametrize("kind", ["MIXLORA", "MOLA", "LORA"])
def test_a_projection_in_the_list_without_tensors(kind, tmp_path):
    """Only names that other models use for the same linear may be absent."""
    settings = peer_settings(kind, target_modules=["q_proj", *MLP])
    tensors = peer_tensors(settings)
    with pytest.raises(ValueError, match=r"k_proj.*(missing|no tensors)"):
        from_moe_peft(write_peer(tmp_path, {**settings, "target_modules": ["q_proj", "k_proj", *MLP]}, tensors))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("MIXLORA", {"routing_strategy": "mixlora-switch"}, "routing_strategy='mixlora-switch': only 'mixlora'"),
        ("MIXLORA", {"routing_strategy": "mixlora-dynamic"}, "routing_strategy='mixlora-dynamic'"),
        ("MIXLORA", {"routing_strategy": None}, "routing_strategy=None"),
        ("MOLA", {"routing_strategy": "mixlora"}, "only 'mola' is computed here for MOLA"),
        ("MIXLORA", {"jitter_noise": 0.1}, "jitter_noise=0.1: the MLPs' input is multiplied by noise"),
        ("MIXLORA", {"use_dora": True}, "MoE-PEFT does not save the magnitudes of DoRA.*set it to false.*once loaded"),
        ("LORAMOE", {"use_dora": True}, "set it to false.*for LoRAMoE it ignores use_dora"),
        ("MOLA", {"use_dora": True}, "set it to false.*for MoLA it ignores use_dora"),
        ("MIXLORA", {"expert_lora": {"use_dora": True}}, "expert_lora: use_dora: MoE-PEFT does not save"),
        ("MIXLORA", {"expert_lora": {"use_rslora": True}}, "use_rslora must be the same"),
        ("MIXLORA", {"expert_lora": {"rank_drop": 2}}, "expert_lora: rank_drop=2: not known here"),
        ("MIXLORA", {"expert_lora": 3}, "expert_lora must be an object of settings, got 3"),
        ("MIXLORA", {"expert_lora": {"bias": "all"}}, "expert_lora: bias='all'"),
        ("MOLA", {"expert_lora": {"r": 2}}, "MOLA has no settings for its experts alone"),
        ("MIXLORA", {"bias": "all"}, "bias='all': only 'none'"),
        ("MIXLORA", {"temperature": 0.5}, "temperature=0.5: not known here; take it out of adapter_config.json if"),
        ("MIXLORA", {"num_experts": "3"}, "num_experts must be a whole number, got '3'"),
        ("MIXLORA", {"top_k": "2"}, "top_k must be a whole number, got '2'"),
        ("MIXLORA", {"router_aux_loss_coef": "x"}, "router_aux_loss_coef must be a number, got 'x'"),
        ("MIXLORA", {"use_rslora": "yes"}, "use_rslora must be True or False, got 'yes'"),
        ("MIXLORA", {"top_k": 4}, "top_k=4 exceeds num_experts=3"),
        ("LORAMOE", {"target_modules": ["q_proj", *MLP]}, "LoRA on q_proj: LoRAMoE here adapts the MLPs alone"),
        ("MIXLORA", {"target_modules": "all"}, "target_modules must be a list of names, got 'all'"),
    ],
)
def test_what_is_not_computed_here(kind, changes, text, tmp_path):
    """Refused by name, before a tensor is converted."""
    tensors = peer_tensors(
        peer_settings(kind, target_modules=[*(["q_proj"] if "q_proj" in str(changes) else []), *MLP])
    )
    settings = peer_settings(kind, target_modules=list(MLP))
    settings = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=re.compile(text, re.DOTALL)):
        from_moe_peft(write_peer(tmp_path, settings, tensors))


def test_all_reasons_against_a_file_stand_in_one_message(tmp_path):
    settings = peer_settings("MIXLORA", lora_alpha=None, use_dora=True, jitter_noise=0.1, temperature=2)
    with pytest.raises(ValueError, match="cannot be converted") as error:
        from_moe_peft(write_peer(tmp_path, settings))
    contains(error, "lora_alpha: missing", "use_dora", "jitter_noise", "temperature")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"use_qalora": True}, "use_qalora=True"),
        (
            {"rank_pattern": {"up_proj": 4, "gate_proj": 2}},
            "must have the same rank and alpha.*gate_proj r=2 .*up_proj r=4",
        ),
        ({"alpha_pattern": {"down_proj": 9}}, "must have the same rank and alpha.*down_proj r=4 alpha=9"),
        ({"layers_to_transform": [0]}, "layer 1: not in layers_to_transform"),
        ({"layers_to_transform": [0, 1, 2]}, "layer 2: all tensors missing"),
        ({"use_dora": True}, "lora_magnitude_vector: missing"),
        ({"a_new_option": 1}, "a_new_option=1: not known here"),
        ({"target_modules": [1]}, r"target_modules must be a regular expression, or a list of module names, got \[1\]"),
        ({"r": None}, "r: missing from adapter_config.json"),
    ],
)
def test_lora_that_has_no_equal_here(changes, text, tmp_path):
    settings = peer_settings("LORA")
    with pytest.raises(ValueError, match=text):
        from_moe_peft(
            write_peer(
                tmp_path,
                peer_settings("LORA", **changes) if None in changes.values() else {**settings, **changes},
                peer_tensors(settings),
            )
        )


def test_lora_in_other_places(tmp_path):
    settings = peer_settings("LORA")
    tensors = peer_tensors(settings)
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}
    with pytest.raises(ValueError, match=r"lm_head\.lora_A\.weight: has no place"):
        from_moe_peft(write_peer(tmp_path / "head", settings, tensors | head))
    tower = {name.replace("model.layers", "vision.layers"): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="the layers of one decoder"):
        from_moe_peft(write_peer(tmp_path / "tower", settings, tensors | tower))
    experts = {name.replace(".mlp.", ".mlp.experts.0."): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"one MLP per layer; it has mlp, mlp\.experts\.0"):
        from_moe_peft(write_peer(tmp_path / "experts", settings, tensors | experts))


def test_dora_without_all_linears_of_the_mlp(tmp_path):
    settings = peer_settings("LORA", use_dora=True, target_modules=["up_proj"])
    with pytest.raises(ValueError, match="DoRA on up_proj without the MLP's other linears"):
        from_moe_peft(write_peer(tmp_path, settings))


# --- our own files ---------------------------------------------------------------------------------------------------


def test_our_own_damaged_adapter_is_named_tensor_by_tensor(tmp_path):
    tiny_peft_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SAFETENSORS)
    mlp = "base_model.model.model.layers.1.mlp.lora_graphmoe"
    del tensors[f"{mlp}.gru.candidate.bias"]
    tensors[f"{mlp}.router.weight"] = torch.zeros(5, 32)
    tensors["base_model.model.more"] = torch.zeros(1)
    save_file(tensors, tmp_path / SAFETENSORS)
    with pytest.raises(ValueError, match="is not whole") as error:
        read_adapter(tmp_path)
    contains(error, "candidate.bias: missing", "router.weight: [5, 32], expected [4, 32]", "more: has no place")


def test_our_own_configuration_that_does_not_fit(tmp_path):
    tiny_peft_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "gru_hidden_scale": 0.5}))
    with pytest.raises(ValueError, match=r"width 8, but gru_hidden_scale=0\.5 of the hidden size 32 is 16"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rounds": 1}))
    with pytest.raises(ValueError, match=r"gru\.candidate\.bias: has no place"):
        read_adapter(tmp_path)
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, tmp_path / SAFETENSORS
    )
    with pytest.raises(ValueError, match="there is no adapted MLP"):
        read_adapter(tmp_path)


def test_a_plain_lora_config_is_no_graphmoe_adapter(tmp_path):
    LoraConfig(r=2).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="peft_type 'LORA', expected 'GRAPHMOE'"):
        read_adapter(tmp_path)

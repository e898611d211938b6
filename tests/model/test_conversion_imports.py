"""Adapters of MoE-PEFT read as GraphMoE's: what they compute, every tensor bit for bit, what is said of the rest."""

import json

import pytest
import torch
from peft import PeftModel

from graphmoe_model import router_loss
from graphmoe_model.conversion import from_moe_peft, to_moe_peft, write_adapter
from tests.model.peer_format import ATTENTION, KINDS, equal, peer_settings, peer_tensors, with_peer_adapter, write_peer
from tests.model.tiny_models import logits, tiny_model

pytestmark = pytest.mark.methods

KIND = pytest.mark.parametrize("kind", KINDS)


def check_import(settings: dict, folder) -> None:
    """A checkpoint of these settings computes here what its equations say, in fp64: in fp32 the two orders of summation
    differ by up to 3e-5 at these sizes."""
    expected = logits(with_peer_adapter(tiny_model().double(), settings, peer_tensors(settings)))
    write_adapter(from_moe_peft(write_peer(folder / "theirs", settings)), folder / "ours")
    found = logits(PeftModel.from_pretrained(tiny_model().double(), folder / "ours"))
    assert (expected - logits(tiny_model().double())).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@KIND
def test_an_imported_adapter_computes_what_the_equations_of_its_checkpoint_say(kind, tmp_path):
    """Names, stacking, scale and routing at once: any mistake in one of them moves the logits."""
    check_import(peer_settings(kind), tmp_path)


VARIANTS = {
    "rank and alpha of the experts": {"expert_lora": {"r": 3, "lora_alpha": 5}},
    "rslora": {"use_rslora": True},
    "one expert a token": {"top_k": 1},
    "no gate_proj": {"target_modules": [*ATTENTION, "up_proj", "down_proj"]},
    "down_proj alone": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "no attention": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_mixlora_compute_what_their_equations_say(variant, tmp_path):
    check_import(peer_settings("MIXLORA", **VARIANTS[variant]), tmp_path)


@pytest.mark.parametrize("kind", ["LORAMOE", "MOLA", "LORA"])
def test_linears_that_other_methods_leave_out_stay_as_they_are(kind, tmp_path):
    attention = ATTENTION if kind != "LORAMOE" else ()
    check_import(peer_settings(kind, target_modules=[*attention, "up_proj"], use_rslora=True), tmp_path)


def test_a_linear_that_is_left_out_stays_so_in_training(tmp_path):
    """Zero A and zero B: neither has a gradient."""
    settings = peer_settings("MIXLORA", target_modules=["q_proj", "up_proj", "down_proj"])
    adapter = from_moe_peft(write_peer(tmp_path / "theirs", settings))
    assert any("gate_proj" in note and "zeros" in note for note in adapter.notes)
    write_adapter(adapter, tmp_path / "ours")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "ours", is_trainable=True).train()
    ids = torch.randint(3, 60, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".experts." in name}
    assert all(bool(g.any()) != ("gate_proj" in name) for name, g in gradients.items())


@KIND
def test_what_an_import_says_of_the_configuration(kind, tmp_path):
    config = from_moe_peft(write_peer(tmp_path, peer_settings(kind, use_rslora=True))).config
    assert (config.method, config.rounds, config.r, config.lora_alpha) == (kind.lower(), 1, 4, 6)
    assert (config.lora_dropout, config.use_rslora, config.use_dora) == (0.05, True, False)
    assert config.base_model_name_or_path == "some/llama"
    assert config.task_type == "CAUSAL_LM"
    attention = set() if kind == "LORAMOE" else set(ATTENTION)
    assert set(config.target_modules) == {"mlp", *attention}
    assert config.num_experts == (1 if kind == "LORA" else 3)
    assert config.top_k == {"LORA": 1, "LORAMOE": 3}.get(kind, 2)


@pytest.mark.parametrize(
    ("kind", "fields", "coefficient"),
    [
        ("MIXLORA", {}, 0.002),
        ("MIXLORA", {"router_aux_loss_coef": 0.02}, 0.04),
        ("MIXLORA", {"router_aux_loss_coef": 0.01, "top_k": 3}, 0.03),
        ("MIXLORA", {"router_loss": False, "router_aux_loss_coef": 0.02}, 0.0),
        ("MOLA", {}, 0.0),
        ("MOLA", {"router_loss": True, "router_aux_loss_coef": 0.02}, 0.04),
        ("LORAMOE", {"router_aux_loss_coef": 0.02}, 0.0),
    ],
)
def test_the_load_balance_loss_is_theirs(kind, fields, coefficient, tmp_path):
    """On by default for MixLoRA, off for MoLA, none for LoRAMoE; of the full softmax; k times as large, and back."""
    adapter = from_moe_peft(write_peer(tmp_path / "theirs", peer_settings(kind, **fields)))
    assert adapter.config.router_aux_loss_coef == coefficient
    assert adapter.config.router_aux_loss == "switch"
    to_moe_peft(adapter, tmp_path / "back")
    assert from_moe_peft(tmp_path / "back").config.router_aux_loss_coef == coefficient
    if coefficient:
        back = json.loads((tmp_path / "back/adapter_config.json").read_text())["router_aux_loss_coef"]
        assert back == fields.get("router_aux_loss_coef", 0.001)


def test_the_load_balance_loss_has_the_value_of_theirs(tmp_path):
    """coef * n * sum over slots and experts of f[slot, e] P[e], for one layer (there, layers count as one batch)."""
    settings = peer_settings("MIXLORA", router_aux_loss_coef=0.5)
    tensors = {name: tensor for name, tensor in peer_tensors(settings).items() if ".0." in name.split("experts")[0]}
    write_adapter(from_moe_peft(write_peer(tmp_path / "theirs", settings, tensors)), tmp_path / "ours")
    base = tiny_model(num_hidden_layers=1)
    model = PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True).train()
    inputs = []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(input_ids=torch.randint(3, 60, (2, 9)))
    p = (inputs[0].flatten(0, 1) @ tensors["mixlora.layers.0.mlp.moe_gate.weight"].T).softmax(-1)  # [N, n]
    slots = torch.nn.functional.one_hot(p.topk(2).indices, 3).float().mean(0)  # f, [k, n]
    expected = 0.5 * 3 * (slots * p.mean(0)).sum()
    torch.testing.assert_close(router_loss(model).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
def test_tensors_are_read_as_they_are(dtype, safetensors, tmp_path):
    """Stacked, and nothing else: no cast, no copy of the wrong expert."""
    settings = peer_settings("MIXLORA")
    theirs = peer_tensors(settings, dtype=dtype)
    ours = from_moe_peft(write_peer(tmp_path, settings, theirs, safetensors=safetensors)).tensors
    for layer in range(2):
        mlp = f"base_model.model.model.layers.{layer}.mlp.lora_graphmoe"
        for linear in ("gate_proj", "up_proj", "down_proj"):
            for ab in "AB":
                names = [f"mixlora.layers.{layer}.mlp.{linear}.experts.{e}.lora_{ab}.weight" for e in range(3)]
                expected = torch.stack([theirs[name] for name in names])
                equal({"": ours[f"{mlp}.experts.{linear}.{ab}"]}, {"": expected})
        equal({"": ours[f"{mlp}.router.weight"]}, {"": theirs[f"mixlora.layers.{layer}.mlp.moe_gate.weight"]})


def test_notes_tell_what_could_not_be_checked(tmp_path):
    settings = peer_settings(
        "MIXLORA", act_fn="silu", task_type="causal", target_modules=[*ATTENTION, "fc1", "up_proj"]
    )
    tensors = peer_tensors({**settings, "target_modules": [*ATTENTION, "up_proj"]})
    notes = "\n".join(from_moe_peft(write_peer(tmp_path, settings, tensors)).notes)
    for text in ("act_fn is 'silu'", "task_type 'causal'", "target_modules has fc1", "gate_proj, down_proj", "0.001"):
        assert text in notes


def test_a_dictionary_of_targets_is_read_as_well(tmp_path):
    """MoE-PEFT reads target_modules in both forms."""
    settings = peer_settings("MIXLORA")
    chosen = {**dict.fromkeys(settings["target_modules"], True), "dense": False}
    adapter = from_moe_peft(write_peer(tmp_path, {**settings, "target_modules": chosen}, peer_tensors(settings)))
    assert set(adapter.config.target_modules) == {"mlp", *ATTENTION}

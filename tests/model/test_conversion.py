"""Adapters of other formats, there and back: every tensor bit for bit, every setting that the formats share."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from graphmoe_model import GraphMoEConfig
from graphmoe_model.conversion import (
    Adapter,
    attention_lora,
    from_moe_peft,
    read_adapter,
    to_moe_peft,
    to_peft,
    with_rounds,
    write_adapter,
)
from tests.model.method_models import trained_parameters
from tests.model.peer_format import (
    ATTENTION,
    HIDDEN,
    INTERMEDIATE,
    KINDS,
    equal,
    peer_settings,
    peer_shapes,
    peer_tensors,
    with_peer_adapter,
    write_peer,
)
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model

pytestmark = pytest.mark.methods

KIND = pytest.mark.parametrize("kind", KINDS)


def model_with(adapter: Adapter, folder):
    """The tiny Llama with the adapter, through its files."""
    write_adapter(adapter, folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


# --- there and back --------------------------------------------------------------------------------------------------


@KIND
def test_from_moe_peft_and_back_is_bitwise(kind, tmp_path):
    settings = peer_settings(kind, target_modules=[*(ATTENTION if kind != "LORAMOE" else ()), "up_proj", "down_proj"])
    theirs = write_peer(tmp_path / "theirs", settings)
    to_moe_peft(from_moe_peft(theirs), tmp_path / "back")
    equal(torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True), peer_tensors(settings))
    again = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert sorted(again.pop("target_modules")) == sorted(settings.pop("target_modules"))
    assert {name: again[name] for name in settings} == settings


@KIND
def test_to_moe_peft_and_back_is_bitwise(kind, tmp_path):
    """Whatever an adapter's file says comes back, but for what the other format does not know."""
    settings = peer_settings(kind, **({"expert_lora": {"r": 3, "lora_alpha": 5}} if kind == "MIXLORA" else {}))
    adapter = from_moe_peft(write_peer(tmp_path / "theirs", settings))
    to_moe_peft(adapter, tmp_path / "there")
    again = from_moe_peft(tmp_path / "there")
    equal(again.tensors, adapter.tensors)
    different = {k for k, v in again.config.to_dict().items() if v != adapter.config.to_dict()[k]}
    assert different <= {"inference_mode"}


@KIND
def test_the_written_names_and_shapes_are_the_peers(kind, tmp_path):
    settings = peer_settings(kind)
    to_moe_peft(from_moe_peft(write_peer(tmp_path / "theirs", settings)), tmp_path / "back")
    written = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == peer_shapes(settings)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    size = (tmp_path / "back" / "adapter_model.bin").stat().st_size
    assert size < 4 * sum(t.numel() for t in written.values()) + 1000 * len(written)  # no storage behind views


def test_a_file_of_ours_read_and_written_is_the_same(tmp_path):
    tiny_peft_model(init_lora_weights=False).save_pretrained(tmp_path / "one")
    adapter = read_adapter(tmp_path / "one")
    write_adapter(adapter, tmp_path / "two")
    equal(load_file(tmp_path / "two/adapter_model.safetensors"), load_file(tmp_path / "one/adapter_model.safetensors"))
    expected = logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "one"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "two")), expected)


def test_an_adapter_in_a_bin_file_is_read(tmp_path):
    tiny_peft_model(init_lora_weights=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    equal(read_adapter(tmp_path).tensors, tensors)


# --- PEFT's LoRA -----------------------------------------------------------------------------------------------------

LORA_FORMS = {
    "plain": {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "use_rslora": True},
    "dora": {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"], "use_dora": True},
    "some layers": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.[a-z_]*": 3},
        "alpha_pattern": {"mlp.[a-z_]*": 5},
    },
    "a regular expression": {"target_modules": r".*\.(k_proj|gate_proj|up_proj|down_proj)"},
    "left out": {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
}


def lora_model(**options):
    """The tiny Llama with PEFT's LoRA, nothing of which has its first value."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
    return model.eval()


@pytest.mark.parametrize("form", LORA_FORMS)
def test_pefts_own_lora_computes_the_same_here(form, tmp_path):
    model = lora_model(**LORA_FORMS[form])
    model.save_pretrained(tmp_path / "peft")
    ours = model_with(from_moe_peft(tmp_path / "peft"), tmp_path / "ours")
    assert (logits(model) - logits(tiny_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", LORA_FORMS)
def test_pefts_own_lora_comes_back_as_it_was(form, tmp_path):
    """PEFT's adapter, as GraphMoE's, and as PEFT's again: bit for bit the first file, and PEFT loads it."""
    model = lora_model(**LORA_FORMS[form])
    model.save_pretrained(tmp_path / "peft")
    first = load_file(tmp_path / "peft/adapter_model.safetensors")
    to_moe_peft(from_moe_peft(tmp_path / "peft"), tmp_path / "pickle")
    equal(torch.load(tmp_path / "pickle/adapter_model.bin", weights_only=True), first)
    to_peft(from_moe_peft(tmp_path / "peft"), tmp_path / "again")
    equal(load_file(tmp_path / "again/adapter_model.safetensors"), first)
    for folder in ("pickle", "again"):
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / folder)
        assert torch.equal(logits(again), logits(model))


def test_a_lora_that_was_trained_here_is_merged_as_pefts(tmp_path):
    """What the README and the refusal of `merge_and_unload` name as the way to a merged model."""
    config = tiny_config(method="lora", rounds=1, num_experts=None)
    model = get_peft_model(tiny_model(), config)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "ours")
    to_peft(read_adapter(tmp_path / "ours"), tmp_path / "peft")
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "peft").merge_and_unload()
    assert (logits(merged) - logits(tiny_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_the_attentions_lora_alone_is_what_the_model_has_without_its_experts(tmp_path):
    settings = peer_settings("MIXLORA", use_rslora=True, expert_lora={"r": 3})
    adapter = from_moe_peft(write_peer(tmp_path / "theirs", settings))
    notes = attention_lora(adapter, tmp_path / "attention")
    assert "MLPs" in notes[0]
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "attention")
    tensors = peer_tensors(settings)
    lora = {n.replace("mixlora.", "base_model.model.model."): t for n, t in tensors.items() if "self_attn" in n}
    alone = peer_settings("LORA", use_rslora=True, target_modules=list(ATTENTION))
    torch.testing.assert_close(
        logits(model), logits(with_peer_adapter(tiny_model(), alone, lora)), rtol=1e-5, atol=1e-5
    )
    equal(load_file(tmp_path / "attention/adapter_model.safetensors"), lora)


def test_the_attentions_lora_of_a_graphmoe_adapter(tmp_path):
    """Rounds do not matter to it: the attention's projections run once."""
    tiny_peft_model(init_lora_weights=False).save_pretrained(tmp_path / "ours")
    attention_lora(read_adapter(tmp_path / "ours"), tmp_path / "attention")
    names = load_file(tmp_path / "attention/adapter_model.safetensors")
    assert len(names) == 2 * 4 * 2
    assert isinstance(
        PeftModel.from_pretrained(tiny_model(), tmp_path / "attention").peft_config["default"], LoraConfig
    )


# --- rounds ----------------------------------------------------------------------------------------------------------


@KIND
def test_rounds_leave_the_output_as_it_was(kind, tmp_path):
    """W_g is zero: the second round sees what the first one saw."""
    adapter = from_moe_peft(write_peer(tmp_path / "theirs", peer_settings(kind)))
    before = logits(model_with(adapter, tmp_path / "one"))
    after = with_rounds(adapter, 3, gru_hidden_scale=0.25, candidate_activation="tanh")
    assert (after.config.rounds, after.config.candidate_activation) == (3, "tanh")
    torch.testing.assert_close(logits(model_with(after, tmp_path / "three")), before, rtol=1e-6, atol=1e-6)
    equal({name: after.tensors[name] for name in adapter.tensors}, adapter.tensors)
    assert adapter.config.rounds == 1


def test_the_fresh_gru_is_drawn_as_a_new_adapters(tmp_path):
    """Shapes, bounds and zeros of `RethinkingGRU`; other values in each layer; the same for the same seed alone."""
    adapter = from_moe_peft(write_peer(tmp_path, peer_settings("MIXLORA")))
    before = torch.get_rng_state()
    one, same, other = (with_rounds(adapter, 2, seed=seed, gru_hidden_scale=0.25) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    equal(one.tensors, same.tensors)
    grus = [f"base_model.model.model.layers.{layer}.mlp.lora_graphmoe.gru" for layer in (0, 1)]
    for gru in grus:
        for gate in ("update_gate", "reset_gate", "candidate"):
            weight = one.tensors[f"{gru}.{gate}.weight"]
            assert weight.shape == (8, 40)
            assert 0.8 / 40**0.5 < weight.abs().max() <= 1 / 40**0.5
            assert not torch.equal(weight, other.tensors[f"{gru}.{gate}.weight"])
        assert not one.tensors[f"{gru}.output_proj.weight"].any()
        assert not one.tensors[f"{gru}.candidate.bias"].any()
    assert not torch.equal(*(one.tensors[f"{gru}.update_gate.weight"] for gru in grus))


def test_a_fresh_gru_has_the_experts_dtype(tmp_path):
    settings = peer_settings("MIXLORA")
    adapter = from_moe_peft(write_peer(tmp_path, settings, peer_tensors(settings, dtype=torch.bfloat16)))
    assert {tensor.dtype for tensor in with_rounds(adapter, 2).tensors.values()} == {torch.bfloat16}


# --- methods of ours, made by ours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "mixlora", "loramoe", "mola"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_every_form_of_ours_is_read_whole(method, rounds, use_dora, tmp_path):
    """What the layers save is what the conversion expects of a file, for every form."""
    settings = {} if method == "lora" else {"num_experts": 3}
    config = {"task_type": "CAUSAL_LM", "r": 4, "gru_hidden_scale": 0.25, "init_lora_weights": False, **settings}
    model = get_peft_model(tiny_model(), GraphMoEConfig(method=method, rounds=rounds, use_dora=use_dora, **config))
    model.save_pretrained(tmp_path / "ours")
    adapter = read_adapter(tmp_path / "ours")
    again = model_with(adapter, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_other_tensors_of_an_adapter_are_kept(tmp_path):
    """modules_to_save."""
    model = get_peft_model(tiny_model(), tiny_config(rounds=1, modules_to_save=["lm_head"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.tensors["base_model.model.lm_head.weight"].shape == (64, HIDDEN)
    assert torch.equal(logits(model_with(adapter, tmp_path / "again")), logits(model))


def test_expert_counts_that_differ_by_layer_are_read(tmp_path):
    """The tensors tell them; rank patterns by layer are looked up as PEFT does."""
    config = tiny_config(rounds=1, num_experts=[2, 3], rank_pattern={"layers.1.mlp": 2})
    tensors = {}
    for layer, (n, r) in enumerate([(2, 4), (3, 2)]):
        mlp = f"base_model.model.model.layers.{layer}.mlp.lora_graphmoe"
        tensors[f"{mlp}.router.weight"] = torch.zeros(n, HIDDEN)
        for linear in ("gate_proj", "up_proj", "down_proj"):
            fro, to = (INTERMEDIATE, HIDDEN) if linear == "down_proj" else (HIDDEN, INTERMEDIATE)
            tensors |= {
                f"{mlp}.experts.{linear}.A": torch.ones(n, r, fro),
                f"{mlp}.experts.{linear}.B": torch.ones(n, to, r),
            }
    config.save_pretrained(str(tmp_path))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    equal(read_adapter(tmp_path).tensors, tensors)

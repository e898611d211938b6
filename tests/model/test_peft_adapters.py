"""Adapters on one model: adding, choosing, disabling, deleting, unloading; and what cannot be done with them."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model, tokens, train_step


@pytest.fixture
def base_logits() -> torch.Tensor:
    return logits(tiny_model())


def random_model(model_type: str = "llama") -> PeftModel:
    """An adapter whose every tensor counts."""
    return tiny_peft_model(model_type, init_lora_weights=False)


def two_adapters() -> PeftModel:
    """`random_model` with a second, inactive adapter of other sizes."""
    model = random_model()
    model.add_adapter("second", tiny_config(init_lora_weights=False, r=2, num_experts=3, rounds=2))
    return model


def test_trainable_parameters_are_the_adapter_and_nothing_else():
    model = tiny_peft_model()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_A.default." in n or ".lora_B.default." in n or ".lora_graphmoe.default." in n for n in names)
    adapter = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names == adapter


def test_print_trainable_parameters(capsys):
    """D=32, F=48, n=4, r=4, G=8: the MLP's share by hand, the attention's as LoRA has it."""
    tiny_peft_model().print_trainable_parameters()
    router, experts = 4 * 32, 4 * 4 * (2 * (32 + 48) + 48 + 32)
    gru = 3 * 8 * (8 + 32) + 8 + 32 * 8
    attention = 4 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32)  # q and o: 32 -> 32; k and v: 32 -> 16
    assert f"trainable params: {2 * (router + experts + gru + attention):,}" in capsys.readouterr().out


def test_disabled_adapters_give_the_base_model_bit_for_bit(base_logits):
    model = random_model()
    adapted = logits(model)
    assert not torch.allclose(adapted, base_logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2"])
def test_unload_gives_the_base_model_back(model_type):
    """The same modules and parameters, the same output, and no trace of the adapter."""
    model = tiny_model(model_type)
    expected = logits(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    peft_model = get_peft_model(model, tiny_config(init_lora_weights=False))
    train_step(peft_model)
    unloaded = peft_model.unload()
    assert unloaded is model
    assert {n: id(m) for n, m in unloaded.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {n: id(p) for n, p in unloaded.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert torch.equal(logits(unloaded), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about a model that looks adapted
        get_peft_model(unloaded, tiny_config())


def test_a_further_adapter_changes_nothing_until_it_is_chosen():
    model = random_model()
    first = logits(model)
    model.add_adapter("second", tiny_config(init_lora_weights=False, r=2, num_experts=3, rounds=2))
    assert torch.equal(logits(model), first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any(".second." in name for name in trainable)


def test_adapters_of_different_sizes_are_switched():
    """Each gives what it gives alone, again and again, and only the chosen one trains."""
    model = two_adapters()
    outputs = {}
    for name in ("default", "second", "default", "second"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert torch.equal(outputs.setdefault(name, logits(model)), logits(model))
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable
        assert all(f".{name}." in n for n in trainable)
    assert not torch.allclose(outputs["default"], outputs["second"])


def test_an_adapter_on_other_layers_leaves_the_rest_to_the_base_model():
    """layers_to_transform=[1]: layer 0 runs the base MLP while this adapter is active."""
    model = tiny_peft_model(layers_to_transform=[0], init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter("second", tiny_config(layers_to_transform=[1], init_lora_weights=False))
    model.set_adapter("second")
    torch.manual_seed(0)
    alone = tiny_peft_model(layers_to_transform=[1], init_lora_weights=False)
    state = {n.replace(".second", ".default"): t for n, t in model.state_dict().items() if ".second" in n}
    alone.load_state_dict(state, strict=False)
    assert torch.equal(logits(model), logits(alone))


def test_deleted_adapters_are_gone(base_logits):
    model = two_adapters()
    first = logits(model)
    model.delete_adapter("second")
    assert not any(".second" in name for name in model.state_dict())
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), base_logits)  # a PeftModel without any adapter refuses to run


def test_deleting_the_active_adapter_activates_the_other():
    model = two_adapters()
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model), second)


# --- what a GraphMoE adapter cannot do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "merge",
    [lambda m: m.merge_and_unload(), lambda m: m.merge_adapter(), lambda m: m.merge_and_unload(safe_merge=True)],
)
def test_merging_is_refused_before_anything_is_merged(merge):
    """Attention LoRA could be merged, and would be, before the first MLP refused: neither happens."""
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged into the base model.*unload\(\)"):
        merge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), expected)


def test_weighted_sums_are_refused():
    model = two_adapters()
    with pytest.raises(NotImplementedError, match="cannot be combined by weights"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    assert list(model.peft_config) == ["default", "second"]


def test_two_active_adapters_are_refused():
    model = two_adapters()
    with pytest.raises(ValueError, match="one GraphMoE adapter can be active at a time, got default, second"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]


def test_two_active_adapters_are_refused_also_without_a_peft_model():
    """Transformers' own set_adapter asks nobody; the layers notice."""
    model = tiny_model()
    model.add_adapter(tiny_config(), "default")
    with pytest.warns(UserWarning, match="multiple adapters"):
        model.add_adapter(tiny_config(), "second")
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one GraphMoE adapter can be active at a time, got default, second"):
        logits(model)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_batches_that_mix_adapters_are_refused(call):
    model = two_adapters().eval()
    run = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=r"adapter_names .* is not supported by GraphMoE"):
        run(input_ids=tokens(), adapter_names=["default", "second"])


@pytest.mark.parametrize("name", ["router", "experts", "gru", "layers", "mlp", "lora_A", "weight", "q_proj"])
def test_names_that_would_lose_weights_are_refused(name):
    """PEFT leaves keys with another adapter's name in them out of a checkpoint: '.layers.' is in all of them."""
    model = random_model()
    with pytest.raises(ValueError, match=f"adapter name '{name}' is also the name of a module"):
        model.add_adapter(name, tiny_config())
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=f"adapter name '{name}' is also the name of a module"):
        get_peft_model(tiny_model(), tiny_config(), adapter_name=name)


def test_other_methods_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(tiny_model(), tiny_config(), mixed=True)


def test_pissa_conversion_is_refused(tmp_path):
    model = random_model()
    with pytest.raises(ValueError, match="GraphMoE has none: leave it out"):
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "b"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj"]}, "selects no gated MLP .the model's gated MLPs are called mlp"),
        ({"layers_to_transform": [4]}, "no MLP of LlamaForCausalLM is left to adapt"),
    ],
)
def test_a_refused_further_adapter_leaves_no_trace(settings, message):
    model = random_model()
    expected, names = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", tiny_config(**settings))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), expected)


# --- folds must never be stale ---------------------------------------------------------------------------------------


def literal_logits(model: nn.Module) -> torch.Tensor:
    """The logits without any fold."""
    layers = [m for m in model.modules() if isinstance(m, FusedGraphMoEFFN)]
    configs = {id(a.config): a.config for layer in layers for a in layer.lora_graphmoe.values()}
    for config in configs.values():
        config.fold = "never"
    try:
        with torch.no_grad():
            return model(input_ids=tokens()).logits
    finally:
        for config in configs.values():
            config.fold = "auto"


def folded_logits(model: nn.Module) -> torch.Tensor:
    """The logits with cached folds, and no call of eval(), which would drop them."""
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def replace_base_weight(model):
    layer = model.base_model.model.model.layers[0].mlp.base_layer
    layer.down_proj.weight = nn.Parameter(layer.down_proj.weight.detach() * -1, requires_grad=False)


def scale_in_place(model):
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.lora_graphmoe["default"].gru.output_proj.weight.mul_(3)


def load_zeros(model):
    state = {name: t * 0 if "lora_graphmoe" in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)


def replace_adapter(model):
    model.delete_adapter("default")
    torch.manual_seed(7)
    model.add_adapter("default", tiny_config(init_lora_weights=False))
    model.set_adapter("default")


def optimizer_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_adapter("second"),
        lambda m: m.to(torch.float64),
        replace_adapter,
        replace_base_weight,
        scale_in_place,
        load_zeros,
        optimizer_step,
    ],
    ids=["set_adapter", "to", "replaced adapter", "replaced weight", "in place", "load_state_dict", "optimizer"],
)
def test_a_change_through_peft_or_torch_reaches_the_folds(change):
    """A stale fold is a wrong answer. The folded and the literal logits agree before and after each change."""
    model = two_adapters().eval()
    before = folded_logits(model)
    torch.testing.assert_close(before, literal_logits(model), rtol=1e-4, atol=1e-4)
    change(model)
    after = folded_logits(model)
    torch.testing.assert_close(after, literal_logits(model), rtol=1e-4, atol=1e-4)
    assert after.dtype == torch.float64 or not torch.allclose(before, after, atol=1e-2)


def test_a_reloaded_adapter_reaches_the_folds(tmp_path):
    """load_adapter under a name that exists writes into its tensors."""
    other = tiny_peft_model(seed=0, init_lora_weights=False)
    model = random_model().eval()
    train_step(other)
    other.eval().save_pretrained(tmp_path)
    folded_logits(model)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(folded_logits(model), literal_logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), logits(other))

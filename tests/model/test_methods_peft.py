"""Every method of the paper as a PEFT method on a tiny Llama: what is adapted, trained, saved, loaded and recorded."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoRALinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig, collect_routing
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_tables.methods import PRESETS
from tests.model.loaders import LOADERS
from tests.model.method_models import (
    LAYERS,
    LINEARS,
    OUT,
    PROJECTIONS,
    D,
    F,
    adapted,
    as_lora,
    config,
    decoder_layers,
    randomise,
    saved_and_loaded,
    train,
    trained_parameters,
)
from tests.model.method_oracles import FORMS, by_equations, expected_shapes
from tests.model.tiny_models import logits, tiny_model, tokens

pytestmark = pytest.mark.methods

ALL = pytest.mark.parametrize("form", FORMS)
DORA_FORMS = [form for form, (preset, _) in FORMS.items() if PRESETS[preset]["use_dora"]]


@ALL
def test_fresh_adapter_leaves_the_model_as_it_was(form):
    """Whatever the method, and wherever the routers send the tokens."""
    ids = tokens()
    before = logits(tiny_model().double(), ids)
    model = adapted(form, tiny_model().double(), init_lora_weights=True)
    assert relative_error(logits(model, ids), before) <= 1e-12
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if name.endswith("router.weight"):
                parameter.mul_(50)
    assert relative_error(logits(model, ids), before) <= 1e-12


@ALL
def test_what_is_adapted(form):
    """The attention: plain LoRA (LoRA, MixLoRA), experts (MoLA) or nothing (LoRAMoE); the MLP: always."""
    model = adapted(form)
    method, use_dora = config(form).method, config(form).use_dora
    kind = {"lora": LoRALinear, "mixlora": LoRALinear, "loramoe": nn.Linear, "mola": RoutedLoRALinear}[method]
    for layer in decoder_layers(model):
        assert type(layer.mlp) is FusedGraphMoEFFN
        for name in PROJECTIONS:
            projection = getattr(layer.self_attn, name)
            assert type(projection) is kind
            if kind is LoRALinear:
                assert bool(projection.lora_magnitude_vector) == use_dora
    trained = {name.replace(".default", "") for name in trained_parameters(model)}
    assert trained == set(expected_tensors(form)), "nothing else trains"


def expected_tensors(form: str) -> dict[str, tuple]:
    """Names and shapes of a checkpoint by the contract."""
    settings = config(form)
    n, r = (1 if settings.method == "lora" else 4), settings.r
    mlp = {f"mlp.lora_graphmoe.{name}": shape for name, shape in expected_shapes(settings, n, D, F).items()}
    attention: dict[str, tuple] = {}
    for name in PROJECTIONS:
        prefix, out = f"self_attn.{name}", OUT[name]
        if settings.method in ("lora", "mixlora"):
            attention |= {f"{prefix}.lora_A.weight": (r, D), f"{prefix}.lora_B.weight": (out, r)}
            attention |= {f"{prefix}.lora_magnitude_vector.weight": (out,)} if settings.use_dora else {}
        if settings.method == "mola":
            own = {"A": (n, r, D), "B": (n, out, r), "router.weight": (n, D)}
            own |= {"magnitude": (n, out)} if settings.use_dora else {}
            attention |= {f"{prefix}.lora_graphmoe.{part}": shape for part, shape in own.items()}
    return {
        f"base_model.model.model.layers.{i}.{name}": shape
        for i in range(LAYERS)
        for name, shape in (mlp | attention).items()
    }


@ALL
def test_saved_adapters_load_by_the_documented_names(form, tmp_path):
    """A checkpoint holds the documented tensors and no others; loaded, it gives the same logits to the bit."""
    model = adapted(form)
    fresh = logits(model)
    randomise(model)
    loaded = saved_and_loaded(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == expected_tensors(form)
    assert all(t.any() for t in saved.values()), "zeros that are lost and made again are not missed"
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), fresh), "what was saved is not what a new adapter starts from"
    assert loaded.peft_config["default"].title == config(form).title


@ALL
def test_every_trainable_parameter_gets_a_gradient(form):
    """None is left out of the graph: a parameter that cannot learn would be saved and counted for nothing."""
    model = adapted(form).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    idle = "gru.reset_gate" if config(form).rounds == 2 else "nothing"  # it acts on a state that is still zero
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or idle in name, name


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_one_expert_is_peft_s_own_lora(form):
    """LoRA and DoRA, MLP included, compute what PEFT's LoRA layers on all seven linears do with the same tensors."""
    settings = config(form)
    ours = adapted(form, tiny_model().double())
    randomise(ours)
    targets = [*PROJECTIONS, *LINEARS]
    theirs_config = LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, target_modules=targets)
    theirs_config.use_dora = settings.use_dora
    theirs = get_peft_model(tiny_model().double(), theirs_config)
    theirs.load_state_dict(as_lora(trained_parameters(ours)), strict=False)
    assert len(as_lora(trained_parameters(ours))) == len(trained_parameters(theirs))
    assert relative_error(logits(ours), logits(theirs)) <= 1e-12


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if "graphmoe" in form else ()) for form in DORA_FORMS]
)
def test_magnitudes_are_trained_and_saved(form, tmp_path):
    """After 20 steps of AdamW they differ from their start, in the MLP and in the attention, and load to the bit."""
    model = adapted(form, init_lora_weights=True)
    start = {name: p.detach().clone() for name, p in trained_parameters(model).items() if "magnitude" in name}
    expected = {name for name in expected_tensors(form) if "magnitude" in name}
    assert len(start) == len(expected) > 0
    train(model, 20)
    trained = trained_parameters(model)
    for name, before in start.items():
        assert not torch.equal(trained[name], before), name
    loaded = saved_and_loaded(model, tmp_path)
    after = dict(loaded.named_parameters())
    for name in start:
        assert torch.equal(after[name], trained[name]), name
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("form", ["dora", "graphmoe-mixdora", "doramoe", "moda"])
def test_the_trainers_optimizer_has_every_parameter(form, tmp_path):
    """Trainer sorts parameters by name into groups: magnitudes, routers and experts are in one of them."""
    model = adapted(form)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained_parameters(model).values()}


@pytest.mark.parametrize("num_experts", ["2-4", [2, 4]], ids=str)
@pytest.mark.parametrize(
    "form", ["graphmoe-mixlora", "mixdora", "loramoe", "graphmoe-doramoe", "mola", "graphmoe-moda"]
)
def test_expert_counts_by_layer(form, num_experts, tmp_path):
    """Each decoder layer has its own n, in the MLP and in the attention's experts, also after loading."""
    model = adapted(form, num_experts=num_experts)
    randomise(model)
    loaded = saved_and_loaded(model, tmp_path)
    for each in (model, loaded):
        for layer, n in zip(decoder_layers(each), (2, 4), strict=True):
            stacked = [m for m in layer.modules() if isinstance(m, FusedGraphMoEFFN | RoutedLoRALinear)]
            assert len(stacked) == (5 if config(form).method == "mola" else 1)
            for module in stacked:
                counts = {p.shape[0] for name, p in module.lora_graphmoe.named_parameters() if "gru" not in name}
                assert counts == {n}
    assert torch.equal(logits(loaded), logits(model))


def inputs_of(model: nn.Module, *names: str) -> dict[str, list[Tensor]]:
    """Module name -> its inputs [N, in] from now on."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_base_model().get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, kept=seen[name]: kept.append(args[0].flatten(0, 1)))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("form", ["mola", "graphmoe-mola", "graphmoe-moda", "loramoe", "graphmoe-loramoe"])
def test_routing_is_collected_by_linear(form):
    """Every linear's router is named, and its counts are those of the equations on what the layer was given."""
    model = adapted(form).eval()
    randomise(model)
    settings, ids = config(form), tokens()
    projections = PROJECTIONS if settings.method == "mola" else ()
    attention = [f"model.layers.{i}.self_attn.{name}" for i in range(LAYERS) for name in projections]
    mlps = [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    seen = inputs_of(model, *attention, *mlps)
    with collect_routing(model) as routing:
        model(input_ids=ids)
    assert set(routing.counts) == {*attention, *(f"{mlp}.{linear}" for mlp in mlps for linear in LINEARS)}
    for name, (x,) in seen.items():
        scores: list[Tensor] = []
        by_equations(model.get_base_model().get_submodule(name), x, scores)
        counts = torch.stack([_chosen(s, settings) for s in scores])  # [rounds * routers, n]
        if name in attention:
            assert torch.equal(routing.counts[name], counts)
        else:
            for index, linear in enumerate(LINEARS):
                assert torch.equal(routing.counts[f"{name}.{linear}"], counts[index :: len(LINEARS)])


def _chosen(scores: Tensor, settings: GraphMoEConfig) -> Tensor:
    """How many tokens chose each expert; with dense routing all did."""
    k = scores.shape[-1] if settings.method == "loramoe" else settings.top_k
    return torch.bincount(scores.topk(k, dim=-1).indices.flatten(), minlength=scores.shape[-1])


@pytest.mark.parametrize("form", ["mola", "graphmoe-moda", "graphmoe-loramoe", "dora"])
def test_generate_with_a_cache(form):
    """Token by token with a key-value cache gives what the whole prompt gives every time."""
    model = adapted(form).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=tokens(), use_cache=True, **settings)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, model.generate(input_ids=tokens(), use_cache=False, **settings))


@pytest.mark.parametrize("method", ["lora", "mixlora", "loramoe", "mola"])
def test_every_loader_loads_doras_magnitudes(method, tmp_path):
    """Transformers' own loader passes over PEFT's name of LoRA magnitudes without a word, so ours is another."""
    tiny_model().save_pretrained(tmp_path)
    settings = {} if method == "lora" else {"num_experts": 2}
    config = GraphMoEConfig(
        method=method, use_dora=True, r=2, gru_hidden_scale=0.5, init_lora_weights=False, lora_dropout=0.0, **settings
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for name, load in LOADERS.items():
        assert torch.equal(logits(load(tmp_path)), expected), name

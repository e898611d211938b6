"""Every method of the paper as a PEFT method on a tiny Llama: what is adapted, trained, saved, loaded and recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoRALinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig, collect_routing
from graphmoe_model.linear import RoutedLoRALinear
from graphmoe_model.methods import PRESETS
from tests.model.method_oracles import FORMS, by_equations, expected_shapes, form_config
from tests.model.tiny_models import logits, tiny_model, tokens

pytestmark = pytest.mark.methods

ALL = pytest.mark.parametrize("form", FORMS)
DORA_FORMS = [form for form, (preset, _) in FORMS.items() if PRESETS[preset]["use_dora"]]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = ("gate_proj", "up_proj", "down_proj")
LAYERS = 2
D, F = 32, 48
OUT = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}


def config(form: str, **options) -> GraphMoEConfig:
    return form_config(form, **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "gru_hidden_scale": 0.25, **options})


def adapted(form: str, base: nn.Module | None = None, **options) -> PeftModel:
    """A tiny model with an adapter of the form, in which every term counts."""
    return get_peft_model(base or tiny_model(), config(form, **options))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every trainable parameter away from its first value, the routers further than the rest."""
    for name, parameter in trained_parameters(model).items():
        parameter.mul_(torch.rand_like(parameter) + 0.5)
        if name.endswith("router.weight"):
            parameter.mul_(20)


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.01)
    for step in range(steps):
        ids = tokens(2, 8, seed=step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_and_loaded(model: PeftModel, folder: Path) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


def decoder_layers(model: PeftModel) -> list[nn.Module]:
    return list(model.get_base_model().model.layers)


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
    theirs.load_state_dict(_as_lora(trained_parameters(ours)), strict=False)
    assert len(_as_lora(trained_parameters(ours))) == len(trained_parameters(theirs))
    assert relative_error(logits(ours), logits(theirs)) <= 1e-12


def _as_lora(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The stacked tensors of one expert by PEFT's names."""
    parts = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    parts["magnitude"] = "lora_magnitude_vector.default.weight"
    state = {}
    for name, tensor in parameters.items():
        path, _, part = name.rpartition(".")
        stacked = "lora_graphmoe.default.experts." in path
        path = path.replace("lora_graphmoe.default.experts.", "")
        state[f"{path}.{parts[part]}" if stacked else name] = tensor[0] if stacked else tensor
    return state


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


@pytest.mark.parametrize("num_experts", [[2, 4, 4], "2-4-4", "2-4-4-2"], ids=str)
@pytest.mark.parametrize("form", ["mixlora", "loramoe", "mola"])
def test_counts_that_do_not_fit_the_model_change_nothing(form, num_experts):
    """Three numbers for two layers: refused before any module was replaced."""
    base = tiny_model()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match="layers"):
        adapted(form, base, num_experts=num_experts)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert torch.equal(logits(base), logits(tiny_model()))


@pytest.mark.parametrize("form", ["loramoe", "graphmoe-doramoe"])
def test_attention_of_a_method_without_it_is_refused(form):
    """LoRAMoE puts nothing on the attention: asked for it, it says so and changes nothing."""
    base = tiny_model()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match="q_proj"):
        adapted(form, base, target_modules=["mlp", "q_proj"])
    assert {name: id(module) for name, module in base.named_modules()} == modules


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


@ALL
def test_disable_delete_and_unload_give_the_base_back(form):
    """The base's logits to the bit, and after unload its own modules."""
    base = tiny_model()
    expected, modules = logits(base), {name: id(module) for name, module in base.named_modules()}
    model = adapted(form, base)
    model.add_adapter("second", config(form))
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), changed)
    assert model.unload() is base
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert torch.equal(logits(base), expected)
    model = adapted(form, base)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), expected)  # a PeftModel without any adapter refuses to run


@pytest.mark.parametrize(
    ("first", "second"),
    [("lora", "graphmoe-mixdora"), ("mixdora", "loramoe"), ("loramoe", "graphmoe-mola"), ("moda", "doramoe")],
)
def test_a_second_adapter_of_another_method(first, second):
    """One model holds adapters of several methods: each gives what it gives alone, whatever the attention has."""
    model = adapted(first)
    alone = logits(model)
    model.add_adapter("second", config(second))
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    changed = logits(model)
    assert not torch.allclose(changed, alone)
    model.delete_adapter("default")
    assert torch.equal(logits(model), changed)


@pytest.mark.parametrize(("first", "second"), [("mixlora", "mola"), ("mola", "mixlora"), ("moda", "dora")])
def test_lora_and_experts_do_not_share_a_projection(first, second):
    """One would wrap the other, and be saved by names under which nothing loads: refused in either order, by name, and
    nothing is left behind. On the MLPs alone the two go together."""
    model = adapted(first)
    expected, names = logits(model), {name for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match=r"q_proj has .* from the adapter default.*target_modules=\['mlp'\]"):
        model.add_adapter("second", config(second))
    assert {name for name, _ in model.named_modules()} == names
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.add_adapter("second", config(second, target_modules=["mlp"]))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("form", ["dora", "mixdora", "moda"])
def test_a_module_with_a_zero_row_can_be_left_out_as_the_error_says(form):
    """The error names what to leave out, and left out it is no error."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    with pytest.raises(ValueError, match=r"DoRA on model.layers.1.mlp.up_proj.* leave (\S+) out") as error:
        get_peft_model(model, config(form))
    (module,) = re.findall(r"leave (\S+) out", str(error.value))
    get_peft_model(model, config(form, exclude_modules=[module]))
    assert isinstance(model.model.layers[0].mlp, FusedGraphMoEFFN)
    assert not isinstance(model.model.layers[1].mlp, FusedGraphMoEFFN)

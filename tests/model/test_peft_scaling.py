"""PEFT's scaling of adapters: `rescale_adapter_scale`, `set_scale`, `scale_layer` and `unscale_layer`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.layers.routed_layer import RoutedLayer
from tests.model.checkpointing import checkpoint_activations
from tests.model.method_models import LINEARS, PROJECTIONS, adapted, as_lora, config, randomise, trained_parameters
from tests.model.method_oracles import FORMS
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model, tokens

pytestmark = pytest.mark.methods


def trained(form: str, **options) -> nn.Module:
    model = adapted(form, tiny_model().double(), **options)
    randomise(model)
    return model


@torch.no_grad()
def folded(model: nn.Module) -> torch.Tensor:
    """The logits with the folds that are kept: no call of eval(), which would drop them."""
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("form", FORMS)
def test_factor_0_is_the_base_model(form):
    """To the bit, with any routing, rounds and DoRA; near it the adapter counts a little, and 1 is as trained."""
    base, model = logits(tiny_model().double()), trained(form).eval()
    full = folded(model)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(folded(model), base)
    with rescale_adapter_scale(model, 1e-9):
        assert relative_error(folded(model), base) < 1e-6
    with rescale_adapter_scale(model, 1.0):
        assert torch.equal(folded(model), full)
    assert torch.equal(folded(model), full)
    assert relative_error(full, base) > 0.1


@pytest.mark.parametrize("form", ["graphmoe-mixlora", "graphmoe-mixdora", "graphmoe-doramoe", "moda"])
def test_a_kept_fold_follows_the_scaling(form):
    """There and back, and after a weight has changed at another scaling: the same as without any fold."""
    model = trained(form).eval()
    folded(model)
    for factor in (0.5, 2.0, 0.5):
        with rescale_adapter_scale(model, factor):
            kept = [folded(model), folded(model)]
            with torch.no_grad():
                for name, parameter in trained_parameters(model).items():
                    if name.endswith((".B", "output_proj.weight", "magnitude")):
                        parameter.mul_(1.1)
            kept.append(folded(model))
            never = _without_folds(model)
        assert torch.equal(kept[0], kept[1])
        assert relative_error(kept[2], never) <= 1e-10
        assert relative_error(kept[2], kept[0]) > 1e-4
    assert relative_error(folded(model), _without_folds(model)) <= 1e-10


def _without_folds(model: nn.Module) -> torch.Tensor:
    settings = {id(c): c for m in model.modules() if isinstance(m, FusedGraphMoEFFN) for c in _configs(m)}
    for own in settings.values():
        own.fold = "never"
    try:
        with torch.no_grad():
            return model.train()(input_ids=tokens()).logits
    finally:
        model.eval()
        for own in settings.values():
            own.fold = "always"


def _configs(layer: FusedGraphMoEFFN) -> list:
    return [adapter.config for adapter in layer.lora_graphmoe.values()]


@pytest.mark.parametrize("form, factor", [("lora", 0.5), ("lora", 3), ("lora", 0.0), ("dora", 1.0)])
def test_one_expert_is_scaled_as_pefts_lora(form, factor):
    """The same numbers as LoRA on all seven linears with the same tensors, at the same factor."""
    ours, settings = trained(form), config(form)
    theirs_config = LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, target_modules=[*PROJECTIONS, *LINEARS])
    theirs_config.use_dora = settings.use_dora
    theirs = get_peft_model(tiny_model().double(), theirs_config)
    theirs.load_state_dict(as_lora(trained_parameters(ours)), strict=False)
    with rescale_adapter_scale(ours, factor), rescale_adapter_scale(theirs, factor):
        assert relative_error(logits(ours), logits(theirs)) <= 1e-12


@pytest.mark.parametrize("form", ["dora", "graphmoe-mixdora", "graphmoe-moda"])
def test_dora_at_half_strength_is_half_way(form):
    """Magnitudes go from the base's norms to the trained ones: as an adapter that was trained to that point."""
    model, half = trained(form), trained(form)
    half.load_state_dict(model.state_dict())
    for layer in half.modules():
        if isinstance(layer, LoraLayer):
            _move_half_way(layer)
    _halve_experts(half)
    with rescale_adapter_scale(model, 0.5):
        assert relative_error(logits(model), logits(half)) <= 1e-10


@torch.no_grad()
def _move_half_way(layer: LoraLayer) -> None:
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.add_(layer.base_layer.weight.norm(dim=1)).div_(2)
    layer.lora_B["default"].weight.div_(2)


@torch.no_grad()
def _halve_experts(model: nn.Module) -> None:
    for layer in model.modules():
        if not isinstance(layer, RoutedLayer):
            continue
        for name, parameter in layer.lora_graphmoe["default"].named_parameters():
            linear = (
                getattr(layer.base_layer, name.split(".")[1], layer.base_layer) if "." in name else layer.base_layer
            )
            if name.endswith("B") or name == "gru.output_proj.weight":
                parameter.div_(2)
            if name.endswith("magnitude"):
                parameter.add_(linear.weight.norm(dim=1)).div_(2)


def test_set_scale_and_its_relatives():
    """Every layer has LoRA's methods: setting starts from the trained scale, scaling from what is there."""
    model = tiny_peft_model(rank_pattern={"layers.1.mlp": 2}, use_rslora=True)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer | RoutedLayer)]
    start = [dict(layer.scaling) for layer in layers]
    assert len(layers) == 10

    def factors() -> set[float]:
        pairs = zip(layers, start, strict=True)
        return {round(layer.scaling["default"] / before["default"], 12) for layer, before in pairs}

    for change, expected in [
        (lambda layer: layer.set_scale("default", 0.5), {0.5}),
        (lambda layer: layer.scale_layer(0.5), {0.25}),
        (lambda layer: layer.unscale_layer(0.25), {1.0}),
        (lambda layer: layer.set_scale("default", 0), {0.0}),
        (lambda layer: layer.set_scale("another", 7), {0.0}),
        (lambda layer: layer.unscale_layer(), {1.0}),
    ]:
        for layer in layers:
            change(layer)
        assert factors() == expected
    assert [layer.scaling for layer in layers] == start


def test_only_the_scaled_adapter_changes():
    """Each adapter has its own scaling; a deleted one's does not come back with the next of its name."""
    model = tiny_peft_model(init_lora_weights=False)
    model.add_adapter("second", tiny_config(init_lora_weights=False, rounds=1))
    first = logits(model)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer | RoutedLayer)):
        layer.set_scale("second", 0)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(tiny_model()))
    model.delete_adapter("second")
    model.add_adapter("second", tiny_config(init_lora_weights=False, rounds=1))
    model.set_adapter("second")
    assert not torch.allclose(logits(model), logits(tiny_model()))


def test_gradients_at_half_strength_are_those_of_the_literal_form():
    """A model that is trained while it is scaled: folded in the graph and unfolded agree."""
    grads = {}
    for fold in ("always", "never"):
        model = trained("graphmoe-mixdora", fold=fold).train()
        with rescale_adapter_scale(model, 0.5):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads[fold] = {name: p.grad for name, p in trained_parameters(model).items()}
    for name, grad in grads["never"].items():
        assert relative_error(grads["always"][name], grad) <= 1e-8, name


def test_a_checkpointed_backward_at_another_scaling_is_refused():
    """Checkpointing runs the layers again in the backward pass: at another scaling the gradients would be others."""
    model = trained("graphmoe-mixlora").train()
    checkpoint_activations(model)
    model.enable_input_require_grads()
    with rescale_adapter_scale(model, 0.5):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    with pytest.raises(
        RuntimeError, match="ran with the scaling 1, its backward pass with 2: rescale_adapter_scale or"
    ):
        loss.backward()
    with rescale_adapter_scale(model, 0.5):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(model).values())


@pytest.mark.slow
def test_a_compiled_layer_sees_the_scaling():
    """The graph was made at one scaling and is asked at another."""
    layer = trained("graphmoe-mixlora").get_base_model().model.layers[0].mlp.eval()
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(3, layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        for factor in (1.0, 0.5, 0.0, 1.0):
            layer.set_scale("default", factor)
            assert relative_error(compiled(x), layer(x)) <= 1e-10


def test_input_casting_is_none_of_the_experts():
    """PEFT's switch is read on every adapter layer; experts are cast to their input, never the other way about."""
    model = tiny_peft_model(init_lora_weights=False)
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)
    assert all(m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, RoutedLayer))


@pytest.mark.parametrize("form", ["mixlora", "mola"])
def test_layers_say_their_widths(form):
    """in_features and out_features, as LoRA's layers have them: of an MLP the hidden size twice."""
    for layer in (m for m in adapted(form).modules() if isinstance(m, RoutedLayer)):
        mlp = isinstance(layer, FusedGraphMoEFFN)
        linear = layer.base_layer.down_proj if mlp else layer.base_layer
        assert layer.out_features == linear.out_features
        assert layer.in_features == (linear.out_features if mlp else linear.in_features)

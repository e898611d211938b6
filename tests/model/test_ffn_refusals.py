"""What `FusedGraphMoEFFN` refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from tests.model.small_mlps import D, F, config, ffn, hidden_states, llama_mlp
from tests.model.tiny_models import tiny_config, tiny_model


def test_two_active_adapters_are_refused():
    """Rounds of two adapters do not add up, so there is no sum of adapters here."""
    layer = ffn()
    layer.update_layer("second", config())
    layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one GraphMoE adapter can be active at a time, got default, second"):
        layer(hidden_states())


@pytest.mark.parametrize("refused", ["merge", "unmerge"])
def test_merging_is_refused(refused):
    """The layer is no linear map of its input: merging would be a silent lie."""
    with pytest.raises(NotImplementedError, match="merged"):
        getattr(ffn(), refused)()


@pytest.mark.parametrize(
    "x, error, message",
    [
        (
            torch.zeros(2, D, dtype=torch.bfloat16),
            TypeError,
            "x is torch.bfloat16, the layer's weights are torch.float32",
        ),
        ([1, 2], TypeError, rf"x must be a tensor of hidden states \[..., {D}\], got list"),
        (torch.zeros(2, D, dtype=torch.long), TypeError, "x must be floating point, got torch.int64; pass hidden"),
        (torch.zeros(2, D + 1), ValueError, rf"hidden size {D} as its last dimension, got \[2, {D + 1}\]"),
        (torch.zeros(D, 2), ValueError, rf"hidden size {D} as its last dimension, got \[{D}, 2\]"),
        (torch.zeros(2, D, device="meta"), ValueError, "x is on meta, the layer on cpu"),
    ],
)
def test_wrong_inputs_are_named(x, error, message):
    """A wrong x is answered by what was wrong and what was expected."""
    with pytest.raises(error, match=message):
        ffn(dtype=torch.float32)(x)


def test_more_than_x_is_refused_by_name():
    """A decoder layer of another library may hand its MLP more; dropping it would be silent."""
    x = torch.zeros(2, D)
    with pytest.raises(TypeError, match=r"FusedGraphMoEFFN takes x alone.* got NoneType, mask= too"):
        ffn(dtype=torch.float32)(x, None, mask=x)


class Ungated(nn.Module):
    """Two projections, as GPT-NeoX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(D, F), nn.Linear(F, D), nn.SiLU()


def _with(**parts) -> nn.Module:
    """Llama's MLP with some attributes replaced."""
    mlp = llama_mlp()
    for name, value in parts.items():
        setattr(mlp, name, value)
    return mlp


def _wrapped_projection() -> nn.Module:
    wrapped = nn.Module()
    wrapped.base_layer = nn.Linear(D, F)
    return _with(gate_proj=wrapped)


def _narrow_bias() -> nn.Module:
    mlp = llama_mlp()
    mlp.up_proj.bias = nn.Parameter(torch.zeros(1))
    return mlp


def _patched() -> nn.Module:
    mlp = llama_mlp()
    mlp.forward = lambda x: x
    return mlp


REFUSED_MLPS = {
    "ungated": (Ungated, TypeError, "Ungated is not a gated MLP.*gate_proj.*submodules up_proj, down_proj, act_fn"),
    "a linear": (lambda: nn.Linear(D, D), TypeError, "Linear is not a gated MLP.*submodules none"),
    "sparse": (lambda: _with(activation_sparsity=0.9), TypeError, "makes its activations sparse"),
    "patched": (_patched, TypeError, "forward of this LlamaMLP was replaced on the instance"),
    "wrapped projection": (_wrapped_projection, TypeError, "LlamaMLP.gate_proj is wrapped by another adapter"),
    "no weight": (
        lambda: _with(gate_proj=nn.Identity()),
        TypeError,
        r"gate_proj \(Identity\) is not a linear layer with a weight",
    ),
    "a bias of one number": (_narrow_bias, TypeError, r"LlamaMLP.up_proj has a bias of shape \[1\], expected \[\d+\]"),
    "unknown activation": (lambda: _with(act_fn=nn.Softsign()), ValueError, "activation Softsign is unknown"),
    "another slope": (lambda: _with(act_fn=nn.LeakyReLU(0.2)), ValueError, "LeakyReLU with slope 0.2"),
    "wrapped already": (ffn, TypeError, "wrapped already .FusedGraphMoEFFN.; use update_layer"),
    "GRU of width 0": (llama_mlp, ValueError, "GRU of width 0 at hidden size 24"),
}


@pytest.mark.parametrize("make, error, message", REFUSED_MLPS.values(), ids=REFUSED_MLPS)
def test_mlps_that_cannot_be_adapted_are_refused(make, error, message):
    """Each refusal names the MLP, the reason and what was expected; nothing is adapted by half."""
    scale = 0.01 if "width 0" in message else 0.3
    with pytest.raises(error, match=message):
        FusedGraphMoEFFN(make(), config(gru_hidden_scale=scale))


def test_another_methods_config_is_refused():
    """LoraConfig is the parent class, so it gets far before anything fails."""
    with pytest.raises(TypeError, match="config must be a GraphMoEConfig, got LoraConfig"):
        FusedGraphMoEFFN(llama_mlp(), LoraConfig())


@pytest.mark.parametrize("of", ["model", "layer"])
def test_a_plain_lora_is_told_first_how_it_is_merged(of):
    """ "Which experts run depends on the input" is untrue of it; `test_a_lora_that_was_trained_here_is_merged_as_pefts`
    goes the way that is named."""
    model = get_peft_model(tiny_model(), tiny_config(method="lora", rounds=1, num_experts=None))
    with pytest.raises(NotImplementedError) as refused:
        model.merge_and_unload() if of == "model" else model.get_submodule(
            "base_model.model.model.layers.0.mlp"
        ).merge()
    text = str(refused.value)
    assert "depends on the input" not in text
    steps = ["save_pretrained", "graphmoe convert ADAPTER TARGET --to peft", "PeftModel.from_pretrained", "merge_and_"]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)

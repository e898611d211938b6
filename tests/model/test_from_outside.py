"""What a user can add without touching the packages: an activation, and a layout of gated MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from graphmoe_kernels import ACTIVATIONS, register_activation
from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig, MLPLayout, register_mlp_layout
from graphmoe_model.layers import mlp_layouts
from graphmoe_model.layers.base_mlp import activation_name, wrap_mlp
from graphmoe_model.layers.mlp_layouts import LAYOUTS
from graphmoe_model.profiling.modules import categories
from tests.model.small_mlps import llama_mlp
from tests.model.tiny_models import tiny_config, tiny_model, tokens

LAYOUT = MLPLayout(gate="opening", up="rising", down="closing", activations=("curve",))


class Wave(nn.Module):
    """An activation that no library has: x + sin(x) / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(x) / 2


class OutsideMLP(nn.Module):
    """A gated MLP with names and an activation of its own."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.opening = nn.Linear(hidden, intermediate, bias=False)
        self.rising = nn.Linear(hidden, intermediate, bias=False)
        self.closing = nn.Linear(intermediate, hidden, bias=False)
        self.curve = Wave()

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.curve(self.opening(x)) * self.rising(x))


def outside_model() -> nn.Module:
    """A tiny Llama with such MLPs."""
    model = tiny_model()
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mlp = OutsideMLP(model.config.hidden_size, model.config.intermediate_size)
    return model.double()


@pytest.fixture
def added() -> Iterator[None]:
    """Layout and activation, for one test."""
    register_mlp_layout(LAYOUT)
    register_activation("wave", Wave(), lambda x: 1 + torch.cos(x) / 2)
    yield
    LAYOUTS.remove(LAYOUT)
    del ACTIVATIONS["wave"]


@pytest.mark.parametrize(
    "wrong", [LAYOUT._replace(gate="rising", up="opening"), LAYOUT._replace(activations=(), implied="relu")]
)
def test_a_wrong_layout_is_put_right_by_the_right_one(wrong):
    """The layout that was registered last counts: without it only a new process would be free of the wrong one."""
    before = list(LAYOUTS)
    register_activation("wave", Wave(), lambda x: 1 + torch.cos(x) / 2)
    try:
        register_mlp_layout(wrong)
        with pytest.raises(TypeError, match="supported"):
            FusedGraphMoEFFN(OutsideMLP(8, 16).double(), GraphMoEConfig(rounds=1, num_experts=2, r=2))
        register_mlp_layout(LAYOUT)
        FusedGraphMoEFFN(OutsideMLP(8, 16).double(), GraphMoEConfig(rounds=1, num_experts=2, r=2))
    finally:
        LAYOUTS[:] = before
        del ACTIVATIONS["wave"]


def test_before_they_are_added_the_refusal_says_how() -> None:
    """First the layout is missing, then the activation."""
    with pytest.raises(ValueError, match=r"OutsideMLP is not a gated MLP.*register_mlp_layout"):
        get_peft_model(outside_model(), tiny_config())
    with pytest.raises(TypeError, match=r"OutsideMLP is not a gated MLP.*submodules opening.*register_mlp_layout"):
        get_peft_model(outside_model(), tiny_config(target_modules=["mlp"]))
    register_mlp_layout(LAYOUT)
    try:
        with pytest.raises(ValueError, match=r"activation Wave is unknown.*register_activation"):
            get_peft_model(outside_model(), tiny_config())
    finally:
        LAYOUTS.remove(LAYOUT)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("method", ["mixlora", "loramoe"])
def test_a_model_of_outside_mlps_is_adapted_trained_saved_and_run(method, tmp_path) -> None:
    """From attaching to generation, folded as literal."""
    base, ids = outside_model(), tokens()
    plain = base(ids).logits
    settings = {"num_experts": None, "top_k": None} if method == "loramoe" else {}
    model = get_peft_model(outside_model(), tiny_config(method=method, init_lora_weights=True, **settings))
    layer = model.base_model.model.model.layers[0].mlp
    assert layer.traits.activation == "wave"
    assert relative_error(model.eval()(ids).logits, plain) < 1e-12

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    model.eval()
    trained = model(ids).logits
    assert relative_error(trained, plain) > 1e-3
    for form in ("never", "always"):
        for module in model.modules():
            if hasattr(module, "lora_graphmoe"):
                module.lora_graphmoe["default"].config.fold = form
        assert relative_error(model(ids).logits, trained) < 1e-10
    assert model.generate(input_ids=ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    model.save_pretrained(tmp_path)
    assert relative_error(PeftModel.from_pretrained(outside_model(), tmp_path).eval()(ids).logits, trained) < 1e-12


@pytest.mark.usefixtures("added")
def test_a_profile_sees_outside_mlps() -> None:
    """Else their time would be the rest of the model's."""
    model = outside_model()
    found = categories(model)
    assert [found.get(layer.mlp) for layer in model.model.layers] == ["mlp", "mlp"]


WRONG = {
    "no layout": (("gate", "up", "down"), TypeError, "expected an MLPLayout, got"),
    "a bare name": (
        LAYOUT._replace(activations="curve"),
        TypeError,
        "must be a tuple of names, got 'curve'",
    ),
    "no name": (LAYOUT._replace(gate=None), TypeError, "gate must be the name of an attribute, got None"),
    "an empty name": (LAYOUT._replace(up=""), ValueError, "up: '' is no attribute's name"),
    "a path": (LAYOUT._replace(down="mlp.down"), ValueError, "down: 'mlp.down' is no attribute's name"),
    "an odd activation": (LAYOUT._replace(activations=("a", "b c")), ValueError, r"activations\[1\]: 'b c' is no"),
    "down is up": (LAYOUT._replace(down="rising"), ValueError, "down is 'rising', which is the gate or up too"),
    "no activation": (LAYOUT._replace(activations=()), ValueError, "it has neither"),
    "an unknown activation": (LAYOUT._replace(activations=(), implied="sliu"), ValueError, "unknown activation 'sliu'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_layout_is_refused(case) -> None:
    """And leaves the table as it was."""
    layout, error, message = WRONG[case]
    before = list(LAYOUTS)
    with pytest.raises(error, match=message):
        register_mlp_layout(layout)
    assert before == LAYOUTS


def test_a_page_of_a_notebook_runs_twice(monkeypatch) -> None:
    """docs/extending.md's first block: the second time its functions are other objects of the same code. MLPs that hold
    the function of the first time are known still, those of the second too; a layout counts as the latest again."""
    monkeypatch.setattr(mlp_layouts, "LAYOUTS", list(LAYOUTS))
    page = (Path(__file__).parents[2] / "docs/extending.md").read_text()
    block = compile(page.partition("```python\n")[2].partition("```")[0], "extending.md", "exec")
    names: dict[str, Any] = {}
    try:
        exec(block, names)
        first = names["wave"]
        register_mlp_layout(LAYOUT._replace(activations=("other", "curve")))
        exec(block, names)
        assert names["wave"] is not first
        for wave in (first, names["wave"]):
            mlp = OutsideMLP(24, 40)
            del mlp.curve
            mlp.curve = wave
            assert activation_name(mlp) == "wave"
        assert mlp_layouts.LAYOUTS.count(LAYOUT) == 1
        assert mlp_layouts.LAYOUTS[0] == LAYOUT
    finally:
        ACTIVATIONS.pop("wave", None)


def test_a_kept_wrapping_sees_what_is_replaced() -> None:
    """A layer may keep it: the linears and their weights are looked up when they are used."""
    mlp, x = llama_mlp().double(), torch.randn(3, 24, dtype=torch.float64)
    kept = wrap_mlp(mlp)
    mlp.up_proj = nn.Linear(24, 40, bias=False, dtype=torch.float64)
    with torch.no_grad():
        mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight * 2)
    gate, up = kept.project_in(x)
    assert torch.equal(gate, mlp.gate_proj(x))
    assert torch.equal(up, mlp.up_proj(x))
    assert wrap_mlp(mlp, kept) is kept
    other = llama_mlp()
    assert wrap_mlp(other, kept).mlp is other

"""Graphs for other processes (torch.export, torch.jit.trace) compute with the weights that they carry.

A kept fold is known by a number that means something in its own process alone. In a graph that is saved and loaded
elsewhere it found nothing, or another layer's fold.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from graphmoe_kernels import rethinking
from graphmoe_kernels.rethinking.cache import refresh_fold
from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from graphmoe_model.layers.linear import RoutedLoRALinear
from tests.model.fold_changes import COPIES
from tests.model.method_models import adapted
from tests.model.method_oracles import FORMS, HIDDEN, small_ffn
from tests.model.tiny_models import tokens

LENGTHS = {1: torch.export.Dim("length", min=2, max=4096)}
TOLERANCE = 1e-12


def hidden_states(length: int, width: int = HIDDEN) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.float64)


def small_layer(fold: str = "auto") -> FusedGraphMoEFFN:
    """Two rounds, in evaluation mode."""
    return small_ffn("graphmoe-mixlora", rounds=2, fold=fold).eval()


def routed_linear() -> RoutedLoRALinear:
    """MoLA's experts on an attention projection."""
    config = GraphMoEConfig(method="mola", r=4, num_experts=4, top_k=2, init_lora_weights=False)
    return RoutedLoRALinear(nn.Linear(HIDDEN, 24), config).double().eval()


def exported(module: nn.Module, x: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    """A program for any length, of a module that has run in evaluation before and so keeps a fold."""
    with torch.no_grad():
        module(x)
        return torch.export.export(module, (x,), strict=strict, dynamic_shapes=(LENGTHS,))


@torch.no_grad()
def write_case(folder: Path, name: str, module: nn.Module) -> None:
    """What the graph called ``name`` must give, at the length that it was traced with and at others."""
    inputs = [hidden_states(length) for length in (5, 2, 300)]
    torch.save({"x": inputs, "y": [module(x) for x in inputs]}, folder / f"{name}.case")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_used_layers_are_right_in_another_process(tmp_path: Path) -> None:
    """KeyError 0 before, or silently another layer's fold: the other process keeps folds of eight layers of its own."""
    layers: dict[str, nn.Module] = {
        "literal": small_layer(),
        "folded": small_layer("always"),
        "one round": small_ffn("loramoe").eval(),
        "linear": routed_linear(),
    }
    for name, layer in layers.items():
        torch.export.save(exported(layer, hidden_states(5), strict=name == "linear"), tmp_path / f"{name}.pt2")
        write_case(tmp_path, name, layer)
    with torch.no_grad():
        torch.jit.trace(layers["folded"], (hidden_states(5),), check_trace=False).save(tmp_path / "traced.jit")
    write_case(tmp_path, "traced", layers["folded"])

    worker = [sys.executable, "-m", "tests.model.export_worker", str(tmp_path)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors.keys() == {*layers, "traced"}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("fold", ["auto", "always"])
def test_a_traced_graph_follows_the_weights_it_is_given(fold: str) -> None:
    """No constant of the fold in it: other weights in the graph's state are used."""
    layer = small_layer(fold)
    program = exported(layer, hidden_states(5))
    other = {name: 1.2 * tensor for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(other)
    run = program.module()
    run.load_state_dict(other)
    x = hidden_states(9)
    with torch.no_grad():
        assert relative_error(run(x), layer(x)) <= TOLERANCE


def test_exporting_leaves_the_layer_as_it_was() -> None:
    """An unused layer kept the export's own tensors, which have no data: every later forward gave such tensors."""
    layer, x = small_layer("always"), hidden_states(5)
    with torch.no_grad():
        torch.export.export(layer, (x,))
        after = layer(x)
        expected = copy.deepcopy(layer)(x)
    assert type(after) is Tensor
    assert torch.equal(after, expected)


@torch.no_grad()
def test_a_fold_of_fake_tensors_is_not_kept() -> None:
    """Memory estimates run a model on tensors without data; the next real forward is real."""
    layer, x = small_layer(), hidden_states(5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(x.shape, dtype=x.dtype))
    assert type(layer(x)) is Tensor
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_auto_folds_where_every_length_is_past_the_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess about one length would bound the graph to lengths on its side of the break-even."""
    ran = []
    for name in ("literal_rounds", "folded_rounds"):
        function = getattr(rethinking, name)

        def noted(*args, name=name, function=function):
            ran.append(name)
            return function(*args)

        monkeypatch.setattr(rethinking, name, noted)
    layer, many = small_layer(), {1: torch.export.Dim("length", min=500, max=4096)}
    with torch.no_grad():
        for lengths in (LENGTHS, many):
            torch.export.export(layer, (hidden_states(600),), dynamic_shapes=(lengths,))
    assert set(ran) == {"literal_rounds", "folded_rounds"}
    assert ran == sorted(ran, reverse=True)


def test_a_handle_of_another_process_is_refused() -> None:
    """Graphs saved by other means (a pickled compiled function) may hold the number of a cache that is elsewhere."""
    with pytest.raises(RuntimeError, match=r"kept by another process, or by a layer that no longer exists"):
        refresh_fold(torch.tensor(0), [torch.zeros(1)], [], 1.0, "expert_output")


def test_layers_are_made_under_any_default_device() -> None:
    """The number is read on the host: elsewhere reading it waits for a GPU, and on "meta" it has no value."""
    for device in ("cpu", "meta"):
        with torch.device(device):
            layer = small_ffn("mixlora")
        assert layer._folds["default"].handle.device.type == "cpu"


@pytest.mark.parametrize("twice", COPIES.values(), ids=COPIES)
def test_copies_have_a_handle_of_their_own(twice) -> None:
    """A copy with the original's number would be refreshed from the original's weights in a compiled graph."""
    layer = small_ffn("mixlora").eval()
    handles = [twin._folds["default"].handle for twin in (layer, twice(layer), twice(layer))]
    assert len({int(handle) for handle in handles}) == 3


@pytest.mark.slow
@pytest.mark.methods
@pytest.mark.parametrize("form", FORMS)
def test_models_of_every_method_export(form: str) -> None:
    """A whole PEFT model that has run before, at any length."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(form).eval()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    model, lengths = Logits().eval(), {1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad():
        model(tokens())
        program = torch.export.export(model, (tokens(),), dynamic_shapes=(lengths,))
        ids = tokens(2, 11)
        assert relative_error(program.module()(ids), model(ids)) <= 1e-4


@pytest.mark.slow
@pytest.mark.methods
@pytest.mark.parametrize("form", FORMS)
def test_layers_of_every_method_export_through_dynamo(form: str) -> None:
    layer = small_ffn(form).eval()
    run, x = exported(layer, hidden_states(5), strict=True).module(), hidden_states(11)
    with torch.no_grad():
        assert relative_error(run(x), layer(x)) <= TOLERANCE


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    """AOTInductor calls the registered operators from the package that it compiles."""
    layer = small_layer("always")
    program = exported(layer, hidden_states(5))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    run = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for length in (5, 40):
            x = hidden_states(length)
            assert relative_error(run(x), layer(x)) <= TOLERANCE

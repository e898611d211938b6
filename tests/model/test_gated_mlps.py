"""Which MLPs of Transformers are adapted, and that a dropout of theirs stays what it was."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.layers.mlp_checks import check_mlp
from tests.model.gated_mlps import HIDDEN, REFUSED, SUPPORTED, build, classes
from tests.model.small_mlps import config, llama_mlp

SEED_OSS = "seed_oss.SeedOssMLP"


def hidden_states() -> Tensor:
    return torch.randn(2, 5, HIDDEN, dtype=torch.float64)


def layer(rate: float = 0.3, mlp: nn.Module | None = None, **options) -> FusedGraphMoEFFN:
    """A layer over Seed-OSS's MLP in training mode."""
    return FusedGraphMoEFFN((mlp or build(SEED_OSS, rate)).double(), config(**options)).train()


def seeded(function, *arguments):
    torch.manual_seed(3)
    return function(*arguments)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_fresh_layer_is_its_mlp(name: str) -> None:
    """Each kind of MLP under its own names, in evaluation, and in training with the base's own dropout."""
    mlp = build(name, 0.3 if name == SEED_OSS else 0.0).double()
    ffn, x = layer(mlp=mlp, init_lora_weights=True, rounds=2), hidden_states()
    for mode in (True, False):
        ffn.train(mode)
        assert relative_error(seeded(ffn, x), seeded(mlp, x)) < 1e-12


@pytest.mark.parametrize("name", [n for n in REFUSED if n.split(".")[0] in ("t5", "bitnet", "falcon_h1", "moshi")])
def test_what_else_an_mlp_does_is_named(name: str) -> None:
    """One of each reason; `test_every_gated_mlp_of_transformers` has all classes."""
    with pytest.raises(TypeError, match=REFUSED[name]):
        check_mlp(build(name, 0.1))


@pytest.mark.slow
def test_every_gated_mlp_of_transformers() -> None:
    """Whatever the installed version has is supported, or refused with the reason that the list gives."""
    wrong, seen = [], list(classes())
    for name in seen:
        try:
            check_mlp(build(name, 0.1))
            found = None
        except TypeError as error:
            found = str(error)
        expected = REFUSED.get(name)
        if (found is None) != (expected is None) or (expected is not None and not re.search(expected, found or "")):
            wrong.append(f"{name}: {found}")
    assert len(seen) > 150
    assert not wrong, "\n".join(wrong)


def test_the_dropout_is_on_the_layers_output_alone() -> None:
    """Whole entries of y_T are zero and the rest is scaled: no other round reads a dropped y, and one mask is drawn."""
    ffn, x = layer(0.25, rounds=3, fold="never"), hidden_states()
    dropped = seeded(ffn, x)
    ffn.base_layer.residual_dropout = 0.0  # read at every forward, as the base reads it
    plain = ffn(x)
    assert relative_error(dropped, seeded(F.dropout, plain, 0.25)) < 1e-12
    assert 0 < (dropped == 0).float().mean() < 0.5


def test_it_is_off_where_the_base_has_it_off() -> None:
    """In evaluation, and where the base MLP alone was put into evaluation mode."""
    ffn, x = layer(rounds=2), hidden_states()
    ffn.base_layer.eval()
    training = ffn(x)
    assert relative_error(training, ffn.eval()(x)) < 1e-12


def gradients(ffn: FusedGraphMoEFFN, x: Tensor, checkpointed: bool) -> list[Tensor]:
    """Those of x and of every trainable parameter, under one draw of the dropout."""
    leaf = x.clone().requires_grad_()
    y = seeded(lambda: checkpoint(ffn, leaf, use_reentrant=False) if checkpointed else ffn(leaf))
    torch.randn(7)  # the generator has moved on when backward runs
    leaves = [leaf, *(p for p in ffn.parameters() if p.requires_grad)]
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves))


@pytest.mark.parametrize("rounds", [1, 3])
def test_gradients_go_through_the_mask_that_was_drawn(rounds: int) -> None:
    """Folded as literal, with the Q fold that never forms y_t, and repeated by checkpointing as at first."""
    ffn, x = layer(rounds=rounds, fold="never"), hidden_states()
    literal = gradients(ffn, x, checkpointed=False)
    repeated = gradients(ffn, x, checkpointed=True)
    ffn.lora_graphmoe["default"].config.fold = "always"
    folded = gradients(ffn, x, checkpointed=False)
    for one, two, three in zip(literal, repeated, folded, strict=True):
        assert relative_error(two, one) < 1e-12
        assert relative_error(three, one) < 1e-9
    mask = seeded(F.dropout, torch.ones(2, 5, HIDDEN, dtype=torch.float64), 0.3)
    assert float((mask == 0).double().mean()) > 0


def test_a_mode_that_changes_before_backward_raises() -> None:
    """With checkpointing the backward pass would differentiate another mask than the forward had."""
    ffn, x = layer(rounds=2), hidden_states()
    y = checkpoint(ffn, x.requires_grad_(), use_reentrant=False)
    ffn.eval()
    with pytest.raises(RuntimeError, match=r"ran with dropout 0.3, its backward pass with 0"):
        y.sum().backward()


class OwnDropout(nn.Module):
    """A user's MLP with an ``nn.Dropout`` somewhere."""

    def __init__(self, where: str, rate: float) -> None:
        super().__init__()
        plain = llama_mlp()
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj
        self.act_fn, self.dropout, self.where = nn.SiLU(), nn.Dropout(rate), where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "input":
            x = self.dropout(x)
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        y = self.down_proj(self.dropout(hidden) if self.where == "hidden" else hidden)
        return self.dropout(y) if self.where == "output" else y


@pytest.mark.parametrize("where", ["input", "hidden"])
def test_a_dropout_elsewhere_is_refused(where: str) -> None:
    """Told from one on the output by the numbers it draws, at any rate; allowed where it is 0."""
    for rate in (1e-4, 0.9):
        message = rf"OwnDropout has a dropout of its own \(dropout = {rate}\).*set it to 0"
        with pytest.raises(TypeError, match=message):
            check_mlp(OwnDropout(where, rate))
    assert check_mlp(OwnDropout(where, 0.0)).output_dropout is None


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_a_dropout_module_on_the_output_is_found(rate: float) -> None:
    """Whatever its rate is when the adapter is attached; the look leaves rate, mode and generator as they were."""
    mlp = OwnDropout("output", rate).eval()
    state = torch.get_rng_state()
    assert check_mlp(mlp).output_dropout == "dropout"
    assert torch.equal(torch.get_rng_state(), state)
    assert (mlp.dropout.p, mlp.training, mlp.dropout.training) == (rate, False, False)


def test_an_unused_dropout_hinders_nothing() -> None:
    assert check_mlp(OwnDropout("nowhere", 0.5)).output_dropout is None


def test_without_weights_a_dropout_cannot_be_placed() -> None:
    """On the meta device nothing can be compared; it used to be passed over."""
    with pytest.raises(TypeError, match=r"residual_dropout.*no weights yet \(meta device\).*load the weights first"):
        check_mlp(build(SEED_OSS, 0.1).to("meta"))
    assert check_mlp(build(SEED_OSS, 0.0).to("meta")).output_dropout is None


def test_projections_of_two_dtypes_are_refused() -> None:
    """T5 keeps its last projection in fp32 beside fp16 ones; the layer has one compute dtype."""
    mlp = build("t5.T5DenseGatedActDense").half()
    mlp.wo.float()
    with pytest.raises(TypeError, match=r"different dtypes \(wi_0 torch.float16, .*wo torch.float32"):
        check_mlp(mlp)

"""DeepSpeed's ZeRO: adapters attach to and load into partitioned models, and two ranks train as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from graphmoe_kernels.testing import relative_error
from graphmoe_model.parameters import parameters_by_component
from tests.distributed.launch import launch
from tests.model.method_models import adapted, randomise, trained_parameters
from tests.model.tiny_models import tiny_model, tokens

pytestmark = pytest.mark.distributed

pytest.importorskip("deepspeed")  # `make test-distributed` installs it

from tests.distributed import zero_worker  # noqa: E402

CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A base model on disk: what a script loads under zero.Init."""
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return str(folder)


def base_model() -> Any:
    return tiny_model(max_position_embeddings=1024)


def model_of(form: str) -> PeftModel:
    torch.manual_seed(0)
    model = adapted(form, base_model())
    randomise(model)
    return model


def train_alone(model: PeftModel) -> tuple[list[float], dict[str, Tensor]]:
    """One process that accumulates both ranks' micro-batches: losses and trained parameters."""
    optimizer = zero_worker.optimizer_of(model)
    losses = []
    for step in range(zero_worker.STEPS):
        for rank in (0, 1):
            loss = zero_worker.loss_of(model.train(), step, rank)
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def test_attaching_under_zero_init(base):
    """Trainer's usual order: the base is partitioned before the adapter comes, whose DoRA reads the whole weights."""
    forms: dict[str, dict[str, Any]] = {
        "graphmoe-mixlora": {"modules_to_save": ["lm_head"]},
        "moda": {},
        "graphmoe-doramoe": {},
    }
    for rank in launch(zero_worker.attach, forms, base, environment=CPU):
        for form, options in forms.items():
            whole, found = base_model(), rank[form]
            torch.manual_seed(0)
            expected = trained_parameters(adapted(form, whole, **options))
            assert found["base"] == {(0,)}, "the base is partitioned, and is so again"
            assert found["adapter"].keys() == expected.keys()
            for name, tensor in found["adapter"].items():
                assert relative_error(tensor, expected[name]) < 1e-5, name


@pytest.mark.parametrize("stage, form", [(3, "graphmoe-mixlora"), (3, "graphmoe-mola"), (2, "graphmoe-mixlora")])
def test_training_equals_one_process(stage, form, base, tmp_path):
    """Load, train with 12 and 800 tokens in the same step, evaluate, generate, save and load again."""
    alone = model_of(form)
    alone.save_pretrained(tmp_path / "start")
    losses, parameters = train_alone(alone)
    alone.eval()
    saved = tmp_path / "saved"
    ranks = launch(zero_worker.run, stage, base, str(tmp_path / "start"), str(saved), environment=CPU, timeout=200)
    for rank, found in enumerate(ranks):
        assert relative_error(torch.tensor(found["losses"]), torch.tensor(losses[rank::2])) < 1e-5
        assert found["parameters"].keys() == parameters.keys()
        for name, tensor in found["parameters"].items():
            assert relative_error(tensor, parameters[name]) < 1e-5, name
        ids = zero_worker.evaluated(rank)
        with torch.no_grad():
            assert relative_error(found["logits"], alone(input_ids=ids).logits) < 1e-5
        prompt = zero_worker.evaluated(0)[:, : 5 + rank]
        expected = alone.generate(input_ids=prompt, max_new_tokens=4 + rank, do_sample=False)
        assert torch.equal(found["generated"], expected)
        assert found["shapes"] == {name: tuple(p.shape) for name, p in parameters.items()}
        assert found["counts"] == parameters_by_component(alone)
        if stage == 3:
            assert found["left"] == [], "nothing stays gathered, and no fold is kept"
            assert "run by a DeepSpeed ZeRO-3 engine already" in found["second adapter"]
    again = PeftModel.from_pretrained(base_model(), Path(saved)).eval()
    with torch.no_grad():
        assert relative_error(again(input_ids=tokens()).logits, alone(input_ids=tokens()).logits) < 1e-5

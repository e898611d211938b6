"""No hidden wait for a GPU: this package makes no tensor from host data and reads none back, in any step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from graphmoe_model import RouterLossCallback
from tests.model.checkpointing import checkpoint_activations
from tests.model.host_sync import PACKAGES, no_host_sync
from tests.model.method_models import adapted
from tests.model.method_oracles import FORMS
from tests.model.tiny_models import tokens

QUICK = ("graphmoe-mixlora", "mixdora", "graphmoe-doramoe", "mola")
EVERY_FORM = [pytest.param(form, marks=() if form in QUICK else pytest.mark.slow) for form in FORMS]

PLANTED = {
    "a tensor of numbers": "torch.tensor([1.0, 2.0])",
    "new_tensor": "x.new_tensor([1.0, 2.0])",
    "as_tensor": "torch.as_tensor([1.0])",
    "item": "x[0].item()",
    "float": "float(x[0])",
    "a condition": "bool(x[0] > 0)",
    "tolist": "x.tolist()",
    "nonzero": "x.nonzero()",
    "a mask as an index": "x[x > 0]",
    "a mask to write by": "x.clone().__setitem__(x > 0, 1.0)",
    "equal": "torch.equal(x, x)",
    "where of one argument": "torch.where(x > 0)",
    "unique": "x.unique()",
    "cpu": "x.cpu()",
}


def own(source: str, package: str = PACKAGES[0]):
    """A function of x that counts as this package's code."""
    code: dict = {"torch": torch}
    exec(compile(f"def f(x):\n    return {source}", f"{package}/planted.py", "exec"), code)
    return code["f"]


@pytest.mark.parametrize("source", PLANTED.values(), ids=PLANTED)
def test_the_guard_finds(source: str) -> None:
    """Each of these waits for a GPU. The guard names file and line; elsewhere it is none of its business."""
    x = torch.tensor([1.0, -2.0])
    with pytest.raises(AssertionError, match=r"planted.py:2: "), no_host_sync():
        own(source)(x)
    with no_host_sync():
        own(source, "/elsewhere")(x)


def test_the_guard_looks_into_backward() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            own("float(x.sum())")(grad)
            return grad

    with pytest.raises(AssertionError, match=r"planted.py:2: "), no_host_sync():
        Reads.apply(torch.ones(2, requires_grad=True)).sum().backward()


@pytest.mark.methods
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("form", EVERY_FORM)
def test_a_training_step(form: str, checkpointing: bool) -> None:
    """Forward with padding, labels and router loss, and backward; the second step as the first."""
    model = adapted(form, lora_dropout=0.1).train()
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with no_host_sync():
        for fold in ("never", "always"):
            model.peft_config["default"].fold = fold
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()


@pytest.mark.methods
@pytest.mark.parametrize("form", EVERY_FORM)
def test_generate(form: str) -> None:
    """The first token, which builds the folds, and those after it."""
    model = adapted(form).eval()
    with no_host_sync():
        model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False)


def test_training_between_logs(tmp_path) -> None:
    """RouterLossCallback adds up on the device, and reads the sum where the Trainer logs."""
    settings = {"max_steps": 2, "logging_steps": 50, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, disable_tqdm=True, **settings)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(4, 6)]
    trainer = Trainer(adapted("mixlora"), arguments, train_dataset=data, callbacks=[RouterLossCallback()])
    with no_host_sync():
        trainer.train()

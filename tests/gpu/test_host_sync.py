"""Nothing waits for the GPU, by PyTorch's own check, which knows every call that does: layers and whole models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks.sizes import METHODS
from tests.gpu.layers import MARKS, make, step
from tests.model.checkpointing import checkpoint_activations
from tests.model.host_sync import PACKAGES
from tests.model.method_models import adapted
from tests.model.method_oracles import FORMS
from tests.model.tiny_models import tokens

pytestmark = MARKS


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.methods
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layers_step_and_inference(method: str, dora: bool) -> None:
    """Forward and backward, then inference with the kept fold; a synchronising call raises."""
    layer = make(**{"rounds": 3, "dtype": "bf16", **METHODS[method], "dora": dora})
    x, _ = layer.input(64)
    upstream = torch.randn_like(x)
    step(layer, layer.fused.train(), x, upstream)  # the first call compiles kernels
    with torch.no_grad():
        layer.fused.eval()(x)
    with sync_debug_mode("error"):
        step(layer, layer.fused.train(), x, upstream)
        with torch.no_grad():
            layer.fused.eval()(x)


@pytest.mark.methods
@pytest.mark.parametrize("form", FORMS)
def test_a_models_step_and_generate(form: str) -> None:
    """With labels, padding and router loss; Transformers itself may wait, calls from this package's files may not."""
    model, ids = adapted(form, lora_dropout=0.1).cuda(), tokens().cuda()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    checkpoint_activations(model)
    model.enable_input_require_grads()

    def run() -> None:
        model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)

    run()
    with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        run()
    ours = [f"{w.filename}:{w.lineno} {w.message}" for w in caught if w.filename.startswith(PACKAGES)]
    assert not [line for line in ours if "synchroniz" in line]

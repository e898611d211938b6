"""`nn.DataParallel`, in which Trainer wraps a model by itself on a machine with several GPUs: refused, and why.

Without GPUs only what copies tensors between devices is stood in for; the rest of ``nn.DataParallel`` is PyTorch's own.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from tests.model.method_models import adapted
from tests.model.tiny_models import tiny_config, tiny_model, tokens


class OnTwoCPUs(nn.DataParallel):
    """`nn.DataParallel` over two devices, both of which are the CPU."""

    def __init__(self, module):
        super().__init__(module)
        self.device_ids, self.output_device, self.src_device_obj = [0, 1], 0, torch.device("cpu")

    def scatter(self, inputs, kwargs, device_ids):
        halves = zip(*(value.chunk(len(device_ids)) for value in kwargs.values()), strict=True)
        return [inputs] * len(device_ids), [dict(zip(kwargs, half, strict=True)) for half in halves]

    def parallel_apply(self, replicas, inputs, kwargs):
        return [copy(*own, **named) for copy, own, named in zip(replicas, inputs, kwargs, strict=True)]

    def gather(self, outputs, output_device):
        return torch.cat([own.logits for own in outputs])


@pytest.fixture(autouse=True)
def _copies_on_the_cpu(monkeypatch):
    copies = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        copies, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [[*tensors] for _ in devices]
    )


@torch.no_grad()
def test_the_stand_in_runs_what_dataparallel_can():
    """PEFT's LoRA runs in it: what is refused below is refused for what it is."""
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = model(input_ids=tokens(4)).logits
    assert torch.allclose(OnTwoCPUs(model)(input_ids=tokens(4)), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["graphmoe-mixlora", "mola", "lora"])
def test_layers_of_experts_are_refused(form):
    """The message names what starts one process per GPU, and what hides the others."""
    model = adapted(form)
    with pytest.raises(RuntimeError, match=r"nn.DataParallel.*torchrun.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        OnTwoCPUs(model)(input_ids=tokens(4))
    assert model(input_ids=tokens(4)).logits.isfinite().all(), "the model itself is as it was"


def test_a_layer_without_peft_is_refused():
    model = tiny_model()
    model.model.layers[0].mlp = FusedGraphMoEFFN(model.model.layers[0].mlp, tiny_config())
    with pytest.raises(RuntimeError, match=r"do not run under nn.DataParallel"):
        OnTwoCPUs(model)(input_ids=tokens(4))


def test_one_device_needs_no_copies():
    """CUDA_VISIBLE_DEVICES=0, as the message says: PyTorch then calls the model itself."""
    parallel = OnTwoCPUs(adapted("graphmoe-mixlora"))
    parallel.device_ids = [0]
    with torch.no_grad():
        assert parallel(input_ids=tokens(4)).logits.isfinite().all()

"""FSDP: two ranks are one process, weights that it wrote are what evaluation sees, and what cannot work is refused."""

from __future__ import annotations

import pytest

from tests.distributed import fsdp2_worker
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

FORMS = ["graphmoe-mixlora", "graphmoe-mola", "moda"]


def test_training_equals_one_process():
    """Losses, gradients, trained parameters and a later evaluation: whole decoder layers, and the model as one."""
    for rank in launch(fsdp2_worker.train_all, FORMS, timeout=300):
        assert len(rank) == len(FORMS) * len(fsdp2_worker.SHARDINGS)
        for scenario, differences in rank.items():
            assert max(differences.values()) < 1e-5, (scenario, differences)


def test_evaluation_sees_every_write():
    """FSDP2 writes weights without moving version counters, into memory that it had before: no fold may be kept.

    Both for MLPs and for linears with experts; with memory of the C library's, each tensor in pages of its own, which
    come back at the same addresses, and with an allocator that gives the same memory every time.
    """
    pages = {"MALLOC_MMAP_THRESHOLD_": "1024"}
    for rank in launch(fsdp2_worker.evaluate_all, FORMS, timeout=300, environment=pages):
        assert len(rank) == 2 * len(FORMS)
        for scenario, right in rank.items():
            assert right == [fsdp2_worker.EVALUATIONS] * 2, (scenario, right)


@pytest.mark.parametrize("sharding", list(fsdp2_worker.SHARDINGS))
def test_generate(sharding):
    """PEFT's `generate` does not call the sharded model, so FSDP has to be told of it; unasked, the error says how."""
    for rank in launch(fsdp2_worker.generate, sharding):
        assert "register_fsdp_forward_method(model, 'generate')" in rank["message"]
        assert rank["equal"], "the tokens of one process"
        assert rank["trains"]


def test_refusals():
    """What is sharded below a layer, before an adapter, or by tensor parallelism: three texts, and nothing changed."""
    for found in launch(fsdp2_worker.refuse):
        below = {
            "experts": "FSDP was applied to lora_graphmoe.default.experts inside of it",
            "projection": "FSDP was applied to base_layer.up_proj inside of it",
            "linear's router": "this RoutedLoRALinear is sharded in parts: FSDP was applied to lora_graphmoe.default.r",
            "FSDP 1 below": "FSDP was applied to lora_graphmoe.default.router inside of it",
        }
        for scenario, text in below.items():
            assert text in found[scenario]
            assert "Apply fully_shard to whole decoder layers" in found[scenario]
        for scenario in ("second adapter", "graphmoe-mixlora after FSDP", "graphmoe-mola after FSDP"):
            assert "is sharded by FSDP already" in found[scenario]
            assert "attach adapters first (get_peft_model, PeftModel.from_pretrained), then shard" in found[scenario]
        assert found["second adapter's trace"] == "['default']"
        assert found["graphmoe-mixlora's trace"] == found["graphmoe-mola's trace"] == "True"
        assert "reads weights that tensor parallelism has split over devices" in found["tensors"]
        assert (
            "mlp.gate_proj.weight is split over devices by tensor parallelism (a DTensor, S(0) on a mesh of 2)"
            in (found["after tensor parallelism"])
        )
        assert "Load the model without tp_plan" in found["after tensor parallelism"]


def test_fsdp1():
    """Whole decoder layers under FSDP 1, with the parameters' own names: the losses and logits of one process."""
    for differences in launch(fsdp2_worker.train_fsdp1):
        assert max(differences.values()) < 1e-5, differences

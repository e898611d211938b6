"""The files of docs/configs: each starts a training as it stands, shards as it says and takes the memory it says.

Nothing of a file is changed but the number of processes, and the device is a CPU (`tests.distributed.on_cpu`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

pytest.importorskip("trl")

from graphmoe_model.memory import strategies
from graphmoe_model.memory.parameter_counts import count_parameters
from graphmoe_model.memory.strategies import MAX_LIVE, PREFETCH_BUCKET, REDUCE_BUCKET
from graphmoe_tables.strategies import STRATEGIES
from tests.distributed import trainer_worker
from tests.distributed.launch import ROOT, launch
from tests.distributed.trainer_worker import with_adapter
from tests.model.tiny_models import logits, tiny_model

pytestmark = pytest.mark.distributed

CONFIGS = ROOT / "docs/configs"
NAMES = ["ddp", "fsdp2", "fsdp2-4bit", "zero2", "zero3"]
NEEDS = {"zero2": "deepspeed", "zero3": "deepspeed", "fsdp2-4bit": "bitsandbytes"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the base model in it, in bf16, as large ones are kept."""
    folder = tmp_path_factory.mktemp("configs")
    tiny_model().to(torch.bfloat16).save_pretrained(folder / "base")
    return folder


class Ran(NamedTuple):
    """A file's run: its name, where the adapter was saved, and what each process held."""

    name: str
    saved: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module", params=NAMES)
def ran(request, root) -> Ran:
    """Two steps of Trainer with AdamW in bf16 at two processes."""
    name: str = request.param
    pytest.importorskip(NEEDS.get(name, "accelerate"))
    options = {"bf16": True, "optim": "adamw_torch", "learning_rate": 1e-3}
    loading = {"quantization_config": four_bits()} if name == "fsdp2-4bit" else {}
    ranks = launch(
        trainer_worker.train,
        *("Trainer", str(root / "base"), str(root / name), options, loading),
        accelerate=["--config_file", str(CONFIGS / f"{name}.yaml")],
        timeout=120,
    )
    return Ran(name, root / name, ranks)


def four_bits() -> Any:
    """As docs/distributed.md says for FSDP2: packed into bf16, as FSDP2 splits floats only."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


def test_every_file_is_tried():
    """A file that no test runs is a promise."""
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(NAMES)
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == ["zero2", "zero3"]


def test_the_file_shards_as_it_says(ran):
    """Not another wrapper in its place, which accelerate takes without a word."""
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}
    for held in ran.ranks:
        assert held["wrapper"] == wrapper.get(ran.name.removesuffix("-4bit"), "DeepSpeedEngine")
        assert held["zero stage"] == {"zero2": 2, "zero3": 3}.get(ran.name)
        assert (held["fsdp units"] > 0) == ran.name.startswith("fsdp2")
        assert all(0 < loss < 10 for loss in held["losses"])


def test_what_a_process_holds_is_what_the_cost_model_says(ran):
    """Weights and optimizer state within 5%, which is for the padding of shards and small weights that stay whole."""
    expected = strategies.held(STRATEGIES[ran.name], count_parameters(with_adapter(tiny_model())), gpus=2)
    for held in ran.ranks:
        for part in ("base weights", "adapter weights", "optimizer state"):
            assert held[part] == pytest.approx(expected[part], rel=0.05), part


def test_the_saved_adapter_is_whole(ran):
    """By ``trainer.save_model``: every tensor, of its true shape, and it loads."""
    expected = with_adapter(tiny_model())
    saved = load_file(ran.saved / "adapter_model.safetensors")
    shapes = {n.replace(".default", ""): p.shape for n, p in expected.named_parameters() if p.requires_grad}
    assert {n: t.shape for n, t in saved.items()} == shapes
    assert logits(PeftModel.from_pretrained(tiny_model(), ran.saved)).isfinite().all()


def test_the_cost_model_has_the_sizes_of_the_files():
    """DeepSpeed's buffers are what its file says; a figure computed with others would be of no file."""
    zero = {stage: json.loads((CONFIGS / f"zero{stage}.json").read_text())["zero_optimization"] for stage in (2, 3)}
    assert {zero[2]["reduce_bucket_size"], zero[3]["reduce_bucket_size"]} == {REDUCE_BUCKET}
    assert zero[3]["stage3_prefetch_bucket_size"] == PREFETCH_BUCKET
    assert zero[3]["stage3_max_live_parameters"] == MAX_LIVE

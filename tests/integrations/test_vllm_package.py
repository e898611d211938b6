"""Exported models in the real vLLM, where it imports: found by its entry point, loaded, and their logits.

In another process each time, as vLLM sets up PyTorch and the process for itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.test_vllm import CLOSE, IDS, changed, exported, of_gemma, own_logits, without
from tests.integrations.vllm_models import FOLDER, GROUP, ROOT, entry_points
from tests.model.questions_made import byte_level
from tests.model.tiny_models import tiny_model


def process(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(
        [str(ROOT), str(FOLDER), str(installed), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CACHE_ROOT": str(installed / "cache"), "VLLM_PLUGINS": "graphmoe", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=installed, timeout=300
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Any:
    """A folder of the path in which the plugin is described as pip describes what it installs."""
    folder = tmp_path_factory.mktemp("installed")
    if process(folder, "-c", "from vllm.model_executor.models.llama import LlamaForCausalLM").returncode != 0:
        pytest.skip("vLLM does not import here: it is no dependency of GraphMoE")
    own = folder / "graphmoe_vllm-0.2.0.dist-info"
    own.mkdir()
    (own / "METADATA").write_text("Metadata-Version: 2.1\nName: graphmoe-vllm\nVersion: 0.2.0\n")
    lines = [f"[{GROUP}]", *(f"{point.name} = {point.value}" for point in entry_points())]
    (own / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(installed: Path, folder: Path, *jobs: tuple[Path, dict[str, Any]]) -> list[Any]:
    """The logits or the error of each folder with its options of the engine."""
    torch.save(IDS, folder / "ids.pt")
    lines = [
        {"folder": str(own), "options": options, "output": str(folder / f"{number}.pt")}
        for number, (own, options) in enumerate(jobs)
    ]
    (folder / "jobs.json").write_text(json.dumps(lines))
    worker = ("-m", "tests.integrations.vllm_package_worker", str(folder / "jobs.json"), str(folder / "ids.pt"))
    done = process(installed, *worker)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [torch.load(line["output"]) for line in lines]


SIZE = {"vocab_size": len(byte_level())}
FORMS = ["graphmoe-mixlora", "mixdora", "loramoe", "moda", "dora"]
KINDS = ["mistral", "qwen2", "qwen3", "phi3"]


def test_logits_are_those_of_the_exported_model(installed, tmp_path):
    """Every kind of layer, every architecture, and compiled; in one process, as its start takes the longest."""
    folders = [exported(tmp_path / form, form, tiny_model(**SIZE)) for form in FORMS]
    folders += [exported(tmp_path / kind, base=tiny_model(kind, **SIZE)) for kind in KINDS]
    folders += [exported(tmp_path / "tied", base=tiny_model(tie_word_embeddings=True, **SIZE))]
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    jobs = [(folder, {}) for folder in folders] + [(folders[0], compiled)]
    for (folder, _), found in zip(jobs, run(installed, tmp_path, *jobs), strict=True):
        assert isinstance(found, torch.Tensor), f"{folder.name}: {found}"
        torch.testing.assert_close(found, own_logits(folder), **CLOSE)


def test_half_precision(installed, tmp_path):
    folder = exported(tmp_path / "out", base=tiny_model(**SIZE))
    (found,) = run(installed, tmp_path, (folder, {"dtype": "bfloat16"}))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), own_logits(folder), atol=0.3, rtol=0.1)


def test_what_cannot_be_served_is_refused_by_name(installed, tmp_path):
    """By vLLM where its own words say what to leave out, else by the plugin."""
    folder = exported(tmp_path / "out", base=tiny_model(**SIZE))
    gemma = tmp_path / "gemma"
    shutil.copytree(folder, gemma)
    changed(gemma, of_gemma)
    jobs = [
        (folder, {"tensor_parallel_size": 2}, "ValueError: tensor_parallel_size is 2"),
        (folder, {"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this model"),
        (folder, {"enable_lora": True}, "LoRA is not supported for GraphMoEForCausalLM"),
        (folder, {"quantization": "fp8", "dtype": "bfloat16"}, "quantization is 'fp8'"),
        (folder, {"load_format": "dummy"}, "ValueError: load_format is 'dummy'"),
        (gemma, {}, "the base is a GemmaForCausalLM"),
    ]
    for linear in ("mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj"):
        lacking, lost = tmp_path / linear, f"model.layers.1.{linear}.weight"
        shutil.copytree(folder, lacking)
        without(lacking, "base/model.safetensors", lost)
        jobs.append((lacking, {}, f"lacks weights: ['{lost}']"))
    found = run(installed, tmp_path, *(job[:2] for job in jobs))
    for (_, _, message), error in zip(jobs, found, strict=True):
        assert message in str(error)

"""Exported models in the real vLLM, where it imports: found by its entry point, loaded, and their logits.

In another process each time, as vLLM sets up PyTorch and the process for itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.test_vllm import IDS, exported, own_logits
from tests.integrations.vllm_models import FOLDER, GROUP, ROOT, entry_points
from tests.model.questions_made import byte_level
from tests.model.tiny_models import tiny_model


def process(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(FOLDER), str(installed), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
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
    own = folder / "graphmoe_vllm-0.1.0.dist-info"
    own.mkdir()
    (own / "METADATA").write_text("Metadata-Version: 2.1\nName: graphmoe-vllm\nVersion: 0.1.0\n")
    lines = [f"[{GROUP}]", *(f"{point.name} = {point.value}" for point in entry_points())]
    (own / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def served(installed: Path, ids: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    torch.save(IDS, ids)
    return process(installed, "-m", "tests.integrations.vllm_package_worker", str(ids), *map(str, folders))


FORMS = ["graphmoe-mixlora", "mixdora", "loramoe", "moda", "dora"]
KINDS = ["mistral", "qwen2", "qwen3", "phi3"]


def test_logits_are_those_of_the_exported_model(installed, tmp_path):
    """Every kind of layer, and every architecture; in one process, as its start takes the longest."""
    size = {"vocab_size": len(byte_level())}
    folders = [exported(tmp_path / form, form, tiny_model(**size)) for form in FORMS]
    folders += [exported(tmp_path / kind, base=tiny_model(kind, **size)) for kind in KINDS]
    folders += [exported(tmp_path / "tied", base=tiny_model(tie_word_embeddings=True, **size))]
    done = served(installed, tmp_path / "ids.pt", *folders)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for folder in folders:
        torch.testing.assert_close(torch.load(folder / "logits.pt"), own_logits(folder), atol=1e-3, rtol=1e-4, msg=str)

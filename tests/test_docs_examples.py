"""Every `python` block of the docs runs as it stands, page by page, in an empty folder that holds what the page takes.

Of the text only names that would be downloaded are others. Blocks that need what is not here (a GPU, a package of
another extra) are fenced as `py`. README, the layers' and the checkpoints' pages are run by `tests/test_docs.py`, the
page on extending by `tests/model/test_from_outside.py` and `tests/model/test_activation_from_outside.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from graphmoe_model import GraphMoEConfig
from graphmoe_model.exporting import export_for_inference
from graphmoe_model.questions.json_lines import write_questions
from tests.model.gguf_files import FILE, llama_for, write_gguf
from tests.model.peer_format import peer_settings, write_peer
from tests.model.questions_made import byte_level, made_questions, small_llama
from tests.model.tiny_models import tiny_config
from tests.test_docs import PAGES, ROOT, blocks

ELSEWHERE = {"README.md", "docs/layer.md", "docs/checkpoints.md", "docs/extending.md"}


def evaluate() -> dict[str, Any]:
    """A model with its tokenizer, and questions."""
    pytest.importorskip("lm_eval")
    write_questions(Path("mine.jsonl"), made_questions(4))
    tokenizer = byte_level()
    return {"model": small_llama(tokenizer), "tokenizer": tokenizer}


def methods() -> dict[str, Any]:
    """A base model, PEFT's LoRA of it, and an adapter of MoE-PEFT."""
    tokenizer = byte_level()
    base = small_llama(tokenizer)
    base.save_pretrained("base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        "pefts-lora"
    )
    write_peer(Path("my-mixlora"), peer_settings("MIXLORA"))
    return {}


def inference() -> dict[str, Any]:
    """An adapter's model, exported."""
    tokenizer = byte_level()
    model = get_peft_model(small_llama(tokenizer), tiny_config(init_lora_weights=False))
    export_for_inference(model.eval(), "exported", tokenizer)
    return {}


def models() -> dict[str, Any]:
    """A GGUF file."""
    tokenizer = byte_level(special_first=False)
    Path("my-model").mkdir()
    write_gguf(Path("my-model"), llama_for(tokenizer), tokenizer)
    Path("my-model", FILE).rename("my-model/my-model.gguf")
    return {}


def questions() -> dict[str, Any]:
    write_questions(Path("mine.jsonl"), made_questions(4))
    return {}


def training() -> dict[str, Any]:
    """The page's second block is of a script that has these two imported."""
    trl = pytest.importorskip("trl")
    import graphmoe_model

    return {"trl": trl, "graphmoe_model": graphmoe_model}


def check_methods(names: dict[str, Any]) -> None:
    assert GraphMoEConfig.from_preset("graphmoe-moda").title == "GraphMoE(MoDA)"
    assert Path("merged/model.safetensors").exists()
    assert Path("my-graphmoe/adapter_model.safetensors").exists()


def check_inference(names: dict[str, Any]) -> None:
    assert not any(parameter.requires_grad for parameter in names["model"].parameters())


def check_evaluate(names: dict[str, Any]) -> None:
    assert names["results"][0].questions == 4


def check_models(names: dict[str, Any]) -> None:
    assert AutoModelForCausalLM.from_pretrained("my-model").dtype == torch.bfloat16


def check_questions(names: dict[str, Any]) -> None:
    assert len(names["questions"]) == 4


def check_training(names: dict[str, Any]) -> None:
    logs = [log for log in names["trainer"].state.log_history if "loss" in log]
    assert len(logs) == 4
    assert all("aux_loss" in log for log in logs)


RUN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "docs/evaluate.md": (evaluate, check_evaluate),
    "docs/inference.md": (inference, check_inference),
    "docs/methods.md": (methods, check_methods),
    "docs/models.md": (models, check_models),
    "docs/questions.md": (questions, check_questions),
    "docs/training.md": (training, check_training),
}
DOWNLOADED = {"HuggingFaceTB/SmolLM2-135M": "base"}


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_up, check = RUN[page]
    names = {"__name__": "__main__", **set_up()}
    for code in blocks(ROOT / page, "python"):
        for name, here in DOWNLOADED.items():
            code = code.replace(name, here)
        exec(compile(code, page, "exec"), names)
    check(names)


def test_no_page_is_left_out():
    """A new page with examples is run here, or says by `py` that its examples cannot be."""
    with_examples = {str(page.relative_to(ROOT)) for page in PAGES if blocks(page, "python")}
    assert with_examples == ELSEWHERE | set(RUN)

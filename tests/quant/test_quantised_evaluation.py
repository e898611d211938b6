"""`graphmoe eval` over bases that bitsandbytes holds in 4 and 8 bits: its answers are those of the quantised model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

pytest.importorskip("trl")
pytest.importorskip("lm_eval")
pytest.importorskip("bitsandbytes")

from graphmoe_cli.app import app
from graphmoe_model.base_models import ModelSource, load_base_model
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from tests.model.questions_made import label_logits
from tests.model.training_runs import make_base, make_questions, trained, write_questions

pytestmark = pytest.mark.quant


@pytest.mark.parametrize("bits", [4, 8])
def test_answers_are_those_of_the_quantised_model(bits, tmp_path):
    """Question by question against raw logits, with an adapter that was trained on the same quantised base."""
    base = make_base(tmp_path / "base", hidden_size=64)
    trained(base, tmp_path / "tuned", **{f"load_in_{bits}bit": True})
    write_questions(tmp_path / "asked.jsonl", 12, seed=3)
    given = ["--model", base, "--adapter", tmp_path / "tuned", "--data", tmp_path / "asked.jsonl", "--device", "cpu"]
    files = ["--output", tmp_path / "e.json", "--records", tmp_path / "r.jsonl"]
    words = ["eval", *map(str, [*given, *files]), f"--load-in-{bits}bit", "--dtype", "float32"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    conditions = json.loads((tmp_path / "e.json").read_text())["conditions"]
    assert (conditions["load_in_4bit"], conditions["load_in_8bit"]) == (bits == 4, bits == 8)
    source = ModelSource(str(base), bits=bits, dtype=torch.float32, device="cpu")
    model = attach_adapter(load_base_model(source), str(tmp_path / "tuned"), saved_config(str(tmp_path / "tuned")))
    assert "bitsandbytes" in type(model.base_model.model.model.layers[0].mlp.base_layer.gate_proj).__module__
    tokenizer = AutoTokenizer.from_pretrained(base)
    # In 8 bits bitsandbytes computes in fp16, whose sums a batch of other lengths rounds otherwise.
    close = {4: 2e-3, 8: 2e-2}[bits]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for question, record in zip(make_questions(12, seed=3), records, strict=True):
        logits = label_logits(model, tokenizer, question.prompt, question.answers)
        found = torch.tensor(record["label_logprobs"])
        torch.testing.assert_close(found - found[0], (logits - logits[0]).float(), atol=close, rtol=1e-3)

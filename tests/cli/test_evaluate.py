"""``graphmoe eval`` and ``graphmoe compare`` from their arguments to table and JSON, and what they refuse."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from graphmoe_cli.evaluate_options import EvaluateOptions
from graphmoe_model.base_models import hub_is_reachable
from graphmoe_model.questions import questions_digest
from graphmoe_model.questions.json_lines import write_questions
from tests.cli.command import graphmoe
from tests.model.questions_made import byte_level, label_logits, made_questions, small_llama
from tests.model.tiny_models import tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A base model with its tokenizer, adapters of ours and of PEFT's, and two files of questions."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = byte_level()
    small_llama(tokenizer).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, config in {
        "graphmoe": tiny_config(init_lora_weights=False, rounds=2),
        "lora": LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }.items():
        model = get_peft_model(small_llama(tokenizer), config)
        model.peft_config["default"].base_model_name_or_path = str(root / "base")
        model.save_pretrained(root / name)
    write_questions(root / "asked.jsonl", made_questions(20))
    write_questions(root / "train.jsonl", made_questions(6, seed=4))
    return {path.stem: path for path in root.iterdir()}


def evaluated(saved: dict[str, Path], output: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """The JSON of ``graphmoe eval`` on the questions (and on what is named first), and what it printed."""
    given = ("--model", saved["base"], "--output", output, "--device", "cpu", "--data", saved["asked"])
    result = graphmoe("eval", *given, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text()), result.stdout


def test_scores_conditions_and_records(saved, tmp_path):
    found, printed = evaluated(
        saved, tmp_path / "e.json", "--records", tmp_path / "r.jsonl", "--adapter", saved["graphmoe"]
    )
    scores = found["tasks"]["asked"]
    assert {"questions", "first_token_accuracy", "stderr", "acc", "acc_norm"} <= set(scores)
    assert scores["questions"] == 20
    assert scores["questions_sha256"] == questions_digest(made_questions(20))
    assert scores["questions_sha256"] != questions_digest(made_questions(20)[::-1])
    conditions = found["conditions"]
    assert conditions["adapter_settings"]["rounds"] == 2
    assert conditions["adapter_settings"]["peft_type"] == "GRAPHMOE"
    assert {"torch", "transformers", "peft", "lm_eval"} <= set(conditions["versions"])
    assert (conditions["dtype"], conditions["seed"], conditions["device"][:3]) == ("float32", 0, "cpu")
    assert conditions["commit"] is None or len(conditions["commit"].rstrip("+")) == 40
    assert conditions["data"] == {"asked": str(saved["asked"])}
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    right = [r["first_token"] == r["answer"] for r in records]
    assert sum(right) / 20 == scores["first_token_accuracy"]
    assert [r["context"] for r in records] == [question.context for question in made_questions(20)]
    assert scores["first_token_right"] == "".join("1" if each else "0" for each in right)
    assert "asked" in printed
    assert f"{100 * scores['first_token_accuracy']:.1f}" in printed


def test_prompts_that_were_cut_are_counted_of_all(saved, tmp_path):
    found, printed = evaluated(saved, tmp_path / "e.json", "--max-length", 24)
    cut = found["tasks"]["asked"]["truncated_prompts"]
    assert cut > 0
    assert f"{cut} of 40 prompts (two per question) were too long and lost their start" in printed


def test_each_model_answers_as_itself(saved, tmp_path):
    """Base, our adapter and PEFT's: three models, and the base's answers are those of raw logits."""
    records = {}
    for name, adapter in {
        "base": (),
        "ours": ("--adapter", saved["graphmoe"]),
        "lora": ("--adapter", saved["lora"]),
    }.items():
        evaluated(saved, tmp_path / f"{name}.json", "--records", tmp_path / name, "--limit", 8, *adapter)
        records[name] = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    logprobs = {json.dumps([r["label_logprobs"] for r in found]) for found in records.values()}
    assert len(logprobs) == 3
    tokenizer = byte_level()
    for question, record in zip(made_questions(8), records["base"], strict=True):
        logits = label_logits(small_llama(tokenizer), tokenizer, question.prompt, question.answers)
        assert record["first_token"] == int(logits.argmax())


def test_shots_and_samples_together(saved, tmp_path):
    more = ("--shots", 3, "--examples", saved["train"], "--samples", 5, "--temperature", 2, "--seed", 7)
    first, printed = evaluated(saved, tmp_path / "a.json", *more)
    second, _ = evaluated(saved, tmp_path / "b.json", *more, "--batch-size", 3)
    assert first["tasks"]["asked"]["self_consistency_accuracy"] == second["tasks"]["asked"]["self_consistency_accuracy"]
    assert "majority of 5" in printed
    assert (first["conditions"]["shots"], first["conditions"]["temperature"]) == (3, 2.0)


def test_several_files_are_averaged_and_compared(saved, tmp_path):
    base, printed = evaluated(saved, tmp_path / "base.json", saved["train"])
    assert base["average"]["first_token_accuracy"] == pytest.approx(
        sum(scores["first_token_accuracy"] for scores in base["tasks"].values()) / 2
    )
    assert "average" in printed
    (saved["graphmoe"] / "train_result.json").write_text(json.dumps({"seconds": 61.0, "trainable_parameters": 4321}))
    tuned, _ = evaluated(saved, tmp_path / "tuned.json", "--adapter", saved["graphmoe"])
    assert tuned["training"]["seconds"] == 61.0
    result = graphmoe("compare", tmp_path / "base.json", tmp_path / "tuned.json", "--output", tmp_path / "page.md")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.md").read_text()
    assert "| tuned | 61 | – | 4,321 |" in page
    assert "left out: train." in page


def test_an_evaluation_of_something_else_is_not_written_over(saved, tmp_path):
    """Base, then adapter, both into the default file: hours of answers would be gone without a word."""
    output = tmp_path / "e.json"
    evaluated(saved, output, "--limit", 2)
    evaluated(saved, output, "--limit", 3)  # the same again, further
    before = output.read_bytes()
    model = ("eval", "--model", saved["base"], "--output", output, "--limit", 2, "--data")
    base, asked, adapter = saved["base"], saved["asked"], saved["lora"]
    for more, now in (
        ((asked, "--adapter", adapter), f"{base} with {adapter} on asked"),
        ((saved["train"],), f"{base} without an adapter on train"),
    ):
        refused = graphmoe(*model, *more)
        assert refused.exit_code == 2
        assert f"holds the evaluation of {base} without an adapter on asked, and this one is of {now}" in refused.stderr
        assert "name another --output" in refused.stderr
        assert output.read_bytes() == before
    for text in ("{}", "notes", json.dumps({"conditions": {"seed": 0}})):
        output.write_text(text)
        assert "holds something else than an earlier evaluation" in graphmoe(*model, asked).stderr
        assert output.read_text() == text


def test_a_base_under_another_name_needs_consent(saved, tmp_path):
    other = tmp_path / "elsewhere"
    other.symlink_to(saved["base"])  # the same folder: no other base
    evaluated(saved, tmp_path / "e.json", "--adapter", saved["lora"], "--limit", 2)
    assert graphmoe("eval", "--model", other, "--adapter", saved["lora"], "--data", saved["asked"], "--limit", 2,
                    "--output", tmp_path / "e.json").exit_code == 0  # fmt: skip
    settings = json.loads((saved["lora"] / "adapter_config.json").read_text())
    adapter = tmp_path / "lora"
    adapter.mkdir()
    for path in saved["lora"].iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "org/base"}))
    arguments = (
        "--model",
        saved["base"],
        "--adapter",
        adapter,
        "--data",
        saved["asked"],
        "--output",
        tmp_path / "other.json",
    )
    refused = graphmoe("eval", *arguments)
    assert refused.exit_code == 2
    assert "'org/base'" in refused.stderr
    assert str(saved["base"]) in refused.stderr
    assert graphmoe("eval", *arguments, "--allow-other-base", "--limit", 2).exit_code == 0


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--data", "boolk"), "unknown task 'boolk', did you mean 'boolq'?"),
        (("--data", "none.jsonl"), "there is no file none.jsonl"),
        (("--data", "{asked}", "--shots", "2"), "is a file, which has no training split"),
        (("--data", "{asked}", "--shots", "7", "--examples", "{train}"), "of asked, and {train} has 6; ask"),
        (("--data", "{asked}", "--adapter", "/no/such"), "no folder /no/such"),
        (("--data", "{asked}", "--adapter", "{base}"), "adapter_config.json"),
        (("--data", "{asked}", "--gguf-file", "a.gguf"), "has no file a.gguf"),
        (("--data", "{asked}", "--output", "/no/such/e.json"), "there is no folder /no/such"),
    ],
)
def test_wrong_input_ends_in_one_line(saved, tmp_path, arguments, told):
    given = [argument.format_map(saved) for argument in arguments]
    result = graphmoe("eval", "--model", saved["base"], "--output", tmp_path / "e.json", *given)
    assert result.exit_code == 2, result.output
    assert told.format_map(saved) in result.stderr
    assert "\n" not in result.stderr.strip()
    assert not (tmp_path / "e.json").exists()


def test_without_lm_eval_it_says_what_installs_it(monkeypatch):
    monkeypatch.setattr("graphmoe_cli.evaluate_options.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'graphmoe\[eval\]'"):
        EvaluateOptions(model="m", data=("boolq",))


def test_an_adapter_of_an_unknown_method_is_named(saved, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MIXLORA"}))
    result = graphmoe("eval", "--model", saved["base"], "--adapter", tmp_path, "--data", saved["asked"])
    assert result.exit_code == 2
    assert "'MIXLORA'" in result.stderr
    assert "\n" not in result.stderr.strip()


def test_an_adapter_without_its_weights_is_named(saved, tmp_path):
    """PEFT would ask the hub for them, and speak of the network."""
    for name in ("graphmoe", "lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text((saved[name] / "adapter_config.json").read_text())
        result = graphmoe("eval", "--model", saved["base"], "--adapter", tmp_path / name, "--data", saved["asked"])
        assert result.exit_code == 2
        told = f"{tmp_path / name} holds neither adapter_model.safetensors nor adapter_model.bin; name the folder in"
        assert told in result.stderr


def test_a_table_in_a_pipe_is_not_cut(saved, tmp_path):
    long = tmp_path / f"{'a_file_of_questions_with_a_long_name_' * 3}.jsonl"
    long.write_bytes(saved["asked"].read_bytes())
    found, printed = evaluated(saved, tmp_path / "e.json", long)
    assert set(found["tasks"]) == {"asked", long.stem}
    assert long.stem in printed
    assert "…" not in printed


def test_lm_evals_tasks_without_the_hub_end_within_seconds(saved, tmp_path, monkeypatch):
    """With its retries, the hub's client would try for half a minute per file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("graphmoe_model.evaluation.standard.hub_is_reachable", lambda: False)
    start = time.perf_counter()
    result = graphmoe("eval", "--model", saved["base"], "--tasks", "arc_easy", "piqa", "--output", tmp_path / "e.json")
    assert result.exit_code == 2
    assert "lm-eval's tasks (arc_easy, piqa) read their data from the hub" in result.stderr
    assert "HF_HUB_OFFLINE=1" in result.stderr
    assert time.perf_counter() - start < 10


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("graphmoe_model.base_models.hub.get_session", lambda: pytest.fail("it was asked"))
    assert hub_is_reachable() is False


def test_a_page_that_cannot_be_written_is_said_with_its_option(tmp_path):
    for output, told in ((tmp_path, "is a folder; name a file"), (tmp_path / "no" / "page.md", "there is no folder")):
        result = graphmoe("compare", "a.json", "b.json", "--output", output)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"graphmoe compare: error: --output {output}")
        assert told in result.stderr


def test_what_is_no_evaluation_is_not_compared(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text(json.dumps({"trainable_parameters": 1, "conditions": {"seed": 0}}))
    for names, told in ((("none.json", "b.json"), "cannot be read"), (("a.json", "b.json"), "must hold a JSON object"),
                        (("b.json", "b.json"), "b.json is no evaluation: it has no tasks and no conditions"),
                        (("c.json", "b.json"), "c.json is what graphmoe train wrote: it has no tasks;")):  # fmt: skip
        result = graphmoe("compare", *(tmp_path / name for name in names))
        assert result.exit_code == 2
        assert told in result.stderr

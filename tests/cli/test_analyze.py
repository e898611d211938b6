"""``graphmoe analyze`` from its arguments to table, pictures and JSON, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphmoe_cli import pictures
from graphmoe_model import collect_routing
from graphmoe_model.analysis.prompts import read_prompts
from graphmoe_model.questions import QuestionEncoder
from graphmoe_model.questions.json_lines import write_questions
from tests.cli.command import graphmoe
from tests.cli.drawn_pictures import assert_picture
from tests.model.questions_made import byte_level, made_questions, small_llama
from tests.model.tiny_models import tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A base model with its tokenizer, adapters with and without routers and rounds, and two files of questions."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = byte_level()
    small_llama(tokenizer, layers=2).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, config in {
        "graphmoe": tiny_config(init_lora_weights=False, rounds=3),
        "again": tiny_config(init_lora_weights=False, rounds=3),
        "mixlora": tiny_config(init_lora_weights=False, rounds=1),
        "mola": tiny_config(init_lora_weights=False, rounds=2, method="mola", num_experts="2-4"),
        "plain": tiny_config(method="lora", rounds=1, num_experts=1, top_k=1),
        "lora": LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }.items():
        model = get_peft_model(small_llama(tokenizer, layers=2), config)
        model.peft_config["default"].base_model_name_or_path = str(root / "base")
        model.save_pretrained(root / name)
    write_questions(root / "asked.jsonl", made_questions(12))
    write_questions(root / "more.jsonl", made_questions(5, seed=4))
    return {path.stem: path for path in root.iterdir()}


def test_balance_of_two_adapters_on_two_tasks(saved, tmp_path):
    """JSON, table and pictures; the shares are those that the loaded model counts on the same prompts."""
    adapters, data = (saved["mixlora"], saved["graphmoe"]), (saved["asked"], saved["more"])
    given = ("--model", saved["base"], "--adapter", *adapters, "--data", *data, "--limit", 6, "--device", "cpu")
    result = graphmoe("analyze", "balance", *given, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "new" / "balance.json").read_text())
    pairs = [(own["adapter"], own["task"]) for own in document["balance"]]
    names = ["MixLoRA, T = 1", "GraphMoE(MixLoRA), T = 3"]
    assert pairs == [(adapter, task) for adapter in names for task in ("asked", "more")]
    assert [len(own["rounds"]) for own in document["balance"]] == [1, 1, 3, 3]
    tokenizer = AutoTokenizer.from_pretrained(saved["base"])
    prompts = [QuestionEncoder(tokenizer).prompt_ids(question) for question in made_questions(12)[:6]]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["base"]), saved["graphmoe"])
    with collect_routing(model) as load:
        read_prompts(model, prompts, 3)
    (own,) = [own for own in document["balance"] if (own["adapter"], own["task"]) == (names[1], "asked")]
    assert own["tokens"] == sum(map(len, prompts))
    assert own["shares"] == {name: shares.tolist() for name, shares in load.load().items()}
    conditions = document["conditions"]
    assert conditions["limit"] == 6
    assert conditions["data"] == {"asked": str(saved["asked"]), "more": str(saved["more"])}
    assert [settings["rounds"] for settings in conditions["adapters"].values()] == [1, 3]
    assert result.stdout.count("expert 0") == 1
    first = own["shares"]["model.layers.0.mlp"][0]
    assert " ".join(f"{100 * share:.1f}%" for share in first) in " ".join(result.stdout.split())
    for name in ("balance.png", "balance_map.png"):
        assert_picture(tmp_path / "new" / name)
    for word in (*names, "asked", "more", "deviation"):
        assert word in result.stdout


def test_adapters_of_one_method_have_their_folders_names(saved, tmp_path):
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], saved["again"], "--data", saved["more"])
    assert graphmoe("analyze", "balance", *given, "--no-plot", "--out", tmp_path).exit_code == 0
    document = json.loads((tmp_path / "balance.json").read_text())
    assert [own["adapter"] for own in document["balance"]] == [
        f"GraphMoE(MixLoRA), T = 3, {saved[name].name}" for name in ("graphmoe", "again")
    ]
    assert not [*tmp_path.glob("*.png"), *tmp_path.glob("*.pdf")]


def test_experts_that_differ_by_layer_and_on_attention_are_drawn(saved, tmp_path):
    """MoLA: routers of 2 and of 4 experts, those of attention without rounds."""
    given = ("--model", saved["base"], "--adapter", saved["mola"], "--data", saved["more"], "--out", tmp_path)
    result = graphmoe("analyze", "balance", *given)
    assert result.exit_code == 0, result.output
    assert "attention" in result.stdout
    assert_picture(tmp_path / "balance_map.png")
    result = graphmoe("analyze", "trace", *given, "--draws", 5)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "trace.json").read_text())
    assert {len(own["experts"]) for own in document["routers"].values()} == {2}
    assert {own["num_experts"] for own in document["routers"].values()} == {2, 4}


def test_a_trace_of_texts_and_questions(saved, tmp_path):
    """The first text token by token; the specialisation over all."""
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], "--device", "cpu", "--out", tmp_path)
    more = ("--text", "the river grows", "--text", "metal $x_1$ falls", "--data", saved["more"], "--limit", 3)
    result = graphmoe("analyze", "trace", *given, *more, "--draws", 20, "--router", "model.layers.1.mlp")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "trace.json").read_text())
    tokenizer = byte_level()
    assert "".join(document["tokens"]) == tokenizer.decode(tokenizer("the river grows")["input_ids"])
    assert document["texts"] == 5
    assert set(document["routers"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    for own in document["routers"].values():
        assert [len(own["experts"]), len(own["experts"][0]), len(own["experts"][0][0])] == [
            3,
            len(document["tokens"]),
            2,
        ]
    overall = document["specialisation"]
    assert set(overall) == {"information", "null_mean", "null_95", "p", "kept"}
    assert f"{overall['information']:.4f}" in result.stdout
    assert_picture(tmp_path / "trace.png")
    assert "The picture has the first" not in result.stdout


def test_results_of_something_else_are_not_written_over(saved, tmp_path):
    """Nor their pictures; the same again may be, with more or fewer questions. As `graphmoe eval` has it."""
    base, adapter, asked = saved["base"], saved["graphmoe"], saved["asked"]
    for which, of in (
        ("balance", f"{base} with {adapter} on asked"),
        ("trace", f"{base} with {adapter} on asked, 'a'"),
    ):
        file, more = tmp_path / f"{which}.json", () if which == "balance" else ("--text", "a", "--draws", 3)
        given = ("analyze", which, "--model", base, "--no-plot", "--out", tmp_path, "--adapter")
        for limit in (2, 3):
            result = graphmoe(*given, adapter, "--data", asked, "--limit", limit, *more)
            assert result.exit_code == 0, result.output
        before = file.read_bytes()
        for words in ((saved["again"], "--data", asked), (adapter, "--data", saved["more"])):
            refused = graphmoe(*given, *words, *more)
            assert refused.exit_code == 2
            now = f"{base} with {words[0]} on {words[2].stem}"
            assert f"{file} holds the {which} of {of}, and this one is of {now}" in refused.stderr
            assert "; name another --out, or move its files and pictures away" in refused.stderr
        if which == "trace":
            refused = graphmoe(*given, adapter, "--data", asked, "--text", "b")
            assert f"holds the trace of {of}, and this one is of {base} with {adapter} on asked, 'b'" in refused.stderr
        assert file.read_bytes() == before
        for text in ("[]", "notes", json.dumps({"conditions": {"model": str(base), "adapter": "a"}})):
            file.write_text(text)
            said = graphmoe(*given, adapter, "--data", asked, *more).stderr
            assert f"{file} holds something else than an earlier {which}" in said
            assert file.read_text() == text


def test_signs_that_the_font_lacks_are_drawn_by_number():
    """Not as empty boxes, under a warning for each."""
    pytest.importorskip("matplotlib")
    from graphmoe_model.analysis.plots import _visible

    assert _visible(" a\U0001f642$") == r"·a<1F642>\$"
    assert _visible("") == "∅"


def test_a_long_text_is_said_to_be_drawn_in_part(saved, tmp_path):
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], "--out", tmp_path, "--draws", 2)
    result = graphmoe("analyze", "trace", *given, "--text", "river " * 60)
    assert result.exit_code == 0, result.output
    tokens = len(json.loads((tmp_path / "trace.json").read_text())["tokens"])
    assert f"The picture has the first 56 of {tokens} tokens; the JSON has all." in " ".join(result.stdout.split())


WRONG = {
    "balance --adapter PLAIN": "PLAIN is LoRA, which has no router, so there is no routing to analyze",
    "balance --adapter LORA": "LORA is LoRA, which has no router",
    "trace --adapter MIXLORA": "MIXLORA is MixLoRA, T = 1: it has one round, so there are no rounds to compare",
    "balance --adapter ./nowhere": "there is no such folder here",
    "balance --adapter GRAPHMOE --model MORE_BASE": "was trained on the base model",
    "trace --adapter GRAPHMOE --router x": "--router x: there is no such router; there are model.layers.0.mlp",
    "balance --adapter GRAPHMOE --data ./x.jsonl": "there is no file x.jsonl",
    "trace --adapter GRAPHMOE --text LONG": "a text of --text has",
    "balance --adapter GRAPHMOE --out ASKED": "is a file; name a folder",
    "balance --adapter GRAPHMOE --model EMPTY": "so it is no model",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_analyzed_ends_in_one_line_and_status_2(line, saved, tmp_path):
    """An adapter's faults before the model is loaded."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "more_base").mkdir()
    (tmp_path / "more_base" / "config.json").write_text("{}")
    places = {name.upper(): path for name, path in saved.items()} | {
        "EMPTY": tmp_path / "empty",
        "MORE_BASE": tmp_path / "more_base",
        "LONG": "river " * 2000,
    }
    which, *words = line.split()
    given = [places.get(word, word) for word in words]
    for option, value in (("--model", saved["base"]), ("--data", saved["more"]), ("--out", tmp_path / "new" / "out")):
        given += [] if option in words else [option, value]
    if line.startswith("balance --adapter GRAPHMOE --model EMPTY"):
        given.append("--allow-other-base")
    result = graphmoe("analyze", which, *given, "--device", "cpu")
    assert result.exit_code == 2
    said = result.stderr
    for name, path in places.items():
        said = said.replace(str(path), name)
    assert WRONG[line] in said
    assert result.stderr.startswith(f"graphmoe analyze {which}: error: ")
    assert not (tmp_path / "new").exists()  # a refused command leaves no empty folder


def test_pictures_without_matplotlib(saved, tmp_path, monkeypatch):
    """Left out and said so; asked for, refused before anything is read, with the extra that brings it."""
    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(pictures.importlib.util, "find_spec", hidden)
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], "--data", saved["more"], "--out", tmp_path)
    result = graphmoe("analyze", "balance", *given)
    assert result.exit_code == 0, result.output
    assert "No pictures: matplotlib is not installed; it comes with pip install" in " ".join(result.stdout.split())
    result = graphmoe("analyze", "trace", *given, "--plot")
    assert result.exit_code == 2
    assert "pip install 'graphmoe[bench]', or leave the pictures out by --no-plot" in result.stderr
    assert not (tmp_path / "trace.json").exists()


def test_a_text_may_have_commas(saved, tmp_path):
    """Values of other lists with commas are refused, as several in one word."""
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], "--text", "yes, no, or neither", "--no-plot")
    result = graphmoe("analyze", "trace", *given, "--draws", 10, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "trace.json").read_text())["conditions"]["text"] == ["yes, no, or neither"]

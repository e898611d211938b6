"""``graphmoe params`` from its arguments to its table, what it says to wrong ones; and the help of ``convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from graphmoe_cli.runs import params as runs
from graphmoe_model import GraphMoEConfig
from graphmoe_model.base_models import MODEL_SHAPES, model_config
from graphmoe_model.parameters import adapter_parameters
from graphmoe_tables.methods import METHODS, PRESETS
from tests.cli.command import graphmoe
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A base model, a GraphMoE adapter and a LoRA adapter of it, each in its folder."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "base")
    tiny_peft_model().save_pretrained(root / "graphmoe")
    get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(root / "lora")
    return {name: root / name for name in ("base", "graphmoe", "lora")}


def counted(*arguments: object) -> list[dict[str, Any]]:
    """The adapters of ``graphmoe params --json``."""
    result = graphmoe("params", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["adapters"]


def test_params_prints_the_papers_counts():
    """One row an adapter, no component that none has, and no number shortened to fit a narrow terminal."""
    result = graphmoe("params", "--preset", "mixlora", "graphmoe-mixlora", "--model", "llama-3-8b")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    experts = ["13,631,488", "226,492,416", "1,048,576"]
    assert rows["mixlora"] == ["mixlora", "MixLoRA", *experts, "0", "241,172,480", "3.003%"]
    assert rows["graphmoe-mixlora"][1:] == ["GraphMoE(MixLoRA)", *experts, "230,505,856", "471,678,336", "5.874%"]
    assert "8,030,261,248 parameters" in result.stdout
    assert "magnitudes" not in result.stdout
    assert "…" not in result.stdout


def test_params_as_json():
    """Alone on stdout, so that a program can read it; without components that are zero."""
    result = graphmoe("params", "--preset", "mixlora", "--model", "tiny", "--json")
    expected = adapter_parameters(GraphMoEConfig.from_preset("mixlora"), model_config("tiny"))
    assert json.loads(result.stdout) == {
        "model": "tiny",
        "base_parameters": expected.base,
        "adapters": [
            {
                "name": "mixlora",
                "method": "MixLoRA",
                "components": {name: count for name, count in expected.components.items() if count},
                "total": expected.total,
                "share": expected.total / expected.base,
            }
        ],
    }


@pytest.mark.methods
def test_params_of_all_presets():
    """In the order of the papers, each once, whatever else is named."""
    found = counted("--preset", "mola", "all", "--model", "tiny")
    assert [adapter["name"] for adapter in found] == list(PRESETS)
    assert [adapter["method"] for adapter in found] == [GraphMoEConfig.from_preset(name).title for name in PRESETS]


@pytest.mark.methods
@pytest.mark.parametrize(
    "arguments, settings",
    [
        ("--preset mixlora --r 32", {"r": 32}),
        ("--preset mixlora --num-experts 4 --top-k 3", {"num_experts": 4, "top_k": 3}),
        ("--preset mixlora --num-experts 2-4", {"num_experts": "2-4"}),
        ("--preset mixlora --num-experts 2,4", {"num_experts": [2, 4]}),
        ("--preset mixlora --rounds 2", {"rounds": 2}),
        ("--preset mixlora --dora", {"use_dora": True}),
        ("--preset mixdora --no-dora", {}),
    ],
)
def test_params_overrules_a_preset(arguments, settings):
    """An option taken and forgotten would print the count of something else."""
    expected = adapter_parameters(GraphMoEConfig.from_preset("mixlora", **settings), model_config("tiny"))
    (found,) = counted(*arguments.split(), "--model", "tiny")
    assert found["total"] == expected.total
    assert found["method"] == GraphMoEConfig.from_preset("mixlora", **settings).title


@pytest.mark.methods
@pytest.mark.parametrize("method", METHODS)
def test_params_of_a_method_with_its_defaults(method):
    config = GraphMoEConfig(method=method, r=4)
    (found,) = counted("--method", method, "--r", 4, "--model", "tiny")
    assert (found["name"], found["method"]) == (method, config.title)
    assert found["total"] == adapter_parameters(config, model_config("tiny")).total


def test_params_of_a_saved_adapter(saved, tmp_path):
    """On the model that is named, read from its folder, or else on the adapter's own."""
    (found,) = counted("--adapter", saved["graphmoe"], "--model", saved["base"])
    assert found["total"] == adapter_parameters(tiny_config(), tiny_model().config).total
    GraphMoEConfig.from_preset("mixlora", base_model_name_or_path="tiny").save_pretrained(str(tmp_path))
    assert [a["total"] for a in counted("--adapter", tmp_path)] == [
        a["total"] for a in counted("--preset", "mixlora", "--model", "tiny")
    ]


def test_a_local_base_may_be_called_as_a_known_model_is(tmp_path, monkeypatch):
    """The folder that the adapter's configuration names is its base; the built-in model used to be counted instead."""
    monkeypatch.chdir(tmp_path)
    GraphMoEConfig.from_preset("mixlora", base_model_name_or_path="tiny").save_pretrained("adapter")
    known = graphmoe("params", "--adapter", "adapter")
    assert "counted on the known model" in known.stderr
    tiny_model().save_pretrained("tiny")
    local = graphmoe("params", "--adapter", "adapter", "--json")
    expected = adapter_parameters(GraphMoEConfig.from_preset("mixlora"), tiny_model().config)
    assert json.loads(local.stdout)["adapters"][0]["total"] == expected.total
    assert local.stderr == ""


@pytest.mark.parametrize("name", ["Tiny", "TINY"])
def test_known_models_are_found_however_they_are_written(name):
    """As their names on the hub are: Llama-3.2-1B."""
    assert counted("--preset", "mixlora", "--model", name) == counted("--preset", "mixlora", "--model", "tiny")


WRONG_PARAMS = {
    "nothing to count": ("--model tiny", "name what to count: --preset (all, lora, dora, mixlora"),
    "no model": ("--preset mixlora", "name the base model by --model: tiny, llama-3.2-1b"),
    "an adapter of no model": ("--adapter GRAPHMOE", "name the base model by --model"),
    "unknown preset": ("--preset mixlor --model tiny", "unknown preset 'mixlor'; there are lora, dora, mixlora"),
    "unknown model": ("--preset mixlora --model ./nowhere", "there is no folder ./nowhere"),
    "a file": ("--preset mixlora --model models/config.json", "name the model's folder, whose config.json is read"),
    "not a model": ("--preset mixlora --model TMP", "has no config.json, so it is no model"),
    "an adapter as the model": ("--preset mixlora --model GRAPHMOE", "is an adapter: pass its base model"),
    "not an adapter": ("--adapter BASE --model tiny", "cannot load the adapter"),
    "another method's adapter": ("--adapter LORA --model tiny", "is an adapter of LoraConfig; GraphMoE adapters"),
    "preset and adapter": ("--adapter GRAPHMOE --preset mola --no-dora --r 2", "leave out --preset, --r, --no-dora"),
    "preset and method": ("--preset mixlora --method mola --model tiny", "a --preset has its own method; choose one"),
    "what a method has not": (
        "--preset all --num-experts 4 --model tiny",
        "--preset lora: method='lora' has one expert",
    ),
    "no number of experts": ("--preset mixlora --num-experts 4,x --model tiny", "num_experts='4,x' is no pattern"),
    "5,000 digits": (f"--preset mixlora --num-experts {'9' * 5000} --model tiny", "(5002 characters) is no pattern"),
    "5,000 digits in a list": (f"--preset mixlora --num-experts 4,{'9' * 5000} --model tiny", "is no pattern"),
    "10^18 ranks": (f"--preset mixlora --r {10**18} --model tiny", "r must be at most 65536"),
    "10^30 rounds": (f"--preset mixlora --rounds {10**30} --model tiny", "rounds must be at most 100"),
    "another model's layers": ("--preset mixlora --num-experts 4,4,4 --model tiny", "num_experts lists 3 layers"),
}


@pytest.mark.methods
@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_a_wrong_argument_of_params_ends_in_one_line_and_status_2(case, saved, tmp_path):
    places = {"TMP": tmp_path, **{name.upper(): path for name, path in saved.items()}}
    arguments, message = WRONG_PARAMS[case]
    result = graphmoe("params", *(places.get(word, word) for word in arguments.split()))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("graphmoe params: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


ODD_CONFIGS = {
    "null": ("null", "must hold a JSON object with the adapter's settings, got NoneType"),
    "a number": ("3", "must hold a JSON object with the adapter's settings, got int"),
    "a list": ("[]", "must hold a JSON object with the adapter's settings, got list"),
    "nothing": ("", "is not JSON (Expecting value"),
    "nested deep": ("[" * 200_000, "is not JSON (maximum recursion depth exceeded"),
    "objects nested deep": ('{"a":' * 200_000, "is not JSON (maximum recursion depth exceeded"),
    "no type": ("{}", "adapter_config.json names no method: peft_type is None"),
    "a list of types": ('{"peft_type": ["LORA"]}', "names no method: peft_type is ['LORA']"),
    "a pattern that is a list": ('{"peft_type": "GRAPHMOE", "rank_pattern": []}', "rank_pattern must be a dict"),
    "a pattern that is a number": ('{"peft_type": "GRAPHMOE", "alpha_pattern": 3}', "alpha_pattern must be a dict"),
    "a model that is a number": (
        '{"peft_type": "GRAPHMOE", "base_model_name_or_path": 3}',
        "base_model_name_or_path must be a name or None, got 3",
    ),
    "markup": (
        '{"peft_type": "GRAPHMOE", "base_model_name_or_path": "tiny", "target_modules": ["mlp[/red]"]}',
        "no module is called mlp[/red]",
    ),
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_an_adapter_config_that_is_none_ends_in_one_line_and_status_2(case, tmp_path):
    """Whatever JSON can hold, not a traceback of PEFT's."""
    text, message = ODD_CONFIGS[case]
    (tmp_path / "adapter_config.json").write_text(text)
    result = graphmoe("params", "--adapter", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_help_of_params_names_what_there_is():
    """Each name of the tables that the options take names from."""
    help_text = " ".join(graphmoe("params", "--help").stdout.replace("│", " ").split())
    for name in (*MODEL_SHAPES, *METHODS, *(preset for preset in PRESETS if "graphmoe" not in preset)):
        assert name in help_text
    for option in ("--preset", "--adapter", "--model", "--method", "--r", "--num-experts", "--top-k", "--rounds"):
        assert option in help_text
    for option in ("--dora", "--no-dora", "--json"):
        assert option in help_text


def test_the_help_of_convert_names_its_options():
    help_text = graphmoe("convert", "--help").stdout.lower()
    for word in (
        "source",
        "target",
        "--to",
        "graphmoe",
        "peft",
        "moe-peft",
        "attention-lora",
        "--rounds",
        "--overwrite",
    ):
        assert word in help_text


def test_whoever_asks_the_hub_is_told(monkeypatch):
    """Without a network the answer takes half a minute, in which nothing was said."""
    asked = []
    monkeypatch.setattr(runs, "run", lambda console, **options: asked.append(options))
    result = graphmoe("params", "--adapter", "owner/adapter", "--model", "gpt-none")
    assert result.exit_code == 0
    assert "There is no folder owner/adapter here: asking the hub for that adapter." in result.stderr
    assert "There is no folder gpt-none here: asking the hub for that model." in result.stderr
    assert graphmoe("params", "--method", "mixlora", "--model", "tiny").stderr == ""
    assert len(asked) == 2


@pytest.mark.parametrize("name", [" ", "my model", "owner/my model"])
def test_a_name_that_no_model_on_the_hub_has_is_refused_without_asking(name):
    result = graphmoe("params", "--method", "mixlora", "--model", name)
    assert result.exit_code == 2
    assert f"cannot load the model {name!r}: there is no such folder here" in result.stderr
    assert "asking the hub" not in result.stderr

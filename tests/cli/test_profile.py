"""``graphmoe profile`` from its arguments to its files, and what it says to wrong ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from graphmoe_cli import pictures
from graphmoe_cli.profile_options import FreshAdapter, ProfileOptions
from graphmoe_cli.runs import profile as runs
from graphmoe_model.profiling import CATEGORIES, out_of_memory
from tests.cli.command import graphmoe
from tests.cli.drawn_pictures import assert_picture
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model


def test_a_profile_writes_table_plot_data_and_traces(tmp_path):
    out = tmp_path / "new" / "report"
    size = ("--preset", "tiny", "--layers", 1, "--seq", 4, 8, "--rounds", 0, 2)
    result = graphmoe("profile", *size, "--repetitions", 1, "--out", out)
    assert result.exit_code == 0, result.output
    variants = [(a, p, n) for a in ("none", "GraphMoE(MixLoRA), T = 2") for p in ("prefill", "decode") for n in (4, 8)]

    document = json.loads((out / "profile.json").read_text())
    assert [(e["adapter"], e["phase"], e["tokens"]) for e in document["profiles"]] == variants
    for entry in document["profiles"]:
        assert entry["model"] == "tiny"
        assert set(entry["seconds"]) == set(CATEGORIES)
        assert (entry["seconds"]["gru"] > 0) == (entry["adapter"] != "none")
    assert document["conditions"]["layers"] == 1
    assert {"device", "threads", "cores", "load average", "dtype", "torch", "transformers"} <= set(
        document["conditions"]
    )

    assert_picture(out / "profile.png")
    table = (out / "profile.md").read_text()
    assert table.count("| GraphMoE(MixLoRA), T = 2 |") == 4
    assert "dtype float32" in table
    assert "GraphMoE(MixLoRA), T = 2" in result.stdout
    assert "attention" in result.stdout
    adapters = ("none", "graphmoe-mixlora-t-2")
    names = [f"trace_{a}_{p}_{n}.json" for a in adapters for p in ("prefill", "decode") for n in (4, 8)]
    for name in names:
        assert json.loads((out / name).read_text())["traceEvents"]
    assert {path.name for path in out.iterdir()} == {
        *names,
        *(f"profile.{kind}" for kind in ("json", "md", "png", "pdf")),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A base model, a GraphMoE adapter and a LoRA adapter of it, each in its folder."""
    root = tmp_path_factory.mktemp("saved")
    paths = {name: root / name for name in ("base", "graphmoe", "lora", "other", "prompt")}
    tiny_model().save_pretrained(paths["base"])
    tiny_peft_model(backend="torch").save_pretrained(paths["graphmoe"])
    get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(paths["lora"])
    get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        paths["prompt"]
    )
    get_peft_model(tiny_model(hidden_size=64), tiny_config()).save_pretrained(paths["other"])
    return paths


QUICK = ("--seq", 4, "--phase", "prefill", "--repetitions", 1, "--no-plot")


@pytest.mark.parametrize("adapter, title", [("graphmoe", "GraphMoE(MixLoRA), T = 3"), ("lora", "LoRA")])
def test_a_saved_model_with_its_adapter(saved, tmp_path, adapter, title):
    """The adapter alone unless rounds are asked for too; and no plot where none is wanted."""
    models = ("--model", saved["base"], "--adapter", saved[adapter])
    for rounds, titles in (((), [title]), (("--rounds", 0), ["none", title])):
        result = graphmoe("profile", *models, *rounds, *QUICK, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        profiles = json.loads((tmp_path / "profile.json").read_text())["profiles"]
        assert [entry["adapter"] for entry in profiles] == titles
        assert {entry["model"] for entry in profiles} == {str(saved["base"])}
    assert not (tmp_path / "profile.png").exists()


def test_a_saved_adapter_of_a_fresh_one_s_method_has_its_folder_s_name(saved, tmp_path):
    """Else their rows could not be told apart, and the one's traces would lie over the other's."""
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], "--method", "mixlora", "--rounds", 3)
    result = graphmoe("profile", *given, *QUICK, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    profiles = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert [entry["adapter"] for entry in profiles] == [
        "GraphMoE(MixLoRA), T = 3",
        "GraphMoE(MixLoRA), T = 3, graphmoe",
    ]
    assert len(list(tmp_path.glob("trace_*.json"))) == 2


def test_fold_and_backend_reach_the_layers(saved, tmp_path, monkeypatch):
    """Of fresh adapters and of saved ones; an option that is taken and forgotten would give a wrong comparison."""
    seen = []

    def note(model, title, *_, **__):
        layer = next(m for m in model.modules() if hasattr(m, "lora_graphmoe"))
        config = layer.lora_graphmoe["default"].config
        seen.append((config.rounds, config.fold, config.backend))
        raise ValueError("enough")

    monkeypatch.setattr(runs, "profile_model", note)
    base = ("profile", "--model", saved["base"], "--out", tmp_path, "--fold", "never", "--backend", "torch")
    graphmoe(*base, "--rounds", 2)
    graphmoe(*base, "--adapter", saved["graphmoe"])
    assert seen == [(2, "never", "torch"), (3, "never", "torch")]


WRONG = {
    "no model": ("", "name the model by --model or by --preset (tiny, llama-3.2-1b"),
    "two models": ("--preset tiny --model x", "both were given"),
    "unknown preset": (
        "--preset tyni",
        "unknown model 'tyni'; there are tiny, llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-4b",
    ),
    "layers of a model": ("--model BASE --layers 3", "--layers sets the layers of a --preset"),
    "no layers": ("--preset tiny --layers 0", "at least 1 layer, got 0"),
    "no threads": ("--preset tiny --threads 0", "--threads must be at least 1, got 0"),
    "no such folder": ("--model ./nowhere", "there is no folder ./nowhere"),
    "not a model": ("--model TMP", "has no config.json, so it is no model"),
    "an adapter as the model": ("--model GRAPHMOE", "is an adapter: pass its base model with --model"),
    "not an adapter": ("--model BASE --adapter BASE", "cannot load the adapter"),
    "another model's adapter": ("--model BASE --adapter OTHER", "cannot attach the adapter: the checkpoint does not"),
    "LoRA has no fold": ("--model BASE --adapter LORA --fold always", "LoraConfig, which has no fold; leave"),
    "virtual tokens": ("--model BASE --adapter PROMPT", "PromptTuningConfig, virtual tokens"),
    "negative rounds": ("--preset tiny --layers 1 --rounds -1", "rounds must be 0 (no adapter) or more, got -1"),
    "LoRA with rounds": (
        "--preset tiny --method lora --rounds 3",
        "lora has no experts and so no rounds, got --rounds 3",
    ),
    "too long for a preset": ("--preset llama-3-8b --seq 9000", "longer than the model's 8192 positions"),
    "too long for a model": ("--model BASE --seq 200", "longer than the model's 128 positions"),
    "no batch": ("--model BASE --seq 4 --batch 0", "batch must be at least 1, got 0"),
    "out is a file": ("--preset tiny --out FILE", "is a file; name a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_ends_in_one_line_and_status_2(case, saved, tmp_path):
    (tmp_path / "file").touch()
    places = {"TMP": tmp_path, "FILE": tmp_path / "file", **{name.upper(): path for name, path in saved.items()}}
    arguments, message = WRONG[case]
    out = () if "--out" in arguments else ("--out", tmp_path / "new" / "out")
    result = graphmoe("profile", *(places.get(word, word) for word in arguments.split()), "--device", "cpu", *out)
    assert result.exit_code == 2
    assert message in result.stderr
    first, *_ = result.stderr.splitlines()
    assert first.startswith("graphmoe profile: error: ")
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()  # a refused command leaves no empty folder


@pytest.mark.parametrize("arguments", ["--phase train", "--seq many", "--dtype int8", "--sequence 4", "extra"])
def test_what_typer_refuses_has_status_2_and_names_the_option(arguments):
    result = graphmoe("profile", "--preset", "tiny", *arguments.split())
    assert result.exit_code == 2
    assert arguments.split()[0] in result.stderr


@pytest.mark.parametrize("arguments", ["--seq", "--seq --preset tiny", "--preset tiny --seq=", "--seq --rounds 2"])
def test_a_list_option_without_a_value_is_refused(arguments):
    """It used to be dropped, and the default lengths were measured instead."""
    result = graphmoe("profile", *arguments.split())
    assert result.exit_code == 2
    assert "Invalid value for '--seq': it needs at least one value" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("arguments", [("convert", "a", ""), ("convert", "", "b"), ("profile", "--out", "")])
def test_an_empty_path_is_refused(arguments):
    """As an unset variable of the shell gives it: it would be the current folder."""
    result = graphmoe(*arguments)
    assert result.exit_code == 2
    assert "it is empty; name a folder" in result.stderr.replace("\n", " ")


def test_cuda_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = graphmoe("profile", "--preset", "tiny", "--device", "cuda", "--out", tmp_path)
    assert result.exit_code == 2
    assert "PyTorch sees no CUDA device here" in result.stderr


def test_a_model_larger_than_the_machine(monkeypatch, tmp_path):
    """Refused before its weights are drawn: they would be the end of the process, without a word."""
    monkeypatch.setattr(out_of_memory.os, "sysconf", lambda name: 4096)  # pages, and bytes a page: 16 MiB
    result = graphmoe("profile", "--preset", "tiny", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 2
    assert "the model takes 0.0 GiB in float32, cpu has 0.0 GiB; ask for fewer layers" in result.stderr


@pytest.fixture
def no_matplotlib(monkeypatch):
    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(pictures.importlib.util, "find_spec", hidden)


def test_a_plot_that_is_asked_for_without_matplotlib_is_refused_before_measuring(no_matplotlib, tmp_path):
    result = graphmoe("profile", "--preset", "tiny", "--plot", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "pip install 'graphmoe[bench]'" in result.stderr
    assert "--no-plot" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_a_profile_is_written_and_says_that_it_has_no_plot(no_matplotlib, tmp_path):
    """The first command of the documentation ended in an error after `pip install '.[train]'`."""
    size = ("--preset", "tiny", "--layers", 1, "--seq", 4, "--rounds", 0, "--phase", "prefill", "--repetitions", 1)
    result = graphmoe("profile", *size, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "No profile.png: matplotlib is not installed; it comes with pip install 'graphmoe[bench]'." in result.stdout
    assert (tmp_path / "profile.md").exists()
    assert not (tmp_path / "profile.png").exists()
    assert "profile.png" not in graphmoe("profile", *size, "--no-plot", "--out", tmp_path).stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--preset", "tiny", "--device", "cuda"), "PyTorch sees no CUDA device here"),
        (("--model", "./nowhere"), "there is no folder ./nowhere"),
    ],
)
def test_a_missing_matplotlib_hides_no_other_error(arguments, said, no_matplotlib, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = graphmoe("profile", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    """One line for a TypeError in our own code would hide where it is."""

    def fault(*_):
        raise TypeError("a fault")

    monkeypatch.setattr(runs, "run", fault)
    result = graphmoe("profile", "--preset", "tiny", "--out", tmp_path)
    assert isinstance(result.exception, TypeError)


@pytest.mark.parametrize(
    "arguments", ["--seq 4 8 16", "--seq 4 --seq 8 16", "--seq=4 8 --seq=16", "--batch 1 --seq 4 8 16"]
)
def test_lists_are_taken_as_argparse_takes_them(arguments, monkeypatch, tmp_path):
    seen: list[ProfileOptions] = []
    monkeypatch.setattr(runs, "run", lambda options, console: seen.append(options))
    result = graphmoe("profile", "--preset", "tiny", *arguments.split(), "--phase", "decode", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (seen[0].seq, seen[0].phase) == ((4, 8, 16), ("decode",))


def test_help_explains_every_option():
    result = graphmoe("profile", "--help")
    assert result.exit_code == 0
    options = [f"--{name}" for name in ProfileOptions.__dataclass_fields__]
    assert [option for option in options if option not in result.stdout] == []
    assert "profile" in graphmoe("--help").stdout


def test_the_defaults_of_the_command_are_those_of_its_options(monkeypatch):
    """Typer takes lists where the options have tuples: a default of the one must be that of the other."""
    seen: list[ProfileOptions] = []
    monkeypatch.setattr(runs, "run", lambda options, console: seen.append(options))
    graphmoe("profile", "--preset", "tiny")
    assert seen == [ProfileOptions(preset="tiny")]
    assert seen[0].variants == [None, FreshAdapter("mixlora", 1), FreshAdapter("mixlora", 3)]
    assert ProfileOptions(preset="tiny", adapter="a").variants == ["a"]


@pytest.mark.parametrize(
    "options, variants",
    [
        ({"method": ("mola",), "rounds": (2,)}, [FreshAdapter("mola", 2)]),
        ({"method": ("lora", "mola"), "rounds": (0, 2)}, [None, FreshAdapter("lora", 1), FreshAdapter("mola", 2)]),
        ({"method": ("lora",)}, [None, FreshAdapter("lora", 1)]),
        ({"method": ("mola", "mola"), "adapter": "a", "rounds": (1, 1)}, [FreshAdapter("mola", 1), "a"]),
        ({"rounds": (0,), "adapter": "a"}, [None, "a"]),
    ],
)
def test_each_method_is_profiled_with_each_number_of_rounds(options, variants):
    """LoRA, which has no rounds, once; and no adapter once, whatever the methods."""
    assert ProfileOptions(preset="tiny", **options).variants == variants


def test_methods_reach_the_table(tmp_path):
    size = ("--preset", "tiny", "--layers", 1, "--seq", 4, "--phase", "decode", "--repetitions", 1, "--no-plot")
    result = graphmoe("profile", *size, "--method", "lora", "mola", "--rounds", 1, 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    profiles = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert [entry["adapter"] for entry in profiles] == ["LoRA", "MoLA, T = 1", "GraphMoE(MoLA), T = 2"]

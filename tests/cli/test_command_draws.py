"""Drawn command lines: one line that names what is wrong and status 2, or what was asked for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from graphmoe_cli.app import app
from graphmoe_cli.runs import evaluate, profile
from graphmoe_model.evaluation.document import evaluation_document
from graphmoe_model.evaluation.records import TaskResult
from graphmoe_model.memory import per_gpu
from graphmoe_model.memory.activations import Activations
from graphmoe_model.profiling.result import CATEGORIES
from tests.cli.command_draws import FLAGS, VALUES, lines
from tests.drawing import make_draws
from tests.model import training_runs
from tests.model.peer_format import peer_settings, write_peer
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model

WEIGHTS = "adapter_model.safetensors"
COMMANDS = [
    *("params", "convert", "profile", "memory", "data", "train", "eval", "compare", "export"),
    *("analyze balance", "analyze trace", "analyze sensitivity", "analyze parameters", "analyze activated"),
    *("analyze latency", "analyze composition"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Folders of every kind that a command may be pointed at."""
    root = tmp_path_factory.mktemp("places")
    found = {
        name: root / name.lower() for name in ("ADAPTER", "PEER", "LORA", "BASE", "BROKEN", "NAN", "EMPTY", "FILE")
    }
    tiny_peft_model().save_pretrained(found["ADAPTER"])
    write_peer(found["PEER"], peer_settings("MIXLORA"))
    get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(found["LORA"])
    tiny_model().save_pretrained(found["BASE"])
    for name in ("BROKEN", "NAN"):
        shutil.copytree(found["ADAPTER"], found[name])
    (found["BROKEN"] / WEIGHTS).write_bytes((found["ADAPTER"] / WEIGHTS).read_bytes()[:5000])
    tensors = load_file(found["NAN"] / WEIGHTS)
    save_file({name: t * float("nan") for name, t in tensors.items()}, found["NAN"] / WEIGHTS)
    found["EMPTY"].mkdir()
    training_runs.make_base(root / "model")
    routed = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "model"), tiny_config())
    routed.save_pretrained(root / "routed")
    training_runs.write_questions(root / "asked.jsonl", 12)
    (root / "recipe.yaml").write_text(yaml.safe_dump(training_runs.SMALL), encoding="utf-8")
    swept = {**training_runs.SMALL, "model": str(root / "model"), "data": [str(root / "asked.jsonl")]}
    (root / "swept.yaml").write_text(yaml.safe_dump(swept), encoding="utf-8")
    shutil.copytree(found["ADAPTER"], root / "other")
    settings = json.loads((root / "other" / "adapter_config.json").read_text(encoding="utf-8"))
    (root / "other" / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "org/base"}))
    for name, tasks in {"one": ("a", "b"), "two": ("a",), "three": ("c",)}.items():
        document = evaluation_document([scored(task) for task in tasks], {}, {"model": "m"}, None)
        (root / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    seconds = dict.fromkeys(CATEGORIES, 0.1)
    entry = {"model": "m", "adapter": "none", "phase": "decode", "tokens": 4, "seconds": seconds, "wall_seconds": 0.7}
    (root / "profile.json").write_text(json.dumps({"conditions": {"device": "cpu"}, "profiles": [entry]}))
    found["FILE"].touch()
    return root


@pytest.fixture(autouse=True)
def _no_profiles(monkeypatch, tmp_path):
    """Only the command line is drawn here; what follows takes seconds. What is written goes to a folder of its own."""
    monkeypatch.setattr(profile, "run", lambda options, console: [])
    monkeypatch.setattr(evaluate, "load_base_model", lambda source: tiny_model())
    monkeypatch.setattr(
        evaluate, "evaluate_questions", lambda model, tokenizer, tasks, **_: [scored(t.name) for t in tasks]
    )
    monkeypatch.setattr(evaluate, "evaluate_standard", lambda *_, **__: {"arc_easy": {"questions": 3, "acc": 0.5}})
    if importlib.util.find_spec("trl"):
        monkeypatch.setattr("graphmoe_cli.runs.train.train", not_trained)
        monkeypatch.setattr("graphmoe_model.training.run.make_arguments", enough)
        monkeypatch.setattr("graphmoe_cli.runs.analyze_sweep.run_sweep", not_swept)
    monkeypatch.setattr(per_gpu, "step_activations", lambda *_: Activations(1, 2, 3))
    monkeypatch.setattr(importlib.import_module("graphmoe_model.fetching.fetch"), "download", no_download)
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


class _Enough(Exception):
    """All that is checked before a model is loaded was found right."""


def enough(*_):
    raise _Enough


def not_trained(recipe, *questions, **options):
    """As `train`, up to the loading of the model."""
    from graphmoe_model.training import TrainingResult, train

    try:
        return train(recipe, *questions, **options)
    except _Enough:
        return TrainingResult(1, 0, 1.0, 0.5, None, None, None, 12, 0, 1.0, None, 10, 40, {"dtype": "float32"})


def not_swept(sweep, folder, say):
    """As `run_sweep`, up to the first run; no run is done."""
    from graphmoe_model.analysis.sweep import check_folder

    check_folder(sweep, folder)
    conditions = {"dtype": "float32", "device": "cpu", "versions": {"torch": "2"}}
    document = {"diverged": "not run", "conditions": conditions}
    return {(setting.name, seed): document for setting, seed in sweep.runs()}


def scored(task: str) -> TaskResult:
    return TaskResult(task, 10, 0.5, 0.1, 0.4, 0.5, 0.5, 0, 1.0, "5e1f", [])


def no_download(source, folder):
    """As pip where it reaches no index."""
    raise ValueError(f"pip cannot download {source.package}")


def check(name: str, words: list[str], places: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = shutil.copytree(places, Path(temporary) / "places")
        paths = {path.name.upper(): str(path) for path in root.iterdir()} | {"TMP": temporary}
        arguments = ["/".join(paths.get(part, part) for part in word.split("/")) for word in words]
        before = files(temporary)
        result = CliRunner().invoke(app, [*name.split(), *arguments])
        if result.exit_code == 2:
            assert isinstance(result.exception, SystemExit)
            command = "data fetch" if name == "data" else name
            lines = [line for line in result.stderr.splitlines() if "asking the hub" not in line]  # before it is asked
            own = "\n".join(lines).startswith(f"graphmoe {command}: error: ")
            assert own or "─ Error ─" in result.stderr, result.stderr  # what Typer itself refuses
            assert result.stdout == ""
            assert files(temporary) == before, "a refused command must leave what was there"
            return
        assert result.exit_code == 0, repr(result.exception)
        assert result.stdout.strip() or name == "profile"
        if name == "params" and "--json" in words and "--help" not in words:
            for adapter in json.loads(result.stdout)["adapters"]:
                assert adapter["total"] == sum(adapter["components"].values()) > 0
        if name == "convert" and "Written as graphmoe" in result.stdout:
            target = Path(next(word for word in arguments[1:] if word.startswith(temporary)))
            PeftModel.from_pretrained(tiny_model(), target)


def files(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_drawn(name):
    command = get_command(app)
    for word in ["data", "fetch"] if name == "data" else name.split():
        command = command.commands[word]
    options = {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}
    options = {text for text in options if text.startswith("--")}
    assert options - set(VALUES[name]) - set(FLAGS[name]) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_drawn_command_lines(name, places):
    make_draws(lambda words: check(name, words, places), lines(name), examples=15, seed=41)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_many_drawn_command_lines(name, places):
    make_draws(lambda words: check(name, words, places), lines(name), examples=120, seed=1)

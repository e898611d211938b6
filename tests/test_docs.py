"""README, CHANGELOG, CONTRIBUTING and docs: links lead somewhere, what is to be typed works, lines fit a screen."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
import typer

from graphmoe_model.demo.base import make_base, make_tokenizer

ROOT = Path(__file__).parents[1]
# What people write. benchmarks/PREDICTIONS.md and benchmarks/results are written by commands, whose tables are wide.
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks of one language: ``python`` runs in the tests, ``py`` cannot here."""
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made from their words as Git hosts make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def typed(page: Path, command: str) -> set[str]:
    """What a page says to type that begins with these words: lines of blocks and spans of code, without remarks."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    lines = [line.split("#")[0].strip() for code in blocks(page, "") for line in code.splitlines()]
    pieces = [piece for line in lines for piece in re.split(r"\s{3,}", line)]
    return {text for text in [*spans, *pieces] if text.startswith(command)}


def test_there_are_pages():
    """A glob that finds nothing would make every test below pass."""
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= {page.name for page in PAGES}
    assert len(PAGES) > 12


@ALL_PAGES
def test_lines_fit_a_screen(page):
    """120 characters, as in the code; ruff does not read Markdown. Tables too: a wider one is better read as a list."""
    lines = page.read_text().splitlines()
    long = [f"{page.name}:{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > 120]
    assert not long


@ALL_PAGES
def test_rates_say_per(page):
    """ "240 M multiply-adds per token": "a token" makes a reader stop and read again."""
    things = (
        "multiply-adds|bytes|elements|tokens|experts|routers?|kernels?|vectors?|rows?|launches|[mun]s|once|twice|GB"
    )
    units = "token|layer|second|slot|round|step|call|expert|GPU|program|process|turn|linear|batch"
    assert not re.findall(rf"\b(?:{things}) an? (?:{units})\b", prose(page))


@ALL_PAGES
def test_links_lead_somewhere(page):
    """Files and headings of this repository; no other address is asked."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    lost = []
    for target in (target for target in targets if "://" not in target):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert not lost


@ALL_PAGES
def test_files_that_are_named_are_there(page):
    """A file that moves takes its name in the docs with it."""
    folders = r"graphmoe_\w+|benchmarks|experiments|tests|docs"
    code = [*re.findall(r"`([^`]+)`", prose(page)), *blocks(page, ""), *blocks(page, "python"), *blocks(page, "py")]
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", "\n".join(code))
    assert not [name for name in named if not (ROOT / name).exists()]


@ALL_PAGES
def test_modules_that_are_named_are_there(page):
    """``python -m graphmoe_kernels.cost`` and the like."""
    named = re.findall(r"python -m ((?:graphmoe_\w+|benchmarks|experiments)[\w.]*)", page.read_text())
    paths = [ROOT / name.replace(".", "/") for name in named]
    assert not [path for path in paths if not (path / "__main__.py").exists() and not path.with_suffix(".py").exists()]


@ALL_PAGES
def test_targets_of_make_are_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {text.split()[1].rstrip(",") for text in typed(page, "make ") if len(text.split()) > 1}
    assert named <= targets


@ALL_PAGES
def test_options_of_graphmoe_are_there(page):
    """Each command with each option that it is written with."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["graphmoe"]
    group = typer.main.get_command(importlib.import_module(script.partition(":")[0]).app)
    commands, own = group.commands, {name for option in group.params for name in option.opts}
    for text in typed(page, "graphmoe "):
        words = [word for word in text.split() if word != "--help"]
        if set(words[1:]) <= own:
            continue
        assert words[1] in commands, text
        command = commands[words[1]]
        if hasattr(command, "commands") and len(words) > 2:  # graphmoe data fetch
            assert words[2] in command.commands, text
            command = command.commands[words[2]]
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options, text


@ALL_PAGES
def test_python_is_python(page):
    for code in [*blocks(page, "python"), *blocks(page, "py")]:
        compile(code, page.name, "exec")


@ALL_PAGES
def test_names_that_are_imported_are_there(page):
    """A name that is renamed is renamed in the examples."""
    for code in [*blocks(page, "python"), *blocks(page, "py")]:
        lines = re.findall(r"^from graphmoe_\w+[\w.]* import [\w, ]+", code, re.MULTILINE)
        exec("\n".join(lines), {})


def adapter_parameters(model):
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]


def test_the_readme_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """One block after the other, in an empty folder, and then what docs/checkpoints.md says to train on. Of the text
    only the base model's name is another, as the one that stands there is downloaded."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(seed=0)
    make_base(tokenizer).save_pretrained("base")
    tokenizer.save_pretrained("base")
    first, *others = blocks(ROOT / "README.md", "python")
    assert len(first.splitlines()) <= 22, "the README promises a whole fine-tuning in some twenty lines"
    assert first.count('base = "HuggingFaceTB/SmolLM2-135M"') == 1
    names: dict[str, object] = {"__name__": "__main__"}
    for code in (first.replace("HuggingFaceTB/SmolLM2-135M", "base"), *others):
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "my-adapter/adapter_model.safetensors").exists()
    logs = names["trainer"].state.log_history
    assert len(logs) > 4
    assert all("aux_loss" in log for log in logs if "loss" in log)
    assert names["routing"].load()["model.layers.0.mlp"].sum(dim=1).allclose(names["torch"].ones(3).double())
    printed = capsys.readouterr().out
    assert "trainable params" in printed
    assert "The capital of France is" in printed
    (train_on,) = blocks(ROOT / "docs/checkpoints.md", "python")
    before = {name: p.detach().clone() for name, p in adapter_parameters(names["model"])}
    exec(compile(train_on, "checkpoints.md", "exec"), names)
    after = dict(adapter_parameters(names["model"]))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), "it trained nothing"


def test_the_layers_page_runs_as_it_is_written(tmp_path, monkeypatch):
    """It asserts for itself that the layer, the recurrence and a round by hand agree."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(ROOT / "docs/layer.md", "python"):
        exec(compile(code, "layer.md", "exec"), names)
    assert all(p.grad is not None for p in names["trained"])

"""The demo's report: it says the figures it was given, and touches no file that is not its own."""

import math
import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from graphmoe_model.demo import __main__ as demo_main
from graphmoe_model.demo import report, stages
from graphmoe_model.demo.comparison import Comparison, MethodResult
from graphmoe_model.demo.latency import RoundLatency, measure_latency
from graphmoe_model.demo.report import print_results, write_report
from graphmoe_model.demo.results import DemoResults
from graphmoe_model.demo.scale import Scale

FILES = {"report.md", "loss.png", "accuracy.png", "expert_load.png", "latency.png", "comparison.png"}


def made_up_results() -> DemoResults:
    loads = {f"model.layers.{i}.mlp": torch.rand(3, 8).softmax(-1) for i in range(3)}
    loads["model.layers.0.mlp"][0] = torch.tensor([0.401, 0.099, *(0.5 / 6 for _ in range(6))])
    skills = ["arithmetic", "ordering", "category", "alphabet", "world_facts"]
    return DemoResults(
        seed=7,
        conditions={"torch": "9.9.9", "threads": "2", "odd|name": "[red]"},
        base_parameters=1_000_000,
        parameters={"attention LoRA": 20_000, "experts": 150_000, "router": 2_500, "GRU": 27_500},
        accuracy_before=dict(zip(skills, (0.25, 0.21, 0.3, 0.26, 0.23), strict=True)),
        accuracy_after=dict(zip(skills, (0.987, 0.95, 1.0, 0.91, 0.763), strict=True)),
        questions=1234,
        losses=[(10 * i, 1.4 * math.exp(-i / 12) + 0.05 + 0.1 * torch.rand(()).item()) for i in range(1, 41)],
        expert_load=loads,
        latency=[RoundLatency(1, 10.0, 10.0), RoundLatency(2, 21.0, 14.0), RoundLatency(3, 32.0, 16.0)],
        latency_conditions="hidden 768, fp32",
        examples=[("Question: 2 + 2?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer: ", "A", "\n", "A")],
        reload_difference=0.0,
        seconds={"fine-tuning": 61.25},
        comparison=made_up_comparison(),
        folder=Path("my report"),
    )


def made_up_comparison() -> Comparison:
    methods = [
        MethodResult("LoRA", 1, 23, 58_880, 0.6875, 12.25, 250.4, None),
        MethodResult("MixLoRA", 4, 8, 57_856, 0.5, 20.0, 300.0, (0.125, 0.4)),
        MethodResult("GraphMoE(MixLoRA)", 4, 8, 67_616, 0.475, 35.5, 401.0, (0.0, 0.75)),
    ]
    return Comparison(1200, 16, 3e-3, 400, 100, 0.25, 99.6, methods, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a report, over an older one and beside a file of someone else's."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "notes.txt").write_text("mine")
    (folder / "report.md").write_text("an older report")
    assert write_report(made_up_results(), folder) == folder / "report.md"
    return folder


def test_report_is_complete_and_other_files_survive(folder):
    """The folder holds the six files, whole, beside what was there before, and nothing temporary."""
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"
    for name in FILES - {"report.md"}:
        png = (folder / name).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png.endswith(b"IEND\xaeB`\x82")


def test_tables_of_the_report_hold_the_figures(folder):
    """Shares, means, differences, ratios and costs of a round are those of the results, worked out by hand."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    for row in (
        "| experts | 150,000 | 15.00% | 12.50% |",
        "| all trainable | 200,000 | 20.00% | 16.67% |",
        "| arithmetic | 25.0% | 98.7% | +73.7 |",
        "| mean of the skills | 25.0% | 92.2% | +67.2 |",
        "| model.layers.0.mlp | 1 | 40.1% | 9.9% |",
        "| 1 | 10.00 | 10.00 | 1.00× | – | – |",
        "| 3 | 32.00 | 16.00 | 2.00× | 11.00 | 3.00 |",
        "| seed | 7 |",
        "| odd\\|name | [red] |",
        "| time, fine-tuning | 61.2 s |",
        "| base model | – | – | 25.0% | – | 100 | – |",
        "| LoRA | 1×23 | 58,880 | 68.8% | 12.2 | 250 | – |",
        "| GraphMoE(MixLoRA) | 4×8 | 67,616 | 47.5% | 35.5 | 401 | 0–75 |",
        "took 1,200 steps of 16 questions",
        "Guessing gives 25%: 3 of 3 methods ended more than 4.9 points above it",
        "in 0 of 1 pairs and fewer in 1 (points: MixLoRA -2.5). With 400 questions",
        "within ±4.9 points",
    ):
        assert row in text
    assert "1,234 held-out" in text
    assert "synthetic" in text
    assert "to the bit" in text
    assert "Right: **A** · before: **'\\n'** (wrong) · after: **A** (right)" in text
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == FILES - {"report.md"}


def test_console_shows_the_tables():
    """The console's tables are the report's, and square brackets in a name are no markup."""
    results = made_up_results()
    results.parameters["[bold]odd"] = 1
    console = Console(file=StringIO(), width=160)
    print_results(results, console)
    shown = console.file.getvalue()
    for figure in (
        "150,000",
        "15.00%",
        "98.7%",
        "40.1%",
        "2.00×",
        "3.00",
        "[bold]odd",
        "to the bit",
        "47.5%",
        "synthetic",
    ):
        assert figure in shown


def test_report_without_a_comparison_says_nothing_of_one(tmp_path):
    """Left out on the command line, it leaves no empty section and no plot that is not there."""
    results = replace(made_up_results(), comparison=None)
    text = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert "comparison" not in text
    assert "Every method" not in text
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"comparison.png"}
    console = Console(file=StringIO(), width=160)
    print_results(results, console)
    assert "Every method" not in console.file.getvalue()


def test_report_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    """Without matplotlib nothing is written, and the error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "graphmoe_model.demo.plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'graphmoe\[demo\]'"):
        write_report(made_up_results(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The demo's command without its training: (options, results) -> (exit status, the scale it would have run at)."""
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(demo_main.transformers.logging, name, lambda: None)
    monkeypatch.setattr(report, "write_report", lambda results, folder: folder / "report.md")

    def command(results: DemoResults, *options: str) -> tuple[int, Scale]:
        scales = []
        monkeypatch.setattr(stages, "run", lambda scale, *others: scales.append(scale) or results)
        return demo_main.main(["--out", str(tmp_path), *options]), scales[0]

    return command


def test_comparison_can_be_left_out(demo):
    """--no-comparison leaves it out, and it runs otherwise."""
    results = replace(made_up_results(), comparison=None)
    for mode in ((), ("--quick",)):
        assert demo(results, *mode)[1].comparison_steps > 0
        assert demo(results, *mode, "--no-comparison") == (0, demo(results, *mode)[1]._replace(comparison_steps=0))


def unlearnt() -> list[MethodResult]:
    *others, last = made_up_comparison().methods
    return [*others, last._replace(accuracy=0.1)]


@pytest.mark.parametrize(
    "change, full, quick, message",
    [
        ({}, 0, 0, ""),
        ({"diverged": {"MoLA": "the loss is nan"}}, 1, 1, "MoLA: the loss is nan"),
        (
            {"methods": unlearnt()},
            1,
            0,
            "GraphMoE(MixLoRA): accuracy 10.0% after training is below the base model's 25.0%.",
        ),
    ],
)
def test_exit_status_tells_that_a_method_did_not_train(demo, capsys, change, full, quick, message):
    """Whoever runs the demo as a check hears of a method that diverged, or that got worse where it had the steps."""
    results = replace(made_up_results(), comparison=made_up_comparison()._replace(**change))
    assert demo(results)[0] == full
    shown = " ".join(capsys.readouterr().out.split())
    assert message in shown
    assert demo(results, "--quick")[0] == quick


def test_report_into_a_file_is_refused(tmp_path):
    """A folder that is a file is named in the error."""
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(NotADirectoryError, match="taken"):
        write_report(made_up_results(), taken)


def test_latency_of_a_tiny_layer():
    """One entry a number of rounds, all times positive; the caller's random state and threads are left alone."""
    state = torch.get_rng_state()
    latency = measure_latency(hidden=32, intermediate=48, tokens=9, repeats=2, max_rounds=3)
    assert [entry.rounds for entry in latency] == [1, 2, 3]
    assert all(entry.literal_ms > 0 and entry.folded_ms > 0 for entry in latency)
    assert torch.equal(torch.get_rng_state(), state)


def test_latency_refuses_sizes_below_one():
    """A size of 0 is named instead of an empty or meaningless measurement."""
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_latency(repeats=0)


def test_latency_refuses_to_compare_different_outputs(monkeypatch):
    """Times are not reported for two forms that disagree."""
    monkeypatch.setattr("graphmoe_model.demo.latency.AGREEMENT", 0.0)
    with pytest.raises(RuntimeError, match="cannot be compared"):
        measure_latency(hidden=32, intermediate=48, tokens=9, repeats=1, max_rounds=2)

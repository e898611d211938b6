"""The report's command: its tables, its page, two results side by side, and one line for what is wrong."""

from __future__ import annotations

import copy

import pytest

from benchmarks import report
from benchmarks.document import Document
from benchmarks.page import page, summary
from benchmarks.report import main
from benchmarks.targets import TARGETS
from tests.benchmarks.made_up import document, gru_kernel, in_turns, row, saved, source

LAYER = in_turns(
    row("triton", 2e-3, case="layer, llama-3-8b, inference, 8192 tokens, T=3, n=8, bf16", label="triton"),
    row("dense", 1e-3, rounds=1, label="dense"),
)
RATIO = "2.000 [1.980, 2.020]"


def plain():
    return copy.deepcopy(document(LAYER))


def markdown(content):
    return page([source(content)])


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """The page alone: matplotlib has tests of its own."""
    from benchmarks import plots

    monkeypatch.setattr(plots, "PLOTS", {})


def cells(text, start):
    """The cells of the only line of a table that starts so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].removesuffix(" |").split(" | ")[1:]]


def test_the_command_prints_the_targets_and_writes_the_page(tmp_path, capsys):
    """Both show the same figures, and the last line says where the page is."""
    path = saved(tmp_path, plain())
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert RATIO in printed
    assert "missed  NVIDIA H200, torch 2.13.0, triton 3.7.1, commit 0123456789, 2026-11-30" in printed
    assert printed.splitlines()[-1] == f"written to {tmp_path / 'out' / 'report.md'}"
    assert RATIO in (tmp_path / "out" / "report.md").read_text()


def test_without_files_all_of_the_results_are_read_and_without_any_nothing_is_measured(tmp_path, capsys, monkeypatch):
    """A fresh clone has a table, not an error and not an empty page; old files are named, folders in it looked into."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    saved(tmp_path, {"version": 1}, "old.json")
    assert main(["--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("not measured") == len(TARGETS)
    assert "passed over" in printed.err
    assert "old.json has version 1" in printed.err
    assert "there is no result in" in printed.err
    (tmp_path / "parts").mkdir()
    saved(tmp_path / "parts", plain())
    assert main([]) == 0
    assert RATIO in capsys.readouterr().out
    assert (tmp_path / "report" / "report.md").exists()


def test_a_row_stands_beside_what_it_is_judged_by_on_the_page_and_on_the_terminal():
    """Turns, quartiles, ratios, bytes, operations, limit."""
    content = plain()
    content["rows"][0] |= {
        "work": {"bytes": 4e8, "operations": 3e9},
        "limit": {"memory": 1e-3, "matrix": 5e-4},
        "share": 0.5,
        "peak bytes": 7e6,
    }
    expected = ["2 ms", "1.98 ms to 2.02 ms", "1.96 ms", "9", RATIO, "400.0", "3.000", "50% (memory)", "7.0"]
    assert cells(markdown(content), "triton") == expected
    assert cells(markdown(content), "dense")[4:] == ["-"] * 5
    line = next(line for line in summary(content).splitlines() if line.startswith("  triton"))
    assert [cell for cell in expected if cell not in line] == []
    assert "tokens per second" not in markdown(content)
    content["rows"][0]["tokens a second"] = 1234.5
    assert cells(markdown(content), "triton")[-1] == "1,234.5"


def test_rounds_stand_beside_the_first_of_their_own_and_the_yardstick():
    """What a further round costs, and what is over the MLP alone."""
    rows = [row("triton", t * 1e-3, rounds=t) for t in (1, 2)] + [row("dense", 5e-4, label="dense")]
    text = markdown(document(in_turns(*rows)))
    assert "| over dense | over its own first row |" in text
    assert cells(text, "triton, T=2")[4:6] == ["4.000 [3.960, 4.040]", RATIO]
    assert cells(text, "triton, T=1")[5] == "-"


def test_what_failed_or_was_skipped_is_shown_with_its_reason():
    """Neither a wrong provider nor a lack of time may look like a choice of the reader's; nor out of memory at T=8."""
    case = LAYER[0]["case"]
    check = {"what": "layer", "case": case, "tokens": 8192, "dtype": "bf16", "passed": True, "fault": None}
    check |= {"largest error": 0.5, "plain computation's own": 0.01}
    checks = [
        {**check, "provider": "triton"},
        {**check, "provider": "liger", "passed": False, "fault": "y: error 5.0e-01 | too\nlarge"},
        {**check, "provider": "triton", "label": "triton, T=8", "passed": False, "fault": "OutOfMemoryError"},
        {**check, "provider": "peft_lora"},
    ]
    steps = {"a": {"state": "done"}, "scaling": {"state": "skipped", "note": "no time left"}}
    content = {**plain(), "checks": checks, "steps": steps}
    text = markdown(content)
    assert "2 of 4 checks passed" in text
    assert cells(text, "scaling") == ["skipped", "no time left"]
    assert cells(text, "liger")[-1] == "failed: y: error 5.0e-01 \\| too large"
    assert cells(text, "triton, T=8")[::5] == [case, "failed: OutOfMemoryError"]
    for words in ("2 of 4 checks passed", "no time left", "too\nlarge", "OutOfMemoryError"):
        assert words in summary(content)


def test_kernels_and_profiles_are_on_the_page():
    """A GPU run's single kernels and a model's parts, which no row has."""
    kernel = gru_kernel("later", 4e-5, work={"bytes": 1e6, "operations": 1e9}, limits={"memory": 1e-5, "L2": 2e-5})
    profile = {"model": "llama-3-8b", "adapter": "LoRA", "phase": "decode", "tokens": 2048}
    profile["seconds"] = {"attention": 1e-3, "mlp": 3e-3}
    text = markdown(document(kernels=[kernel], profiles=[profile]))
    assert cells(text, "gru: gru_forward, later round, n=8, 8192 tokens")[3:6] == ["1.0", "1.000", "50% (L2)"]
    assert "### Where the time goes: llama-3-8b, decode\n\n| part | LoRA, 2,048 tokens |" in text
    assert cells(text, "whole") == ["4 ms"]
    assert cells(text, "attention") == ["1 ms, 25.0%"]


def test_a_run_that_ended_at_once_has_a_page(tmp_path):
    """The GPU report's last step is this page, whatever came of the others."""
    text = markdown(Document(tmp_path / "r.json").content)
    assert "before it could say where it ran" in text
    assert text.count("not measured") == len(TARGETS)


def test_a_results_tables_are_written_between_the_marks_of_a_page(tmp_path, capsys):
    """Docs show what a result has; what stands around the marks stays, and so do tables of other groups."""
    rows = in_turns(*(row(name, 2e-4, group="host", label=name, case="c") for name in ("torch", "dense")))
    profile = {"model": "host", "adapter": "torch", "phase": "host", "tokens": 1, "seconds": {"routing": 5e-5}}
    path = saved(tmp_path, document([*rows, *LAYER], profiles=[profile]))
    text = (
        "before\n<!-- results: host -->\nstale\n<!-- /results -->\n<!-- results: rounds -->\nkept\n<!-- /results -->\n"
    )
    (tmp_path / "page.md").write_text(text)
    assert main([str(path), "--write", str(tmp_path / "page.md")]) == 0
    written = (tmp_path / "page.md").read_text()
    assert written.startswith("before\n<!-- results: host -->\n\nNVIDIA H200, ")
    assert written.endswith("<!-- /results -->\n<!-- results: rounds -->\nkept\n<!-- /results -->\n")
    assert "stale" not in written
    assert cells(written, "torch") == ["200 us", "196 us", "1.000 [0.990, 1.010]"]
    assert cells(written, "routing") == ["50 us, 100.0%"]
    assert "triton |" not in written
    (tmp_path / "page.md").write_text("no marks")
    assert main([str(path), "--write", str(tmp_path / "page.md")]) == 2
    assert "has none of the marks <!-- results: host -->, <!-- results: layer -->" in capsys.readouterr().err


def same_names(folder):
    for name in "ab":
        (folder / name).mkdir()
    return [str(saved(folder / name, plain())) for name in "ab"]


WRONG = {
    "no such file": lambda folder: [str(folder / "none.json")],  # test_results.py has what else is no result
    "two of the files are called made-up.json": same_names,
    "cannot be written to: ": lambda folder: [str(saved(folder, plain())), "--out", str(saved(folder, {}, "taken"))],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, message):
    """No traceback, nothing that looks like a result, and a code that a script sees."""
    arguments = WRONG[message](tmp_path)
    assert main(arguments + ([] if "--out" in arguments else ["--out", str(tmp_path / "out")])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compare", "a", "b", "c"], "leave out the other files"),
        (["--compare", "a", "b", "--out", "c"], "writes nothing"),
        (["--write", "page.md"], "takes the result files"),
        (["a", "--write", "page.md", "--out", "c"], "and no --out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, arguments, message):
    """An option that is given and does nothing would be believed."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def compared(tmp_path, capsys, second, first=None):
    """Exit code and words of a comparison with the layer's result."""
    paths = [saved(tmp_path, first or plain(), "a.json"), saved(tmp_path, second, "b.json")]
    code = main(["--compare", *map(str, paths)])
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("factor, agree", [(1.0, 1), (1.02, 1), (1.03, 0), (1 / 1.03, 0)])
def test_ratios_agree_if_their_ranges_overlap(tmp_path, capsys, factor, agree):
    """A ratio and its inverse are one finding, not two; whose versions differ and what only one has is said."""
    second = document(in_turns(*(copy.deepcopy(row) for row in LAYER)))
    for each, other, by in ((0, "dense", factor), (1, "triton", 1 / factor)):
        found = second["rows"][each]["ratios"][other]
        found |= {"median": by * found["median"], "range": [by * end for end in found["range"]]}
    second["conditions"] |= {"commit": "f" * 40}
    first = plain()
    first["rows"] += in_turns(row("triton", 1.0, case="c"), row("torch", 2.0), row("literal", 3.0))
    code, printed = compared(tmp_path, capsys, second, first)
    assert code == 0
    assert printed.count("over dense") == 1
    assert f"{2 * factor:.3f}" in printed
    assert "commit 0123456789" in printed
    assert "commit ffffffffff" in printed
    last = f"{agree} of 1 ratios agree within their ranges; 3 of A and 0 of B alone are not compared"
    assert printed.splitlines()[-1] == last


@pytest.mark.parametrize("key, value", [("kind", "cpu"), ("name", "NVIDIA H100"), ("threads", 4)])
def test_results_of_different_devices_are_not_compared(tmp_path, capsys, key, value):
    """Their ratios differ for a reason that is not the code."""
    second = plain()
    second["conditions"]["device"] = {**second["conditions"]["device"], key: value}
    code, error = compared(tmp_path, capsys, second)
    assert code == 2
    assert "different devices" in error
    assert error.count("name NVIDIA H") == 2
    assert f"{key} {value}" in error


def test_what_would_read_like_agreement_is_refused(tmp_path, capsys):
    """Nothing in common, and a result beside itself."""
    second = document(in_turns(row("triton", 1.0, case="another"), row("dense", 2.0)))
    code, error = compared(tmp_path, capsys, second)
    assert (code, "no ratio in common" in error) == (2, True)
    path = str(saved(tmp_path, plain(), "a.json"))
    assert main(["--compare", path, path]) == 2
    assert "is named twice" in capsys.readouterr().err


def test_what_a_reader_has_to_know_of_a_run_is_said():
    """A run of configurations that its commit does not have would pass for one of the commit."""
    content = document([row("triton", 1.0)])
    assert "What:" not in page([source(content)])
    content["conditions"]["what"] = "configurations of a sweep"
    assert "- What: configurations of a sweep" in page([source(content)])

"""The report's command: its tables, its page, two results side by side, and one line for what is wrong."""

from __future__ import annotations

import copy

import pytest

from benchmarks import report
from benchmarks.document import Document
from benchmarks.page import markdown
from benchmarks.report import main, targets_text
from tests.benchmarks.made_up import document, gru_kernel, in_turns, row, saved

# Of ten turns; the interval of a ratio of 2 is 1.98 to 2.02.
LAYER = in_turns(row("triton", 2e-3), row("dense", 1e-3, rounds=1, label="dense"))


def plain():
    return copy.deepcopy(document(LAYER))


@pytest.fixture
def no_plots(monkeypatch):
    """The page alone: matplotlib has tests of its own."""
    from benchmarks import plots

    monkeypatch.setattr(plots, "PLOTS", {})


def cells(text, start):
    """The cells of the only line of a table that starts so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].removesuffix(" |").split(" | ")[1:]]


def test_the_command_prints_the_targets_and_writes_the_page(tmp_path, capsys, no_plots):
    """Both show the same figures, and the last line says where the page is."""
    path = saved(tmp_path, plain())
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2.000 [1.980, 2.020]" in printed
    assert "missed  NVIDIA H200, 0123456789, 2026-11-30" in printed
    assert printed.splitlines()[-1] == f"written to {tmp_path / 'out' / 'report.md'}"
    assert "2.000 [1.980, 2.020]" in (tmp_path / "out" / "report.md").read_text()


def test_without_any_result_the_targets_are_all_not_measured(tmp_path, capsys, monkeypatch, no_plots):
    """A fresh clone has a table, not an error and not an empty page; old files are named."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    saved(tmp_path, {"version": 1}, "old.json")
    assert main(["--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("not measured") == len(targets_text([]).splitlines()) - 1
    assert "passed over" in printed.err
    assert "old.json has version 1" in printed.err
    assert "there is no result in" in printed.err


def test_without_files_all_of_the_results_are_read(tmp_path, capsys, monkeypatch, no_plots):
    """The folder of the results is the default, with the folders in it; its report folder is where the page goes."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "parts").mkdir()
    saved(tmp_path / "parts", plain())
    assert main([]) == 0
    assert "2.000 [1.980, 2.020]" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.md").exists()


def test_the_page_shows_a_row_beside_its_baselines_and_its_limit():
    """A figure stands beside what it is judged by: turns, quartiles, ratios, bytes, operations, limit."""
    content = plain()
    content["rows"][0] |= {
        "work": {"bytes": 4e8, "operations": 3e9},
        "limit": {"memory": 1e-3, "matrix": 5e-4},
        "share": 0.5,
        "peak bytes": 7e6,
    }
    found = cells(markdown(content), "triton, T=3")
    assert found[:4] == ["2 ms", "1.98 ms to 2.02 ms", "9", "2.000 [1.980, 2.020]"]
    assert found[4:8] == ["400.0", "3.000", "50% (memory)", "7.0"]
    assert cells(markdown(content), "dense")[3:7] == ["-"] * 4
    assert "tokens a second" not in markdown(content)
    content["rows"][0]["tokens a second"] = 1234.5
    assert cells(markdown(content), "triton, T=3")[-1] == "1,234.5"


def test_rounds_stand_beside_the_first_of_their_own_and_peers_at_the_same_t():
    """A ratio between different T and different providers would mix two effects."""
    rows = [row(name, t * base, rounds=t) for name, base in (("triton", 1e-3), ("torch", 4e-3)) for t in (1, 2)]
    text = markdown(document(in_turns(*rows)))
    assert "| over torch | over its own first row |" in text
    assert cells(text, "triton, T=2")[3:5] == ["0.250 [0.247, 0.253]", "2.000 [1.980, 2.020]"]
    assert cells(text, "triton, T=1")[4] == "-"


def test_what_failed_or_was_skipped_is_on_the_page_with_its_reason():
    """Neither a wrong provider nor a lack of time may look like a choice of the reader's."""
    check = {"what": "layer", "provider": "liger", "case": LAYER[0]["case"], "tokens": 8192, "dtype": "bf16"}
    check |= {"largest error": 0.5, "plain computation's own": 0.01}
    checks = [
        {**check, "provider": "triton", "passed": True, "fault": None},
        {**check, "passed": False, "fault": "y: error 5.0e-01 | too\nlarge"},
        {**check, "provider": "peft_lora", "passed": True, "fault": None},
    ]
    steps = {"a": {"state": "done"}, "scaling": {"state": "skipped", "note": "no time left"}}
    text = markdown({**plain(), "checks": checks, "steps": steps})
    assert "2 of 3 passed" in text
    assert cells(text, "scaling") == ["skipped", "no time left"]
    not_timed = text[text.index("### Not timed") : text.index("### Steps")]
    assert "| liger | failed: y: error 5.0e-01 \\| too large |" in not_timed
    assert "| peft_lora | passed its check" in not_timed
    assert "triton" not in not_timed


def test_a_round_without_a_time_is_named_though_its_provider_has_others():
    """Out of memory at T=8 alone: the provider's other rows must not hide it."""
    rows = in_turns(row("literal", 1.0, rounds=1), row("triton", 1.0, rounds=1))
    check = {"case": rows[0]["case"], "provider": "literal", "label": "literal, T=8", "tokens": 1, "dtype": "bf16"}
    text = markdown(document(rows, checks=[{**check, "passed": False, "fault": "OutOfMemoryError"}]))
    assert f"| {rows[0]['case']} | literal, T=8 | failed: OutOfMemoryError |" in text


def test_kernels_and_profiles_are_on_the_page():
    """A GPU run's single kernels and a model's parts, which no row has."""
    kernel = gru_kernel("later", 4e-5, work={"bytes": 1e6, "operations": 1e9}, limits={"memory": 1e-5, "L2": 2e-5})
    profile = {"model": "llama-3-8b", "adapter": "LoRA", "phase": "decode", "tokens": 2048}
    profile["seconds"] = {"attention": 1e-3, "mlp": 3e-3}
    text = markdown(document(kernels=[kernel], profiles=[profile]))
    assert cells(text, "gru: gru_forward, later round, n=8, 8192 tokens")[3:6] == ["1.0", "1.000", "50% (L2)"]
    assert cells(text, "llama-3-8b, decode, 2,048 tokens: LoRA") == ["4 ms", "25.0%", "75.0%"]


def test_a_run_that_ended_at_once_has_a_page(tmp_path):
    """The GPU report's last step is this page, whatever came of the others."""
    text = markdown(Document(tmp_path / "r.json").content)
    assert "before it could say where it ran" in text
    assert text.count("not measured") == len(targets_text([]).splitlines()) - 1


def same_names(folder):
    for name in "ab":
        (folder / name).mkdir()
    return [str(saved(folder / name, plain())) for name in "ab"]


def taken(folder):
    return [str(saved(folder, plain())), "--out", str(saved(folder, {}, "taken"))]


WRONG = {
    "no such file": lambda folder: [str(folder / "none.json")],  # test_results.py has what else is no result
    "two of the files are called made-up.json": same_names,
    "cannot be written to: ": taken,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, no_plots, message):
    """No traceback, nothing that looks like a result, and a code that a script sees."""
    arguments = WRONG[message](tmp_path)
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compare", "a", "b", "c"], "leave out the other files"),
        (["--compare", "a", "b", "--out", "c"], "writes nothing"),
        (["--across-devices"], "belongs to --compare"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, arguments, message):
    """An option that is given and does nothing would be believed."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def other_run(factor, **changes):
    """The layer's result again, its ratio and range ``factor`` times as large."""
    content = plain()
    content["conditions"] |= changes
    for each, other, by in ((0, "dense", factor), (1, "triton, T=3", 1 / factor)):
        ratio = content["rows"][each]["ratios"][other]
        ratio["median"] *= by
        ratio["range"] = [by * q for q in ratio["range"]]
    return content


def compared(tmp_path, first, second, *options):
    paths = [saved(tmp_path, first, "a.json"), saved(tmp_path, second, "b.json")]
    return main(["--compare", *map(str, paths), *options])


def test_a_result_is_not_compared_with_itself(tmp_path, capsys):
    """Everything would agree."""
    path = saved(tmp_path, document(LAYER), "a.json")
    assert main(["--compare", str(path), str(path)]) == 2
    assert "is named twice" in capsys.readouterr().err


@pytest.mark.parametrize("factor, agree", [(1.0, 1), (1.02, 1), (1.03, 0), (1 / 1.03, 0)])
def test_ratios_agree_if_their_ranges_overlap(tmp_path, capsys, factor, agree):
    """A ratio and its inverse are one finding, not two; disagreement is no failure of the command."""
    assert compared(tmp_path, plain(), other_run(factor)) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"{agree} of 1 ratios agree within their ranges"
    assert printed.count("over dense") == 1
    assert f"{2 * factor:.3f}" in printed


def test_differing_versions_and_commits_are_listed_and_so_is_what_only_one_has(tmp_path, capsys):
    """Two runs need not be of one commit, but who reads the comparison must know; nothing is dropped silently."""
    second = other_run(1.0, commit="f" * 40)
    second["conditions"]["versions"]["torch"] = "2.11.0"
    first = plain()
    first["rows"] += in_turns(row("triton", 1.0, case="c"), row("torch", 2.0), row("literal", 3.0))
    assert compared(tmp_path, first, second) == 0
    printed = capsys.readouterr().out
    assert f"commit: A {'0123456789' * 4}, B {'f' * 40}" in printed
    assert "versions torch: A 2.13.0, B 2.11.0" in printed
    assert "date:" not in printed
    assert "3 ratios of A alone, not compared" in printed
    assert printed.splitlines()[-1].startswith("1 of 1 ")


@pytest.mark.parametrize("key, value", [("kind", "cpu"), ("name", "NVIDIA H100"), ("threads", 4)])
def test_results_of_different_devices_are_not_compared_unless_asked(tmp_path, capsys, key, value):
    """Their ratios differ for a reason that is not the code."""
    second = plain()
    second["conditions"]["device"] = {**second["conditions"]["device"], key: value}
    assert compared(tmp_path, plain(), second) == 2
    error = capsys.readouterr().err
    assert "different devices" in error
    assert error.count("name NVIDIA H") == 2
    assert f"{key} {value}" in error
    assert compared(tmp_path, plain(), second, "--across-devices") == 0
    assert f"device {key}: " in capsys.readouterr().out


def test_results_without_a_common_ratio_cannot_be_compared(tmp_path, capsys):
    """\"0 of 0 agree\" would read like agreement."""
    second = document(in_turns(row("triton", 1.0, case="another"), row("dense", 2.0)))
    assert compared(tmp_path, plain(), second) == 2
    assert "no ratio in common" in capsys.readouterr().err

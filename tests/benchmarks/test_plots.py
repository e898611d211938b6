"""The plots: each drawn from its rows, each that lacks them says so, a provider in one colour in all."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from benchmarks import plots
from benchmarks.plots import LOOKS, NoRows, draw
from benchmarks.report import write
from tests.benchmarks.made_up import LIMITS, document, in_turns, row, source


def rounds(**changes):
    """T = 1, 2, 3 at 10, 12 and 15 ms, of one case."""
    changes = {"group": "decoder", "mode": "prefill", **changes}
    return in_turns(*(row("triton", ms / 1e3, rounds=t, **changes) for t, ms in ((1, 10), (2, 12), (3, 15))))


def work(operations, **changes):
    return row("triton", 1e-3, work={"bytes": 1e9, "operations": operations}, **changes)


ENOUGH = {"latency_over_rounds": document(rounds()), "roofline": document([work(1e12)], limits=LIMITS)}
TOO_LITTLE = [
    ("latency_over_rounds", document(rounds(group="layer")), "no rows of the groups"),  # no series in T
    ("latency_over_rounds", document(rounds()[1:]), "with T=1 and another T"),
    ("latency_over_rounds", document(rounds()[:1]), "with T=1 and another T"),
    ("roofline", document([work(1e12)]), "no measured limits"),
    ("roofline", document([row("triton", 1.0)], limits=LIMITS), "no rows with bytes and operations"),
    ("roofline", document([work(1e12, dtype="fp32")], limits=LIMITS), "in the dtype of the measured limits"),
    ("roofline", document([work(0)], limits=LIMITS), "no rows with bytes and operations"),
]


def drawn(name, content=None):
    return getattr(plots, name)(content or ENOUGH[name]).axes


def labels(ax):
    return {text.get_text() for text in ax.get_legend().get_texts()}


def test_all_plots_of_a_whole_result_are_written(tmp_path):
    """As PNG files that are not blank, named by the result, linked from the page."""
    content = document([row for each in ENOUGH.values() for row in each["rows"]], limits=LIMITS)
    lines = write([source(content, "run.json")], tmp_path)
    page = (tmp_path / "report.md").read_text()
    for plot, title in plots.PLOTS.items():
        path = tmp_path / f"run-{plot.__name__.replace('_', '-')}.png"
        pixels = imread(path)
        assert pixels.min() < pixels.max()
        assert f"  {path}" in lines
        assert f"![{title}]({path.name})" in page


def test_a_plot_without_its_rows_is_named_with_the_reason(tmp_path):
    """A missing picture must not look like a broken link, on the terminal or on the page."""
    lines = write([source(ENOUGH["latency_over_rounds"], "run.json")], tmp_path)
    assert f"no plot of {plots.PLOTS[plots.roofline]}: no measured limits (1 file: run.json)" in lines
    assert f"No plot of {plots.PLOTS[plots.roofline]}: no measured limits." in (tmp_path / "report.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["run-latency-over-rounds.png"]


def test_what_several_results_lack_is_said_once(tmp_path):
    """It stood under eight of nine files, and hid the lines that say something."""
    sources = [source(ENOUGH["latency_over_rounds"], name) for name in ("a.json", "b.json")]
    lines = [line for line in write(sources, tmp_path) if "no plot" in line]
    assert lines == [f"no plot of {plots.PLOTS[plots.roofline]}: no measured limits (2 files: a.json, b.json)"]


@pytest.mark.parametrize("name, content, reason", TOO_LITTLE)
def test_what_lacks_its_rows_is_not_drawn(name, content, reason):
    """An empty plot says that something was measured."""
    with pytest.raises(NoRows, match=reason):
        drawn(name, content)


def test_the_title_names_device_versions_commit_and_date(tmp_path, monkeypatch):
    """A picture travels without its page."""
    figures = []

    def roofline(content):
        figures.append(plots.roofline(content))
        return figures[0]

    monkeypatch.setattr(plots, "PLOTS", {roofline: "Roofline"})
    draw(ENOUGH["roofline"], tmp_path, "run")
    title = figures[0].get_suptitle()
    assert all(word in title for word in ("Roofline", "NVIDIA H200", "torch 2.13.0", "commit 0123456789", "2026-11-30"))


def test_latency_is_relative_to_one_round_beside_the_papers_line():
    """The line that a reader compares with has the paper's slope; a training step is not held against it."""
    (ax,) = drawn("latency_over_rounds")
    paper, own = ax.lines
    assert list(paper.get_ydata()) == pytest.approx([1, 1.16, 1.32])
    assert list(own.get_xdata()) == [1, 2, 3]
    assert list(own.get_ydata()) == pytest.approx([1, 1.2, 1.5])
    assert labels(ax) == {"triton", "paper: 1 + 0.16 (T - 1)"}
    (training,) = drawn("latency_over_rounds", document(rounds(group="rounds", mode="training")))
    assert labels(training) == {"triton"}


def test_the_roof_is_what_was_measured_and_a_group_has_one_of_its_own():
    """The bend lies where both limits ask for the same time; a point is at its own intensity and rate."""
    content = document([work(1e12), work(2e12, group="decoder"), work(3e12, group="decoder")], limits=LIMITS)
    axes = drawn("roofline", content)
    assert {ax.get_title(): len(ax.lines) for ax in axes} == {"layer": 2, "decoder": 3}
    roof, point = axes[0].lines
    assert (roof.get_xdata()[1], roof.get_ydata()[1]) == pytest.approx((200, 8e14))
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 4e12)
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((1e3, 1e15))
    assert {"800 TFLOP/s", "4 TB/s"} == {text.get_text() for text in axes[0].texts}


def test_providers_keep_their_colour_and_no_two_share_one():
    """Who has learnt a colour in one plot reads the others with it."""
    assert len({colour for colour, _ in LOOKS.values()}) == len({mark for _, mark in LOOKS.values()}) == len(LOOKS)
    for name in ENOUGH:
        assert to_hex(drawn(name)[0].lines[1].get_color()).lower() == LOOKS["triton"][0].lower()

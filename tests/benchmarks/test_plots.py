"""The plots: each drawn from its rows, each that lacks them says so, a provider in one colour in all."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from benchmarks import plots
from benchmarks.plots import LOOKS, NoRows, draw
from benchmarks.report import write
from tests.benchmarks.made_up import document, in_turns, row, source

LIMITS = {"copy bytes a second": 4e12, "matrix operations a second": 8e14, "matrix dtype": "bf16"}
DECODER = {"group": "decoder", "mode": "prefill"}


def rounds(provider="triton", **changes):
    """T = 1, 2, 3 at 10, 12 and 15 ms, of one case."""
    return in_turns(*(row(provider, ms / 1e3, rounds=t, **changes) for t, ms in ((1, 10), (2, 12), (3, 15))))


def work(operations, dtype="bf16", **changes):
    return row("triton", 1e-3, dtype=dtype, work={"bytes": 1e9, "operations": operations}, **changes)


ENOUGH = {
    "latency_over_rounds": document(rounds(**DECODER)),
    "roofline": document([work(1e12)], limits=LIMITS),
}
TOO_LITTLE = {
    "latency_over_rounds": [
        (document(), "no rows of the groups rounds and decoder"),
        (document(rounds()), "no rows of the groups"),  # the layer's are no series in T
        (document(rounds(**DECODER)[1:]), "with T=1 and another T"),
        (document(rounds(**DECODER)[:1]), "with T=1 and another T"),
    ],
    "roofline": [
        (document([work(1e12)]), "no measured limits"),
        (document([row("triton", 1.0)], limits=LIMITS), "no rows with bytes and operations"),
        (document([work(1e12, dtype="fp32")], limits=LIMITS), "in the dtype of the measured limits"),
        (document([work(0)], limits=LIMITS), "no rows with bytes and operations"),
        (document([row("triton", 1.0, work={"bytes": None, "operations": 1e9})], limits=LIMITS), "no rows with bytes"),
    ],
}


def drawn(name):
    return getattr(plots, name)(ENOUGH[name]).axes[0]


def labels(ax):
    return {text.get_text() for text in ax.get_legend().get_texts()}


def test_every_plot_is_tried_with_and_without_its_rows():
    """A new plot comes with both."""
    assert {plot.__name__ for plot in plots.PLOTS} == ENOUGH.keys() == TOO_LITTLE.keys()


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
    assert f"  no plot of {plots.PLOTS[plots.roofline]}: no measured limits" in lines
    assert f"No plot of {plots.PLOTS[plots.roofline]}: no measured limits." in (tmp_path / "report.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["run-latency-over-rounds.png"]


@pytest.mark.parametrize(
    "name, content, reason", [(name, *each) for name, cases in TOO_LITTLE.items() for each in cases]
)
def test_what_lacks_its_rows_is_not_drawn(name, content, reason):
    """An empty plot says that something was measured."""
    with pytest.raises(NoRows, match=reason):
        getattr(plots, name)(content)


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
    """The line that a reader compares with has the paper's slope."""
    ax = drawn("latency_over_rounds")
    paper, own = ax.lines
    assert list(paper.get_ydata()) == pytest.approx([1, 1.16, 1.32])
    assert list(own.get_xdata()) == [1, 2, 3]
    assert list(own.get_ydata()) == pytest.approx([1, 1.2, 1.5])
    assert labels(ax) == {"triton", "paper: 1 + 0.16 (T - 1)"}


def test_a_training_step_is_not_held_against_the_papers_inference():
    ax = plots.latency_over_rounds(document(rounds(**{**DECODER, "group": "rounds", "mode": "training"}))).axes[0]
    assert len(ax.lines) == 1
    assert labels(ax) == {"triton"}


def test_the_roof_is_what_was_measured():
    """The bend lies where both limits ask for the same time; a point is at its own intensity and rate."""
    ax = drawn("roofline")
    roof, point = ax.lines
    assert (roof.get_xdata()[1], roof.get_ydata()[1]) == pytest.approx((200, 8e14))
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 4e12)
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((1e3, 1e15))
    assert {"800 TFLOP/s", "4 TB/s"} == {text.get_text() for text in ax.texts}


def test_a_group_has_a_roof_of_its_own():
    """Hundreds of points under one roof hide each other."""
    content = document([work(1e12), {**work(2e12), "group": "decoder"}], limits=LIMITS)
    axes = plots.roofline(content).axes
    assert [ax.get_title() for ax in axes] == ["layer", "decoder"]
    assert [len(ax.lines) for ax in axes] == [2, 2]


def test_providers_keep_their_colour_and_no_two_share_one():
    """Who has learnt a colour in one plot reads the others with it."""
    assert len({colour for colour, _ in LOOKS.values()}) == len({mark for _, mark in LOOKS.values()}) == len(LOOKS)
    for name in ENOUGH:
        assert to_hex(drawn(name).lines[1].get_color()).lower() == LOOKS["triton"][0].lower()

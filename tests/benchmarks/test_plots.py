"""The plots: each drawn from its rows, each that lacks them says so, a provider in one colour in all."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from benchmarks import plots
from benchmarks.drawing import LABEL_GAP, LOOKS, _apart
from benchmarks.plots import NoRows, draw
from benchmarks.report import write
from tests.benchmarks.made_up import document, in_turns, row, source

LIMITS = {"copy bytes a second": 4e12, "matrix operations a second": 8e14, "matrix dtype": "bf16"}
PROFILE = {"model": "llama-3-8b", "adapter": "GraphMoE (T=3)", "phase": "decode", "tokens": 2048}
PROFILE["seconds"] = {"attention": 2e-3, "mlp": 3e-3, "experts": 1e-3, "routing": 1e-3, "gru": 1e-3, "other": 2e-3}
DECODER = {"group": "decoder", "mode": "prefill"}


def rounds(provider="triton", **changes):
    """T = 1, 2, 3 at 10, 12 and 15 ms, of one case."""
    return in_turns(*(row(provider, ms / 1e3, rounds=t, **changes) for t, ms in ((1, 10), (2, 12), (3, 15))))


def tokens(provider, of=(64, 512), t=3, **changes):
    return [row(provider, n * 1e-5, tokens=n, rounds=t, case=f"{n} tokens", **changes) for n in of]


def work(operations, dtype="bf16", **changes):
    return row("triton", 1e-3, dtype=dtype, work={"bytes": 1e9, "operations": operations}, **changes)


def training(t, peak):
    return row("triton", 1e-3, rounds=t, mode="training", **{"peak bytes": peak})


ENOUGH = {
    "latency_over_rounds": document(rounds(**DECODER)),
    "latency_shares": document(profiles=[PROFILE]),
    "time_over_tokens": document(tokens("triton")),
    "roofline": document([work(1e12)], limits=LIMITS),
    "memory_over_rounds": document([training(1, 1e9), training(3, 2e9)]),
}
TOO_LITTLE = {
    "latency_over_rounds": [
        (document(), "no rows of the groups rounds and decoder"),
        (document(rounds()), "no rows of the groups"),  # the layer's are no series in T
        (document(rounds(**DECODER)[1:]), "with T=1 and another T"),
        (document(rounds(**DECODER)[:1]), "with T=1 and another T"),
    ],
    "latency_shares": [(document(), "no profiles"), (document(profiles=[{**PROFILE, "seconds": {}}]), "no profiles")],
    "time_over_tokens": [
        (document(), "more than one token count"),
        (document(tokens("triton", of=(64,))), "more than one token count"),
        (document(tokens("dense")), "no rows of the layer"),
    ],
    "roofline": [
        (document([work(1e12)]), "no measured limits"),
        (document([row("triton", 1.0)], limits=LIMITS), "no rows with bytes and operations"),
        (document([work(1e12, dtype="fp32")], limits=LIMITS), "in the dtype of the measured limits"),
        (document([work(0)], limits=LIMITS), "no rows with bytes and operations"),
        (document([row("triton", 1.0, work={"bytes": None, "operations": 1e9})], limits=LIMITS), "no rows with bytes"),
    ],
    "memory_over_rounds": [
        (document(), "no rows of training"),
        (document([training(3, None)]), "no rows of training with their peak memory"),
    ],
}


def drawn(name):
    return getattr(plots, name)(ENOUGH[name]).axes[0]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_every_plot_is_tried_with_and_without_its_rows():
    """A new plot comes with both."""
    assert {plot.__name__ for plot in plots.PLOTS} == ENOUGH.keys() == TOO_LITTLE.keys()


def test_all_plots_of_a_whole_result_are_written(tmp_path):
    """As PNG files that are not blank, named by the result, linked from the page."""
    content = document([row for each in ENOUGH.values() for row in each["rows"]], limits=LIMITS, profiles=[PROFILE])
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
    lines = write([source(document([training(1, 1e9)]), "run.json")], tmp_path)
    assert "  no plot of Where the time of a model goes: no profiles" in lines
    assert "No plot of Where the time of a model goes: no profiles." in (tmp_path / "report.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["run-memory-over-rounds.png"]


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

    def memory(content):
        figures.append(plots.memory_over_rounds(content))
        return figures[0]

    monkeypatch.setattr(plots, "PLOTS", {memory: "Memory"})
    draw(ENOUGH["memory_over_rounds"], tmp_path, "run")
    title = figures[0].get_suptitle()
    assert all(word in title for word in ("Memory", "NVIDIA H200", "torch 2.13.0", "commit 0123456789", "2026-11-30"))


def test_latency_is_relative_to_one_round_beside_the_papers_line():
    """The line that a reader compares with has the paper's slope."""
    ax = drawn("latency_over_rounds")
    paper, own = ax.lines
    assert list(paper.get_ydata()) == pytest.approx([1, 1.16, 1.32])
    assert list(own.get_xdata()) == [1, 2, 3]
    assert list(own.get_ydata()) == pytest.approx([1, 1.2, 1.5])
    assert set(texts(ax)) == {"triton", "paper: 1 + 0.16 (T - 1)"}


def test_a_training_step_is_not_held_against_the_papers_inference():
    ax = plots.latency_over_rounds(document(rounds(**{**DECODER, "group": "rounds", "mode": "training"}))).axes[0]
    assert len(ax.lines) == 1
    assert texts(ax) == ["triton"]


def test_shares_join_mlp_experts_and_routing():
    """As the paper's Fig 6, whose GRU share is what readers look for."""
    ax = drawn("latency_shares")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.2, 0.5, 0.1, 0.2])
    assert {"50%", "10 ms, GRU 10.0%"} <= set(texts(ax))


def test_what_has_no_rounds_stands_beside_the_rounds_of_its_case():
    """The dense MLP of another case was not timed in turns with these."""
    content = document([*tokens("triton"), *tokens("dense", t=1), *tokens("dense", of=(1, 2), t=1)])
    figure = plots.time_over_tokens(content)
    (ax,) = figure.axes
    assert ax.get_title().startswith("T=3")
    assert {len(line.get_xdata()) for line in ax.lines} == {2}
    assert set(texts(ax)) == {"triton", "dense"}


def test_the_roof_is_what_was_measured():
    """The bend lies where both limits ask for the same time; a point is at its own intensity and rate."""
    ax = drawn("roofline")
    roof, point = ax.lines
    assert (roof.get_xdata()[1], roof.get_ydata()[1]) == pytest.approx((200, 8e14))
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 4e12)
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((1e3, 1e15))
    assert {"800 TFLOP/s", "4 TB/s"} == set(texts(ax))


def test_a_group_has_a_roof_of_its_own():
    """Hundreds of points under one roof hide each other."""
    content = document([work(1e12), {**work(2e12), "group": "decoder"}], limits=LIMITS)
    axes = plots.roofline(content).axes
    assert [ax.get_title() for ax in axes] == ["layer", "decoder"]
    assert [len(ax.lines) for ax in axes] == [2, 2]


def test_memory_is_in_megabytes_against_rounds():
    """One line a provider, from zero, so that lengths compare."""
    ax = drawn("memory_over_rounds")
    assert list(ax.lines[0].get_xdata()) == [1, 3]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([1000, 2000])
    assert ax.get_ylim()[0] == 0


def test_providers_keep_their_colour_and_no_two_share_one():
    """Who has learnt a colour in one plot reads the others with it."""
    assert len({colour for colour, _ in LOOKS.values()}) == len({mark for _, mark in LOOKS.values()}) == len(LOOKS)
    for name, line in (("latency_over_rounds", 1), ("time_over_tokens", 0), ("roofline", 1), ("memory_over_rounds", 0)):
        assert to_hex(drawn(name).lines[line].get_color()).lower() == LOOKS["triton"][0].lower()


@pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.1, 0.12, 0.9], [0.0, 1.0], [0.3]])
def test_labels_keep_their_distance_and_their_order(heights):
    """Labels on top of each other are none; those with room stay at their line."""
    placed = _apart(heights, LABEL_GAP)
    assert all(high - low > LABEL_GAP - 1e-9 for low, high in itertools.pairwise(placed))
    assert sum(placed) == pytest.approx(sum(heights))
    if len(heights) < 3:
        assert placed == pytest.approx(heights)

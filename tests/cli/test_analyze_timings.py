"""Times that were measured before, as `analyze latency` and `composition` read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphmoe_model.analysis.timings import read_timings, with_shares, with_times
from graphmoe_model.profiling.result import CATEGORIES
from tests.cli import command
from tests.cli.drawn_pictures import assert_picture

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def profile(adapter: str, phase: str, tokens: int, milliseconds: float, **more: Any) -> dict[str, Any]:
    """An entry of profile.json whose attention takes half of the time."""
    seconds = {name: milliseconds / 1e3 / (2 if name == "attention" else 10) for name in CATEGORIES}
    wall = {} if milliseconds == 0 else {"wall_seconds": 1.1 * milliseconds / 1e3}
    return {"model": "m", "adapter": adapter, "phase": phase, "tokens": tokens, "seconds": seconds, **wall, **more}


def written(folder: Path, name: str = "profile.json", **parts: Any) -> Path:
    entries = [
        profile(adapter, phase, tokens, 2.0 * (i + 1))
        for i, adapter in enumerate(("none", "MixLoRA, T = 1", "GraphMoE(MoLA), T = 3"))
        for phase in ("prefill", "decode")
        for tokens in (16, 64)
    ]
    (folder / name).write_text(json.dumps({"conditions": {"device": "cpu (X)"}, "profiles": entries, **parts}))
    return folder / name


def graphmoe(*arguments: object) -> Any:
    """The result of an analysis: exit_code, stdout, stderr, exception."""
    return command.graphmoe("analyze", *arguments)


def drawn_text(draw: Any, found: Any, path: Path) -> str:
    """All that a picture says."""
    figures = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("graphmoe_model.analysis.timing_plots.write_picture", lambda figure, _: figures.append(figure))
        draw(found, path)
    return "\n".join(text.get_text() for text in figures[0].findobj(lambda own: hasattr(own, "get_text")))


def test_latency_of_profiles_and_of_layers_by_rounds(tmp_path):
    """In milliseconds, as the files have them: a profile's elapsed time, a benchmark's median."""
    committed = RESULTS / "cuda-2026-11-26T202140.json"
    result = graphmoe("latency", written(tmp_path), committed, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    own, layers = json.loads((tmp_path / "out" / "latency.json").read_text())["latency"]
    assert [(each["adapter"], each["phase"], each["tokens"]) for each in own["models"][:2]] == [
        ("none", "prefill", 16),
        ("none", "prefill", 64),
    ]
    assert own["models"][-1]["seconds"] == pytest.approx(1.1 * 0.006)
    assert "6.6" in result.stdout
    rows = [row for row in json.loads(committed.read_text())["rows"] if row["group"] == "rounds"]
    assert [each["seconds"] for each in layers["layers"]] == [row["seconds"]["median"] for row in rows]
    case = "llama-3-8b, inference, 8192 tokens, n=8, bf16"
    found = {(each["provider"], each["rounds"]): each["seconds"] for each in layers["layers"] if each["case"] == case}
    assert set(found) >= {("dense", None), ("triton", 1), ("triton", 5), ("literal", 3)}
    assert f"layer, {case}, NVIDIA H100 80GB HBM3: ms" in result.stdout
    one = {each["provider"] for each in layers["layers"] if "inference, 1 tokens" in each["case"]}
    assert one == {"dense, in a CUDA graph", "triton, in a CUDA graph", "literal"}  # the last is measured without
    assert "triton, in a CUDA graph" in result.stdout
    assert_picture(tmp_path / "out" / "latency.png")


def test_pictures_say_what_was_measured_and_how(tmp_path):
    """Else two layers on a CPU pass for a whole model, and one device for another."""
    pytest.importorskip("matplotlib")
    from graphmoe_model.analysis.timing_plots import draw_composition, draw_latency

    of = {"device": "cpu (X)", "dtype": "float32", "layers": 2, "batch": 1, "threads": 4, "torch": "2.13.0"}
    own = read_timings(written(tmp_path, conditions={**of, "load average": 0.5, "cores": 8}))
    layers = read_timings(RESULTS / "cuda-2026-11-26T202140.json")
    told = "cpu (X), float32, batch 1, 4 threads, torch 2.13.0, load average 0.5 of 8 cores"
    assert own.measured() == told
    assert layers.measured().startswith("NVIDIA H100 80GB HBM3, torch 2.11.0, load average ")
    for draw, found, titles in (
        (draw_latency, [own], ["m, 2 layers\nprefill", "m, 2 layers\none token of decode"]),
        (
            draw_latency,
            [own, layers],
            ["m, 2 layers, cpu (X)\nprefill", "layer, NVIDIA H100 80GB HBM3\nllama-3-8b, inf"],
        ),
        (draw_composition, with_shares([own], None), ["m, 2 layers\nprefill of 64 tokens"]),
    ):
        text = drawn_text(draw, found, tmp_path / "picture.png")
        assert all(title in text for title in titles), text
        assert told in text


def test_composition_at_the_longest_or_at_a_named_length(tmp_path):
    file = written(tmp_path)
    for tokens, arguments in ((64, ()), (16, ("--tokens", 16))):
        result = graphmoe("composition", file, *arguments, "--out", tmp_path)
        assert result.exit_code == 0, result.output
        (own,) = json.loads((tmp_path / "composition.json").read_text())["composition"]
        assert [each["tokens"] for each in own["models"]] == [tokens] * 6
        assert own["models"][0]["shares"] == pytest.approx({n: 0.5 if n == "attention" else 0.1 for n in CATEGORIES})
        assert f"m, decode of {tokens} tokens, cpu (X)" in result.stdout
    assert_picture(tmp_path / "composition.png")


def test_two_models_in_one_file_stand_apart(tmp_path):
    """Both profiled without an adapter: merged, one would have the other's time under its name."""
    small, large = ({**profile("none", "decode", 16, time), "model": name} for name, time in (("7b", 7), ("70b", 70)))
    more = {**profile("none", "decode", 64, 80), "model": "70b"}
    file = written(tmp_path, profiles=[small, large, more])
    result = graphmoe("latency", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split("\n70b, cpu (X): ms")
    assert first.startswith("7b, cpu (X): ms")
    assert [word for word in first.split() if word in ("7.7", "77", "88")] == ["7.7"]
    assert [word for word in second.split() if word in ("7.7", "77", "88")] == ["77", "88"]
    assert_picture(tmp_path / "out" / "latency.png")
    result = graphmoe("composition", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for title in ("7b, decode of 16 tokens, cpu (X)", "70b, decode of 64 tokens, cpu (X)"):
        assert title in result.stdout.splitlines()
    assert "not shown" not in result.stdout
    assert_picture(tmp_path / "out" / "composition.png")


@pytest.mark.parametrize("names, shown", [(("/a/m", "/b/m"), ("/a/m", "/b/m")), (("/a/m", "/b/n"), ("m", "n"))])
def test_each_model_has_panels_under_a_name_of_its_own(names, shown, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from graphmoe_model.analysis import timing_plots

    figures: list[Any] = []
    monkeypatch.setattr(timing_plots, "write_picture", lambda figure, path: figures.append(figure))
    file = written(tmp_path, profiles=[{**profile("none", "decode", 16, 7), "model": name} for name in names])
    measured = [read_timings(file)]
    timing_plots.draw_latency(with_times(measured), tmp_path / "a.png")
    timing_plots.draw_composition(with_shares(measured, None), tmp_path / "b.png")
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in figures]
    assert titles[0] == [f"{name}\none token of decode" for name in shown]
    assert titles[1] == [f"{name}\ndecode of one token, 16 tokens in the cache" for name in shown]


def test_what_has_no_profile_of_the_length_is_named(tmp_path):
    """A phase or an adapter that is not in the table is not there to be missed."""
    file = written(tmp_path, profiles=[profile("none", "decode", 1024, 7), profile("none", "prefill", 512, 70)])
    result = graphmoe("composition", file, "--tokens", 1024, "--out", tmp_path / "out", "--no-plot")
    assert result.exit_code == 0, result.output
    assert f"{file}: not shown is the prefill of m with none, which is of 512 tokens" in result.stdout
    short = [profile("none", "decode", 64, 7), *(profile("LoRA", "decode", tokens, 7) for tokens in (16, 8))]
    result = graphmoe("composition", written(tmp_path, profiles=short), "--out", tmp_path / "short", "--no-plot")
    assert f"{file}: not shown is the decode of m with LoRA, which is of 8, 16 tokens" in result.stdout


@pytest.mark.parametrize("which", ["latency", "composition"])
def test_timings_of_something_else_are_not_written_over(which, tmp_path):
    """The same file of another model is something else: `graphmoe profile` may have written it anew."""
    file = written(tmp_path)
    assert graphmoe(which, file, "--out", tmp_path / "out", "--no-plot").exit_code == 0
    assert graphmoe(which, file, "--out", tmp_path / "out", "--no-plot").exit_code == 0
    here = tmp_path / "out" / f"{which}.json"
    before = here.read_bytes()
    of = f"{file} (m with none, MixLoRA, T = 1, GraphMoE(MoLA), T = 3, cpu (X))"
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other")
    refused = graphmoe(which, other, "--out", tmp_path / "out", "--no-plot")
    assert refused.exit_code == 2
    assert f"{here} holds the {which} of {of}, and this one is of {other} (m" in refused.stderr
    written(tmp_path, profiles=[{**profile("none", "decode", 16, 7), "model": "n"}])
    refused = graphmoe(which, file, "--out", tmp_path / "out", "--no-plot")
    assert f"holds the {which} of {of}, and this one is of {file} (n with none, cpu (X)); name" in refused.stderr
    assert here.read_bytes() == before


def test_every_committed_result_can_be_read():
    """The forms of all that was measured so far; what has no times is named as such."""
    for path in [*sorted(RESULTS.glob("*.json")), *sorted((RESULTS / "profile").glob("*.json"))]:
        found = read_timings(path)
        assert all(abs(sum(each.shares.values()) - 1) < 1e-9 for each in found.models)
    assert with_times([read_timings(RESULTS / "profile" / "cpu-tiny.json")])[0].models


def test_files_without_what_is_asked_for_are_named(tmp_path):
    plain = written(tmp_path, "plain.json", profiles=[{**profile("none", "decode", 8, 1), "phase": "host"}])
    with pytest.raises(ValueError, match=r"plain\.json has no elapsed times"):
        with_times([read_timings(plain)])
    with pytest.raises(ValueError, match=r"plain\.json has no profile of prefill or decode"):
        with_shares([read_timings(plain)], None)
    with pytest.raises(ValueError, match=r"has no profile of 32 tokens; it has 16, 64"):
        with_shares([read_timings(written(tmp_path))], 32)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "is not a profile.json of graphmoe profile, or a result of pytest benchmarks: it has no 'conditions'"),
        ('{"conditions": {"device": "x"}, "profiles": [{"phase": "decode"}]}', "it has no 'seconds'"),
        ('{"conditions": 3, "profiles": []}', "is not a profile.json of graphmoe profile"),
        (
            json.dumps({"conditions": {"device": "x"}, "profiles": [profile("a", "decode", 4, 2.0)] * 2}),
            "has two adapters called a, which cannot be told apart",
        ),
        (
            json.dumps({"conditions": {"device": "x"}, "profiles": [profile("a", "decode", 4, 0.0)]}),
            "has no time in it",
        ),
    ],
)
def test_files_of_another_kind_end_in_one_line(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    for which in ("latency", "composition"):
        result = graphmoe(which, tmp_path / "a.json", "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.startswith(f"graphmoe analyze {which}: error: ")
        assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_or_twice(tmp_path):
    file = written(tmp_path)
    for arguments, message in (
        (("latency", tmp_path / "no.json"), "there is no file"),
        (("composition", file, file), "is named twice"),
        (("latency", file, "--out", file), "is a file; name a folder"),
    ):
        result = graphmoe(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr

"""What `pytest benchmarks` makes of its options: what was asked for is measured, or refused by name."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import GROUPS
from benchmarks.options import choose
from benchmarks.providers import PROVIDERS
from benchmarks.session import Session
from benchmarks.sizes import MODELS

NAMES = ("sizes", "groups", "providers", "tokens", "dtype", "device", "threads", "seconds")


class Config:
    """The part of pytest's configuration that is read."""

    def __init__(self, **options):
        self.options = {**dict.fromkeys(NAMES), "device": "cpu", **options}

    def getoption(self, name):
        return self.options[name]


def chosen(**options):
    return choose(Config(**options))


def test_by_default_everything_but_methods_and_scaling_is_measured():
    found = chosen(sizes="tiny")
    assert {case.group for case in found.cases} == set(GROUPS) - {"methods", "scaling", "profile"}
    assert [model.name for model in found.profiled] == ["tiny"]
    assert {"liger", "mixlora", "triton"} >= found.left_out.keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sizes": "llama-4"}, f"--sizes: unknown llama-4; there are {', '.join(MODELS)}"),
        ({"groups": "layer,gru"}, f"--groups: unknown gru; there are {', '.join(GROUPS)}"),
        ({"providers": "unsloth"}, f"--providers: unknown unsloth; there are {', '.join(PROVIDERS)}"),
        ({"providers": "mixlora,dense"}, "--providers: cannot run here: mixlora: "),
        ({"groups": "routing", "providers": "dense"}, "--groups routing has no case with the providers dense"),
        ({"tokens": "1,many"}, "--tokens takes numbers with commas between them, got '1,many'"),
        ({"tokens": "0,5"}, "--tokens must be at least 1, got 0"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"seconds": -1.0}, "--seconds must not be negative, got -1.0"),
        ({"sizes": ","}, "--sizes: no name; there are "),
        ({"groups": ""}, "--groups: no name; there are "),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message, monkeypatch):
    """A misspelt size that ran the default, or a provider that was left out in silence, would be believed."""
    monkeypatch.setitem(PROVIDERS, "mixlora", PROVIDERS["mixlora"]._replace(missing=lambda device: "not installed"))
    with pytest.raises(pytest.UsageError) as error:
        chosen(**{"sizes": "tiny", **options})
    assert str(error.value).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries what happens without a CUDA device")
def test_a_gpu_that_is_not_there_is_no_reason_to_use_the_cpu():
    with pytest.raises(pytest.UsageError, match="--device cuda: PyTorch finds no CUDA device"):
        chosen(device="cuda")


@pytest.mark.parametrize("tokens", ["1", "512", "16,16"])
def test_one_token_count_gives_every_case_once(tokens):
    """The largest count is the smallest too: a case that stood twice would be measured twice."""
    names = [case.name for case in chosen(sizes="tiny,tiny", tokens=tokens).cases]
    assert len(names) == len(set(names))
    assert any("rounds, tiny, training" in name for name in names)


def test_no_time_at_all_is_a_time():
    """Zero seconds are the fewest turns, not the default."""
    assert chosen(sizes="tiny", seconds=0.0).seconds == 0.0


def test_a_case_that_raises_is_not_measured_again_for_every_contender(monkeypatch):
    """Each of its tests tells the same error; the step is named as failed, and the next case goes on."""
    calls = []

    def fail(case, workplace):
        calls.append(case.name)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("benchmarks.session.measure", fail)
    monkeypatch.setattr("benchmarks.session.LIMIT_SIZES", {"cpu": (2**16, (8, 8, 8))})
    found = chosen(sizes="tiny", seconds=0.0)
    session = Session(found)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is gone"):
            session[found.cases[0]]
    assert calls == [found.cases[0].name]
    step = session.content["steps"][found.cases[0].name]
    assert (step["state"], step["note"]) == ("failed", "the device is gone")


def test_the_methods_are_timed_side_by_side():
    """One word changed is one contender: the eight base methods, and GraphMoE on the six with experts."""
    cases = chosen(sizes="tiny", groups="methods", tokens="1,8").cases
    assert [case.name for case in cases] == [
        "methods, tiny, inference, 8 tokens, by method, fp32",
        "methods, tiny, inference, 1 tokens, by method, fp32",
        "methods, tiny, training, 8 tokens, by method, fp32",
    ]
    bases = ["LoRA", "DoRA", "MixLoRA", "MixDoRA", "LoRAMoE", "DoRAMoE", "MoLA", "MoDA"]
    for case in cases:
        labels = [contender.label for contender in case.contenders]
        assert labels[0] == "dense"
        assert [label for label in labels if label in {f"torch, {base}" for base in bases}] == [
            f"torch, {base}" for base in bases
        ]
        for provider in ("torch", "literal"):
            assert {f"{provider}, GraphMoE({base})" for base in bases[2:]} <= set(labels)

"""The predictions' arithmetic, and that nothing passes for measured that is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import predictions as p
from benchmarks.document import SCHEMA
from benchmarks.limits import H200
from benchmarks.predictions_page import page
from benchmarks.roofline import KERNELS, experts_per_tile, work


def result(**changes):
    seconds = {"median": 2.5e-3, "quartiles": [2e-3, 3e-3], "best": 2e-3, "turns": 9}
    kernel = {"kernel": "forward_kernel", "tokens": 8192, "experts": 8, "round": "later", "ordered": True}
    rows = [
        {
            "case": "layer",
            "group": "layer",
            "model": "llama-3-8b",
            "mode": "inference",
            "graph": False,
            "provider": name,
            "label": name,
            "sizes": {"tokens": 8192, "rounds": rounds, "experts": 8, "dtype": "bf16"},
            "seconds": seconds | {"median": time},
            "ratios": {},
        }
        for name, rounds, time in (("triton", 3, 6e-3), ("dense", 1, 4e-3))
    ]
    conditions = {
        "device": {"name": "NVIDIA H200", "kind": "cuda"},
        "commit": "1" * 40,
        "date": "2026-12-01",
        "versions": {},
    }
    conditions |= {"sizes": "llama-3-8b"}
    kernels = [kernel | {"seconds": seconds}]
    empty = {"limits": {}, "steps": {}, "checks": [], "profiles": []}
    return {"schema": SCHEMA, "conditions": conditions | changes, "rows": rows, "kernels": kernels, **empty}


def test_without_a_result_every_measured_column_says_so():
    text = page(None, [])
    assert "before any of these kernels had run on a GPU" in text
    assert "Nothing of this package has been measured yet." in text
    rows = [line for line in text.splitlines() if line.startswith(("| experts forward", "| prefill", "| decode"))]
    assert rows
    assert all("not measured" in row for row in rows)


def test_a_result_fills_its_own_rows_and_no_others():
    text = page(result(), [])
    line = next(line for line in text.splitlines() if line.startswith("| experts forward, later round | 8192"))
    assert "| 2,500.0 |" in line
    assert "not measured" not in line
    assert text.count("2,500.0") == 1
    assert any("| 1.50 |" in line for line in text.splitlines() if line.startswith("| prefill, 8192 tokens, T=3"))


def test_the_newest_result_of_a_gpu_is_read(tmp_path):
    """Results of the CPU, and of other sizes, are no measurement of these predictions."""
    assert p.newest_result(tmp_path) is None
    for name, date, sizes in (
        ("a", "2026-12-02", "llama-3-8b"),
        ("b", "2026-12-01", "llama-3-8b"),
        ("c", "2027", "tiny"),
    ):
        (tmp_path / f"cuda-{name}.json").write_text(json.dumps(result(date=date, sizes=sizes)))
    (tmp_path / "cpu-d.json").write_text("{}")
    (tmp_path / "cuda-old.json").write_text("{}")
    assert p.newest_result(tmp_path)["conditions"]["date"] == "2026-12-02"


def test_limits_are_floors_of_the_dense_layer():
    """8192 tokens through the dense MLP: 3.65 ms of products at 790 TFLOP/s, by hand."""
    parts = p.dense_parts(p.sizes_at(8192))
    products = sum(part.seconds for part in parts if part.name in ("gate, up", "down"))
    assert products == pytest.approx(3 * 2 * 8192 * 4096 * 14336 / 790e12, rel=2e-3)


def test_low_rank_forms_by_hand():
    """Masked: k slots times three products n*r wide, 11 million multiply-adds; needed: an eighth of it."""
    forms = {name: millions for name, millions, _ in p.low_rank_forms(p.sizes_at(8192))}
    assert forms["masked, all experts"] == pytest.approx(2 * 3 * 128 * 14336 / 1e6)
    assert forms["needed"] == pytest.approx(forms["masked, all experts"] / 8)
    assert forms["by tile, tokens in order"] < forms["by tile, tokens as they come"]


def test_an_order_leaves_few_experts_to_a_tile():
    """As they come, 64 tokens hold all eight experts in each slot; in order, two and at borders a few more."""
    assert experts_per_tile(8192, 8, 2, 64, ordered=False) == pytest.approx(8, abs=0.1)
    assert 2 <= experts_per_tile(8192, 8, 2, 64, ordered=True) < 3
    assert experts_per_tile(1, 8, 2, 16, ordered=False) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_tokens_are_more_work_and_more_time(kernel):
    few, many = (work(kernel, replace(p.LLAMA_8B, tokens=tokens), later=False) for tokens in (2048, 8192))
    assert many.bytes > few.bytes
    assert many.l2_bytes > few.l2_bytes
    assert max(H200.times(many).values()) > max(H200.times(few).values())


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="unknown kernel 'nonesuch'; expected one of"):
        work("nonesuch", p.LLAMA_8B, later=False)


def test_occupancy_is_that_of_the_shipped_configuration():
    """A reading of another tile says nothing about this one."""
    config = p.shipped_config("gru_forward", 8192)
    settings = " ".join(f"{name.removeprefix('num_')}={value}" for name, value in config.items())
    reading = {"name": "gru gru_forward wide bf16 HAS_STATE", "configuration": settings, "blocks_per_sm": 3}
    arguments = ("gru_forward", "gru gru_forward", "bf16 HAS_STATE", 8192)
    assert p.blocks_per_sm([reading], *arguments) == "3"
    assert p.blocks_per_sm([reading | {"configuration": "BLOCK_M=1"}], *arguments) == "-"

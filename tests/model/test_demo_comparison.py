"""The demo's comparison: all methods, each trained alike from the same base, and every figure finite and its own."""

import copy
import functools
import gc
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from graphmoe_model.demo.__main__ import adapter_config
from graphmoe_model.demo.base import IGNORED, make_base, make_tokenizer
from graphmoe_model.demo.comparison import compare, failures, method_configs
from graphmoe_model.demo.comparison_report import comparison_section, comparison_table, what_was_measured
from graphmoe_model.demo.task import held_out_questions
from graphmoe_model.demo.train import answer_logits, train
from graphmoe_model.layers.routed_layer import RoutedLayer
from graphmoe_model.parameters import parameters_by_component

STEPS, BATCH = 2, 4
BASES = ["LoRA", "DoRA", "MixLoRA", "MixDoRA", "LoRAMoE", "DoRAMoE", "MoLA", "MoDA"]
TITLES = {*BASES, *(f"GraphMoE({base})" for base in BASES[2:])}
CONFIGS = {config.title: config for config in method_configs()}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(0)


@pytest.fixture(scope="module")
def base(tokenizer):
    torch.manual_seed(0)
    return make_base(tokenizer)


@pytest.fixture(scope="module")
def ran(tokenizer, base, tmp_path_factory):
    """One comparison, with what it left behind and every batch that a model was trained on, in order."""
    weights = copy.deepcopy(base.state_dict())
    batches, forward = [], LlamaForCausalLM.forward

    @functools.wraps(forward)
    def recorded(self, *args, **kwargs):
        if self.training:
            batches.append((kwargs["input_ids"], kwargs["labels"]))
        return forward(self, *args, **kwargs)

    folder = tmp_path_factory.mktemp("temporary")
    layers_before = layers_alive()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", recorded)
        patch.setattr(tempfile, "tempdir", str(folder))
        held_out = held_out_questions(0, 5)
        comparison = compare(base, tokenizer, held_out, steps=STEPS, batch_size=BATCH, learning_rate=3e-3, seed=0)
    return SimpleNamespace(
        comparison=comparison,
        batches=batches,
        files=list(folder.iterdir()),
        layers=layers_alive() - layers_before,
        base_kept=all(torch.equal(weights[name], now) for name, now in base.state_dict().items()),
    )


def layers_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, RoutedLayer) for thing in gc.get_objects())


def test_every_method_is_there_with_finite_figures(ran):
    """A method that was left out, or a time or a share that is nan, would leave a gap in the table."""
    assert {method.title for method in ran.comparison.methods} == TITLES
    assert len(ran.comparison.methods) == len(TITLES) == 14
    for method in ran.comparison.methods:
        assert math.isfinite(method.loss), method
        assert 0 <= method.accuracy <= 1
        assert method.step_ms > 0
        assert method.scoring_ms > 0
    assert ran.comparison.base_scoring_ms > 0
    assert failures(ran.comparison, learnt=False) == []


def test_all_methods_take_equal_steps_on_equal_data_in_one_order(ran):
    """Otherwise a method could be ahead for what it was shown."""
    assert len(ran.batches) == STEPS * len(TITLES)
    first, second = ran.batches[:STEPS]
    assert first[0].shape[0] == second[0].shape[0] == BATCH
    assert (first[1] != IGNORED).sum(dim=1).tolist() == [1] * BATCH
    assert first[0].shape != second[0].shape or not torch.equal(first[0], second[0])
    for start in range(STEPS, len(ran.batches), STEPS):
        for batch, expected in zip(ran.batches[start : start + STEPS], ran.batches[:STEPS], strict=True):
            assert torch.equal(batch[0], expected[0])
            assert torch.equal(batch[1], expected[1])


def test_nothing_is_left_behind(ran):
    """Fourteen adapters, their optimizers and the Trainer's folders would otherwise add up; the base stays pristine."""
    assert ran.files == []
    assert ran.layers == 0
    assert ran.base_kept


@pytest.mark.parametrize("title", CONFIGS)
def test_a_fresh_adapter_starts_at_the_base(title, base, tokenizer, ran):
    """All start from the same accuracy, and the table's parameters are those that get trained."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS[title]))
    questions = held_out_questions(0, 3)
    expected = answer_logits(base, tokenizer, questions)
    torch.testing.assert_close(answer_logits(model, tokenizer, questions), expected, atol=1e-5, rtol=1e-5)
    count = sum(parameters_by_component(model).values())
    method = next(method for method in ran.comparison.methods if method.title == title)
    assert method.parameters == count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,}" in next(row for row in comparison_table(ran.comparison).rows if row[0] == title)


def test_the_demos_own_adapter_is_among_them():
    """Otherwise the two parts of the report are about different settings."""
    assert CONFIGS["GraphMoE(MixLoRA)"] == adapter_config()


def test_parameters_of_the_methods_are_of_one_size(ran):
    """Within a third of each other, and LoRA within 5% of MixLoRA, as the report says."""
    counts = {method.title: method.parameters for method in ran.comparison.methods}
    assert max(counts.values()) < 4 / 3 * min(counts.values()), counts
    assert abs(counts["LoRA"] / counts["MixLoRA"] - 1) < 0.05


def test_only_methods_with_experts_have_a_load(ran):
    """LoRA has nothing to route. Shares of n experts lie on both sides of 1/n."""
    for method in ran.comparison.methods:
        if method.title in ("LoRA", "DoRA"):
            assert method.load is None
            continue
        smallest, largest = method.load
        assert 0 <= smallest <= 1 / method.experts <= largest <= 1


def test_table_survives_methods_without_experts(ran):
    """Every row has every cell; where there is no load stands a dash."""
    table = comparison_table(ran.comparison)
    assert [row[0] for row in table.rows] == ["base model", *CONFIGS]
    assert {len(row) for row in table.rows} == {len(table.header)}
    assert {row[0]: row[-1] for row in table.rows}["DoRA"] == "–"


def test_section_says_what_it_does_not_show(ran):
    """Without these words the table reads as a ranking of methods."""
    text = "\n".join(comparison_section(ran.comparison))
    assert "The task is synthetic" in text
    assert "one seed" in text
    assert "nothing was tuned" in text
    assert "says nothing about real tasks" in text


def test_sentence_counts_the_pairs_as_they_are(ran):
    """If GraphMoE is behind its base method the report says so."""
    shown = {"GraphMoE(MoLA)": 0.6, "MoLA": 0.5, "GraphMoE(MoDA)": 0.25, "MoDA": 0.5}
    methods = [method._replace(accuracy=shown.get(method.title, 0.4)) for method in ran.comparison.methods]
    sentence = what_was_measured(ran.comparison._replace(methods=methods))
    assert "in 1 of 6 pairs and fewer in 1" in sentence
    assert "MoLA +10.0, MoDA -25.0" in sentence


def test_failures_name_the_method(ran):
    """A method that diverged or unlearnt must not pass in silence; in a quick run accuracies are noise."""
    methods = [method._replace(accuracy=0.5) for method in ran.comparison.methods]
    methods[0] = methods[0]._replace(loss=math.nan)
    methods[1] = methods[1]._replace(accuracy=0.2)
    methods[2] = methods[2]._replace(accuracy=0.21)  # within 4.9 points of the base: both may be guessing
    broken = ran.comparison._replace(methods=methods, base_accuracy=0.25, questions=400)
    quick = failures(broken, learnt=False)
    assert len(quick) == 1
    assert "LoRA: the training loss was not finite" in quick[0]
    full = failures(broken, learnt=True)
    assert full[:1] == quick
    assert full[1:] == ["DoRA: accuracy 20.0% after training is below the base model's 25.0%."]


def test_a_loss_that_is_not_finite_is_seen(base, tokenizer):
    """Trainer's default writes an earlier loss in place of nan, and a diverged method would look trained."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    data = [{"input_ids": [1, 5, 6], "labels": [IGNORED, IGNORED, 6]}] * 2
    run = train(model, tokenizer, data, title="nan", steps=2, batch_size=1, learning_rate=1e-3, seed=0)
    assert not math.isfinite(run.mean_loss)
    assert len(run.step_ms) == 2


def test_one_step_is_refused(base, tokenizer):
    """The first step is not timed, so there would be no median."""
    with pytest.raises(ValueError, match="steps must be at least 2"):
        compare(base, tokenizer, [], steps=1, batch_size=4, learning_rate=1e-3, seed=0)

"""The demo's comparison: all methods, each trained alike from the same base, and every figure finite and its own."""

import functools
import gc
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from graphmoe_model.demo.base import make_base, make_tokenizer
from graphmoe_model.demo.comparison import adapted_methods, compare, failed_methods
from graphmoe_model.demo.comparison_report import comparison_section, comparison_table, what_was_measured
from graphmoe_model.demo.fine_tuning import BATCH, demo_recipe, load_base, make_material, score
from graphmoe_model.demo.pretraining import pretrain
from graphmoe_model.demo.stages import ADAPTER, PRESET
from graphmoe_model.demo.task import held_out_questions, training_questions
from graphmoe_model.layers.routed_layer import RoutedLayer
from graphmoe_model.parameters import parameters_by_component
from graphmoe_model.questions.encoding import IGNORED
from graphmoe_model.training import DivergedError
from graphmoe_model.training.models import adapter_config, base_source, load_model

STEPS = 2
BASES = ["LoRA", "DoRA", "MixLoRA", "MixDoRA", "LoRAMoE", "DoRAMoE", "MoLA", "MoDA"]
TITLES = {*BASES, *(f"GraphMoE({base})" for base in BASES[2:])}
METHODS = {method.title: method for method in adapted_methods()}


@pytest.fixture(scope="module")
def held_out():
    return held_out_questions(0, 5)


@pytest.fixture(scope="module")
def material(held_out, tmp_path_factory):
    """A base model that was taught nothing, and more questions than the comparison takes."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(0)
    make_base(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return make_material(folder, folder / "base", training_questions(0, STEPS * BATCH + 3, held_out), held_out)


@pytest.fixture(scope="module")
def ran(material, held_out, tmp_path_factory):
    """One comparison, with what it left behind and every batch that a model was trained on, in order."""
    weights = (material.base / "model.safetensors").read_bytes()
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
        comparison = compare(material, held_out, steps=STEPS, seed=0, say=lambda line: None)
    return SimpleNamespace(
        comparison=comparison,
        batches=batches,
        files=list(folder.iterdir()),
        layers=layers_alive() - layers_before,
        base_kept=(material.base / "model.safetensors").read_bytes() == weights,
    )


def layers_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, RoutedLayer) for thing in gc.get_objects())


def test_every_method_is_there_with_finite_figures(ran):
    """A method that was left out, or a time or a share that is nan, would leave a gap in the table."""
    assert {method.title for method in ran.comparison.methods} == TITLES
    assert len(ran.comparison.methods) == len(TITLES) == 14
    for method in ran.comparison.methods:
        assert 0 <= method.accuracy <= 1
        assert method.step_ms > 0
        assert method.scoring_ms > 0
    assert ran.comparison.base_scoring_ms > 0
    assert ran.comparison.diverged == {}
    assert failed_methods(ran.comparison, learnt=False) == []


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


def recipe_of(title: str, material, output):
    method = METHODS[title]
    return demo_recipe(material, output, method.preset, steps=STEPS, seed=1, logging_steps=1, **method.settings)


@pytest.mark.parametrize("title", METHODS)
def test_a_fresh_adapter_starts_at_the_base(title, material, held_out, ran, tmp_path):
    """All start from the same accuracy, and the table's parameters are those that get trained."""
    recipe = recipe_of(title, material, tmp_path)
    model = load_model(recipe, base_source(recipe))
    base, tokenizer = load_base(material.base)
    expected, found = (score(own, tokenizer, held_out[:1])[0].records for own in (base, model))
    for record, wanted in zip(found, expected, strict=True):
        assert record.label_logprobs == pytest.approx(wanted.label_logprobs, abs=1e-5, rel=1e-5)
    count = sum(parameters_by_component(model).values())
    method = next(method for method in ran.comparison.methods if method.title == title)
    assert method.parameters == count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,}" in next(row for row in comparison_table(ran.comparison).rows if row[0] == title)


@pytest.mark.parametrize("title", METHODS)
def test_the_table_says_what_is_trained(title, material, tmp_path):
    """Method, experts, rank and rounds of the adapter's own configuration, not of the preset that it began with."""
    config, method = adapter_config(recipe_of(title, material, tmp_path).resolved()), METHODS[title]
    assert config.title == title
    assert (config.r, config.lora_alpha, config.lora_dropout) == (method.rank, 2 * method.rank, 0.0)
    if title not in ("LoRA", "DoRA"):
        assert config.num_experts == method.experts
    if title.startswith("GraphMoE"):
        assert (config.rounds, config.gru_hidden_scale) == (3, 0.25)


def test_the_demos_own_adapter_is_among_them(material, tmp_path):
    """Otherwise the two parts of the report are about different settings."""
    own = demo_recipe(material, tmp_path, PRESET, steps=STEPS, seed=1, logging_steps=1, **ADAPTER)
    assert own == recipe_of("GraphMoE(MixLoRA)", material, tmp_path)


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
    assert [row[0] for row in table.rows] == ["base model", *METHODS]
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
    methods = [method._replace(accuracy=0.5) for method in ran.comparison.methods[1:]]
    methods[0] = methods[0]._replace(accuracy=0.2)
    methods[1] = methods[1]._replace(accuracy=0.21)  # within 4.9 points of the base: both may be guessing
    broken = ran.comparison._replace(
        methods=methods, base_accuracy=0.25, questions=400, diverged={"LoRA": "the loss is nan at step 7"}
    )
    quick = failed_methods(broken, learnt=False)
    assert quick == ["LoRA: the loss is nan at step 7"]
    full = failed_methods(broken, learnt=True)
    assert full[:1] == quick
    assert full[1:] == ["DoRA: accuracy 20.0% after training is below the base model's 25.0%."]
    assert "Not in the table is LoRA: the loss is nan at step 7." in comparison_section(broken)


def broken_base(material, folder):
    """The material on a base model whose logits are no numbers."""
    for file in material.base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(math.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return material._replace(base=folder)


def test_a_loss_that_is_not_finite_is_seen(material, held_out, tmp_path, monkeypatch):
    """Trainer's default writes an earlier loss in place of nan, and a diverged method would look trained. The others
    are compared all the same."""
    wrong = broken_base(material, tmp_path)
    monkeypatch.setattr("graphmoe_model.demo.comparison.adapted_methods", lambda: [METHODS["LoRA"], METHODS["MixLoRA"]])
    found = compare(wrong, held_out, steps=STEPS, seed=0, say=lambda line: None)
    assert found.methods == []
    assert list(found.diverged) == ["LoRA", "MixLoRA"]
    assert all("the loss is nan at step 1" in why for why in found.diverged.values())


def test_a_base_model_that_diverges_is_seen(material, tmp_path):
    """Before an adapter is trained on it."""
    model, tokenizer = load_base(broken_base(material, tmp_path).base)
    rows = [{"input_ids": [1, 5, 6], "labels": [IGNORED, IGNORED, 6]}] * 2
    with pytest.raises(DivergedError, match="the loss is nan"):
        pretrain(
            model,
            tokenizer,
            rows,
            title="nan",
            steps=2,
            batch_size=1,
            learning_rate=1e-3,
            seed=0,
            say=lambda line: None,
        )


def test_one_step_is_refused(material, held_out):
    """The first step is not timed, so there would be no median."""
    with pytest.raises(ValueError, match="steps must be at least 2"):
        compare(material, held_out, steps=1, seed=0, say=lambda line: None)


def test_too_few_questions_are_refused(material, held_out):
    """Trainer would show them again, and a method would be asked to learn them by heart."""
    with pytest.raises(ValueError, match="3 steps take 96 questions, got 67"):
        compare(material, held_out, steps=3, seed=0, say=lambda line: None)

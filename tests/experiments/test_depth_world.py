"""Questions of graded depth: right by another solver, no leaks between splits, no label likelier than others."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from experiments.study import depth
from experiments.study.depth_world import CHOICES, make_world, split_chains
from graphmoe_model.questions import Question, QuestionEncoder

MATERIAL = depth.DepthMaterial(training_count=6000)
SPLITS = ("train", "validation", "test")
SEEDS = (0, 1)


def solved(question: Question, sentences: list[str]) -> str:
    """The answer from the sentences' text alone: the innermost "x of y" is replaced until a name is left."""
    told = dict(sentence.split(" is ") for sentence in sentences)
    text = question.question.removesuffix(" is")
    while " of " in text:
        innermost = re.search(r"\w+ of \w+$", text)[0]
        text = text.removesuffix(innermost) + told[innermost]
    return text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_the_only_right_ones(split, seed):
    sentences = MATERIAL.world(seed).sentences()
    for question in MATERIAL.questions("chains", split, seed):
        assert question.choices[question.answer] == solved(question, sentences)
        assert len(set(question.choices)) == CHOICES


@pytest.mark.parametrize("seed", SEEDS)
def test_no_chain_is_in_two_splits(seed):
    """Whatever its choices: they are drawn, so that two different prompts can ask the same."""
    asked = {split: {q.question for q in MATERIAL.questions("chains", split, seed)} for split in SPLITS}
    assert all(asked.values())
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", SPLITS)
def test_each_depth_has_its_share_and_each_place_is_right_equally_often(split, seed):
    questions = MATERIAL.questions("chains", split, seed)
    by_depth = Counter(MATERIAL.group(q) for q in questions)
    assert set(by_depth) == {"depth 1", "depth 2", "depth 3"}
    if split == "train":
        assert max(by_depth.values()) - min(by_depth.values()) <= 1
    for name in by_depth:
        places = Counter(q.answer for q in questions if MATERIAL.group(q) == name)
        assert len(places) == CHOICES
        assert max(places.values()) - min(places.values()) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_no_name_is_right_much_more_often_than_others(seed):
    """Who always answers one name is right as often as chance: relations are permutations."""
    names = Counter(q.choices[q.answer] for q in MATERIAL.questions("chains", "train", seed))
    assert len(names) == MATERIAL.people
    assert max(names.values()) < 1.5 * 6000 / MATERIAL.people


def test_the_depth_that_a_question_names_is_the_number_of_its_facts():
    for question in MATERIAL.questions("chains", "test", 0):
        assert MATERIAL.group(question) == f"depth {question.question.count(' of ')}"


def test_every_relation_leads_everybody_equally_far():
    """What makes chains that were never asked learnable from those that were."""
    world = make_world(0, 9, 4)
    circle = ["ann"]
    by_one = world.facts["boss"]
    while by_one[circle[-1]] != "ann":
        circle.append(by_one[circle[-1]])
    for own in world.facts.values():
        assert sorted(own) == sorted(own.values()) == sorted(world.people)
        for other in world.facts.values():
            assert all(own[other[person]] == other[own[person]] for person in world.people)
    assert len({tuple(own.values()) for own in world.facts.values()}) == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_draws_the_same_again_and_another_one_something_else(seed):
    assert MATERIAL.questions("chains", "test", seed) == MATERIAL.questions("chains", "test", seed)
    assert MATERIAL.world(seed) == MATERIAL.world(seed)
    assert MATERIAL.world(seed) != MATERIAL.world(seed + 1)


def test_names_and_labels_are_one_token_each():
    QuestionEncoder(depth.make_tokenizer()).check_labels(MATERIAL.questions("chains", "train", 0))
    tokenizer = depth.make_tokenizer()
    for question in MATERIAL.questions("chains", "test", 0):
        assert tokenizer.unk_token_id not in tokenizer(question.solved)["input_ids"]
    for sentence in MATERIAL.world(0).sentences():
        assert len(tokenizer(sentence)["input_ids"]) == 5


def test_worlds_that_there_are_no_names_for_are_refused():
    with pytest.raises(ValueError, match="4 to 24 people and 1 to 8 relations, fewer than people, got 25 and 2"):
        make_world(0, 25, 2)
    with pytest.raises(ValueError, match="got 4 and 4"):
        make_world(0, 4, 4)
    with pytest.raises(ValueError, match="got 3 and 1"):
        make_world(0, 3, 1)


def test_a_depth_keeps_at_least_half_of_its_chains_for_training():
    chains = split_chains(make_world(0, 4, 1), 0, (1,), held_out=100)
    assert [len(chains[split]) for split in SPLITS] == [2, 1, 1]


def test_a_base_model_is_made_once_and_knows_where_it_was_killed(tmp_path, monkeypatch):
    """A folder that was being written is made anew: half a base model would be taken for a whole one."""
    tiny = depth.DepthMaterial(people=4, relations=1, depths=(1,), hidden=16, layers=1, base_steps=1, training_count=4)
    calls = []
    original = depth.pretrain

    def interrupted(*arguments, **options):
        calls.append(1)
        original(*arguments, **options)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(depth, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.base(0, tmp_path)
    base = tiny.base(0, tmp_path)
    assert tiny.base(0, tmp_path) == base
    assert len(calls) == 2
    assert tiny.base(1, tmp_path) != base

"""Splits of our own: what is nearly the same stays together, and the splits depend on nothing but the questions."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re

import pytest
from hypothesis import strategies as st

from graphmoe_model.fetching.rows import read_headlines, read_quartz, read_social_iqa
from graphmoe_model.fetching.splits import groups_of_alike, own_splits
from graphmoe_model.questions import Question
from tests.drawing import make_draws
from tests.model.index_stand_in import STATEMENTS


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) or {text}


def alike(a: str, b: str) -> bool:
    """The definition, pair by pair: half of the words that either has are in both."""
    return 2 * len(words(a) & words(b)) >= len(words(a) | words(b))


def groups_by_definition(texts: list[str]) -> set[frozenset[int]]:
    groups = [{i} for i in range(len(texts))]
    for i, j in itertools.combinations(range(len(texts)), 2):
        if alike(texts[i], texts[j]):
            (a,) = (group for group in groups if i in group)
            (b,) = (group for group in groups if j in group)
            if a is not b:
                groups.remove(b)
                a |= b
    return {frozenset(group) for group in groups}


def check_groups(texts: list[str]) -> None:
    found = groups_of_alike(texts)
    members = {frozenset(i for i, own in enumerate(found) if own == group) for group in found}
    assert members == groups_by_definition(texts)


TEXTS = st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=7).map(" ".join), max_size=9)


def test_groups_are_those_of_the_definition():
    """The filter by rare words is there for speed, and may leave out no pair."""
    make_draws(check_groups, TEXTS, examples=150, seed=61)


@pytest.mark.slow
def test_many_groups():
    make_draws(check_groups, TEXTS, examples=2000, seed=2)


def questions() -> list[Question]:
    """Pairs that differ in one word, and contexts with two questions."""
    made = [Question(f"{text}, it {how}", ("more", "less"), 0) for text in STATEMENTS for how in ("rose", "sank")]
    contexts = [f"By day{i} some{i} of{i} them{i} met{i}." for i in range(40)]
    return made + [Question(asked, ("a", "b"), 1, context) for context in contexts for asked in ("Why?", "How so?")]


def test_what_is_alike_is_in_one_split():
    splits = own_splits(questions())
    assert sum(map(len, splits.values())) == len(questions())
    for a, b in itertools.combinations(splits, 2):
        texts = [[q.context or q.question for q in splits[split]] for split in (a, b)]
        assert not {*texts[0]} & {*texts[1]}
        assert not any(alike(x, y) for x, y in itertools.product(*texts))


def test_splits_have_their_shares():
    """Of groups: 70, 10 and 20 percent, as far as the hash is even."""
    many = [Question(f"w{i}x w{i}y w{i}z?", (f"w{i}p", f"w{i}q"), 0) for i in range(2000)]
    sizes = {split: len(own) / 2000 for split, own in own_splits(many).items()}
    assert sizes == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.03)


def test_splits_do_not_depend_on_the_order():
    shuffled = questions()
    random.Random(0).shuffle(shuffled)
    for split, own in own_splits(questions()).items():
        assert set(own) == set(own_splits(shuffled)[split])


def test_splits_are_the_same_on_every_machine():
    """By their bytes: another version of Python, another system and another seed of its hashes give these."""
    text = json.dumps({split: [(q.context, q.question) for q in own] for split, own in own_splits(questions()).items()})
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "aa0fe52f60ec263839867260c4296b4755c30d149bc5519af57c20300371cf79"
    )


def row(content: object, ideal: object = "A") -> bytes:
    return json.dumps({"input": [{"role": "user", "content": content}], "ideal": ideal}).encode()


@pytest.mark.parametrize("read", [read_quartz, read_social_iqa])
@pytest.mark.parametrize(
    "line, told",
    [
        (b'{"ideal": "A"}', "'input' with a message's 'content' and 'ideal' are expected"),
        (b'{"input": [], "ideal": "A"}', "'input' with a message's 'content' and 'ideal' are expected"),
        (row("No choices."), "no question with choices A, B, ...: 'No choices.'"),
        (row(3), "'content' must be a text, got 3"),
        (row(" "), "'content' must be a text, got ' '"),
    ],
)
def test_rows_of_another_form_are_refused(read, line, told, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(line)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 1: {re.escape(told)}"):
        read(path)


def test_an_answer_outside_the_choices_is_refused(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(row("It is\n\n A: hot\n B: cold", "C"))
    with pytest.raises(ValueError, match="line 1: 'ideal' must be one of A, B, got 'C'"):
        read_quartz(path)


def test_the_last_question_is_the_question(tmp_path):
    """A context may ask and may have lines; choices may have semicolons."""
    path = tmp_path / "rows"
    path.write_bytes(row("Kim asked: Why me?\n\nLou left. What will Kim do? A: go; now; B: stay; C: call Mr. X.", "B"))
    (question,) = read_social_iqa(path)
    assert question == Question(
        "What will Kim do?", ("go; now", "stay", "call Mr. X"), 1, "Kim asked: Why me?\n\nLou left."
    )


def test_a_headline_is_a_joke_or_not(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    path.write_bytes(b"\n".join([row("Area man sits", "1"), row("Rain", "0"), row("Rain", "1"), row("Sun", "0")]))
    assert [(q.context, q.label) for q in read_headlines(path)] == [
        ("Area man sits", "yes"),
        ("Rain", "no"),
        ("Sun", "no"),
    ]
    monkeypatch.setattr("graphmoe_model.fetching.rows.HEADLINES", 2)
    assert [q.context for q in read_headlines(path)] == ["Area man sits", "Rain"]
    path.write_bytes(row("Rain", "2"))
    with pytest.raises(ValueError, match="line 1: 'ideal' must be 0 or 1, got '2'"):
        read_headlines(path)

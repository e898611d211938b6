"""Load and way of tokens through an adapter: what is counted is what the equations choose, padding left out."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch
from torch import Tensor

from graphmoe_model.analysis.balance import round_balances, task_balance
from graphmoe_model.analysis.prompts import batches, read_prompts
from graphmoe_model.analysis.routers import check_routers, mlp_routers
from graphmoe_model.analysis.specialisation import round_index, specialisation
from graphmoe_model.analysis.trace import chosen, trace_prompts
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.routing.token_choices import collect_choices
from tests.model.method_models import LINEARS, adapted, randomise
from tests.model.method_oracles import by_equations
from tests.model.questions_made import byte_level
from tests.model.tiny_models import tiny_model, tiny_peft_model, tokens

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (9, 4, 7, 5, 11)]
FORMS = {"mixlora": 1, "graphmoe-mixlora": 3, "graphmoe-mola": 3, "graphmoe-loramoe": 2, "mola": 1}


def routed_model(form: str) -> torch.nn.Module:
    """An fp64 model with an adapter whose routers decide clearly."""
    torch.manual_seed(3)
    model = adapted(form, rounds=FORMS[form]).double()
    randomise(model)
    return model.eval()


def by_hooks(model: torch.nn.Module, prompts: list[list[int]]) -> dict[str, Tensor]:
    """Router of an MLP -> its logits [T, N, n] by the equations, of what forward hooks saw go in, prompt by prompt."""
    seen: dict[str, list[Tensor]] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedGraphMoEFFN)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]))
        found = {}
        for name, layer in layers.items():
            logits: list[Tensor] = []
            by_equations(layer, torch.cat(seen[name]), logits)
            config = layer.lora_graphmoe["default"].config
            own = name[name.index("model.layers") :]
            names = [own] if config.method == "mixlora" else [f"{own}.{linear}" for linear in LINEARS]
            for i, router in enumerate(names):
                found[router] = torch.stack(logits[i :: len(names)])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_balance_equals_a_count_by_hooks(form):
    """Of every round and router; where every token has all experts, of the routing probability."""
    found = task_balance(routed_model(form), "adapter", "task", PROMPTS, batch_size=2)
    logits = by_hooks(routed_model(form), PROMPTS)
    expected = {}
    for name, own in logits.items():
        if "loramoe" in form:
            expected[name] = own.softmax(-1).mean(1)
        else:
            ids = own.topk(2).indices
            counts = torch.stack([torch.bincount(i.flatten(), minlength=4) for i in ids])
            expected[name] = counts.double() / ids[0].numel()
    assert found.tokens == sum(map(len, PROMPTS))
    assert set(expected) <= set(found.shares)
    assert len(found.rounds) == FORMS[form]
    for name, shares in expected.items():
        counted = torch.tensor(found.shares[name], dtype=torch.float64)
        torch.testing.assert_close(counted, shares, atol=1e-9, rtol=0)
    for i, balance in enumerate(found.rounds):
        shares = torch.stack([own[i].double() for own in expected.values()])  # [routers, n]
        assert balance.deviation == pytest.approx(shares.std(dim=1, correction=0).mean().item())
        assert balance.variation == pytest.approx(4 * balance.deviation)
        assert balance.largest == pytest.approx(shares.max(dim=1).values.mean().item())
        assert balance.smallest == pytest.approx(shares.min(dim=1).values.mean().item())
        assert balance.unused == int((shares == 0).sum())


def test_routers_of_attention_stand_apart():
    """They run once whatever the rounds: among the rounds they would count as a first one."""
    found = task_balance(routed_model("graphmoe-mola"), "adapter", "task", PROMPTS, batch_size=5)
    apart = {name: own for name, own in found.shares.items() if "self_attn" in name}
    assert len(apart) == 8
    assert {len(own) for own in apart.values()} == {1}
    assert found.attention == round_balances(apart)[0]
    assert task_balance(routed_model("mixlora"), "a", "t", PROMPTS, batch_size=5).attention is None
    assert found.as_dict()["attention"]["deviation"] == found.attention.deviation


def test_balance_by_hand():
    (even,) = round_balances({"a": [[0.25] * 4]})
    assert tuple(even) == (0, 0, 0.25, 0.25, 0)
    (mixed,) = round_balances({"a": [[1.0, 0.0]], "b": [[0.5, 0.25, 0.25, 0.0]]})
    deviations = [0.5, math.sqrt((0.25**2 + 0.25**2) / 4)]
    assert mixed.deviation == pytest.approx(fmean(deviations))
    assert mixed.variation == pytest.approx(fmean([2 * deviations[0], 4 * deviations[1]]))
    assert (mixed.largest, mixed.smallest, mixed.unused) == (0.75, 0, 2)


@pytest.mark.parametrize("form", [form for form, rounds in FORMS.items() if rounds > 1])
def test_a_trace_equals_choices_by_hooks(form):
    """Each token's experts in each round by falling probability, in the order of the text."""
    trace = trace_prompts(routed_model(form), byte_level(), PROMPTS, 2, draws=3)
    logits = by_hooks(routed_model(form), PROMPTS)
    k = 4 if "loramoe" in form else 2
    first = len(PROMPTS[0])
    assert list(trace.routers) == list(trace.by_router) == list(logits)
    assert (trace.texts, trace.num_tokens, len(trace.tokens)) == (5, sum(map(len, PROMPTS)), first)
    for name, own in logits.items():
        probabilities, ids = own[:, :first].softmax(-1).topk(k)
        assert trace.routers[name].experts == ids.tolist()
        assert trace.routers[name].num_experts == 4
        shown = torch.tensor(trace.routers[name].probabilities, dtype=torch.float64)
        torch.testing.assert_close(shown, probabilities, atol=6e-5, rtol=0)
    compared = {name: own.topk(1 if k == 4 else 2).indices for name, own in logits.items()}
    expected, overall = specialisation(compared, dict.fromkeys(compared, 4), draws=3)
    assert trace.by_router == expected
    assert trace.overall == overall
    assert overall.information == pytest.approx(fmean(own.information for own in expected.values()))


def test_padding_is_no_token_and_batches_do_not_matter():
    model = routed_model("graphmoe-mixlora")
    kept = []
    for size in (1, 3, 5):
        with collect_choices(model) as choices:
            read_prompts(model, PROMPTS, size)
        kept.append(choices.ids())
    for other in kept[1:]:
        assert all(torch.equal(kept[0][name], other[name]) for name in kept[0])
    told: list[tuple[int, int]] = []
    read_prompts(model, PROMPTS, 2, lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    rows = list(batches(PROMPTS, 2, torch.device("cpu")))
    assert [row["attention_mask"].sum(1).tolist() for row in rows] == [[9, 4], [7, 5], [11]]


def test_an_adapter_of_other_rounds_in_one_collection_is_named():
    model = tiny_peft_model(rounds=2).eval()
    model.add_adapter("other", tiny_peft_model(rounds=3).peft_config["default"])
    with collect_choices(model):
        read_prompts(model, PROMPTS[:1], 1)
        model.set_adapter("other")
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp ran with other rounds"):
            read_prompts(model, PROMPTS[:1], 1)


def test_models_without_routers_are_named():
    with pytest.raises(TypeError, match="no GraphMoE layer"):
        mlp_routers(tiny_model())
    with pytest.raises(ValueError, match="no MLP of this model has a router"):
        mlp_routers(adapted("lora"))
    with pytest.raises(ValueError, match=r"--router x: there is no such router; there are a, b"):
        check_routers(["x"], ["a", "b"])


def test_the_index_by_hand():
    """1 where every round has experts of its own, 0 where all rounds share alike, and between them the information."""
    assert round_index(torch.tensor([[[0], [1]], [[2], [3]]]), 4) == pytest.approx(1)
    assert round_index(torch.tensor([[[0], [1]], [[1], [0]]]), 4) == 0
    assert round_index(torch.zeros(3, 5, 1, dtype=torch.long), 1) == 0
    assert round_index(torch.tensor([[[0, 1]], [[1, 0]]]), 2) == 0  # every token has all experts
    # Round 1: expert 0 twice; round 2: experts 0 and 1. I = H(E) - H(E | T) = H(3/4, 1/4) - H(1/2, 1/2) / 2.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert round_index(torch.tensor([[[0], [0]], [[0], [1]]]), 8) == pytest.approx(entropy / math.log(2))


# What each round's tokens go to, n, and the index: I = H(E) - H(E | T), where H(E | T) is log 2.
PAIRS = {
    "T k <= n": ([[0, 1], [2, 3]], 5, 1.0),
    "each expert in two rounds": ([[0, 1], [1, 2], [2, 0]], 3, 1.0),
    # H(1/3, 1/3, 1/6, 1/6) is log 3 + log(2) / 3, and the most log(4 / 2).
    "T k no multiple of n": ([[0, 1], [0, 1], [2, 3]], 4, (math.log(3) - math.log(2) * 2 / 3) / math.log(2)),
    # H(1/2, 1/4, 1/4) is log(2) 3/2, and the most log T.
    "one expert of two shared": ([[0, 1], [0, 2]], 8, 0.5),
}


@pytest.mark.parametrize("case", PAIRS)
def test_the_index_of_two_experts_per_token_by_hand(case):
    """The most that two different experts per token and round leave is 1, whatever the number of tokens."""
    rounds, num_experts, expected = PAIRS[case]
    ids = torch.tensor(rounds)[:, None].expand(-1, 7, -1)  # [T, 7, 2]
    assert round_index(ids, num_experts) == pytest.approx(expected)


@pytest.mark.parametrize("T, num_experts, k", [(3, 4, 2), (3, 4, 3), (2, 8, 2), (4, 6, 2), (2, 3, 2)])
def test_the_index_passes_1_nowhere(T, num_experts, k):
    """Of all ways that send a round's tokens to the same experts."""
    sets = list(itertools.combinations(range(num_experts), k))
    every = itertools.combinations_with_replacement(sets, T)
    largest = max(round_index(torch.tensor(own)[:, None], num_experts) for own in every)
    if T * k <= num_experts or T * k % num_experts == 0:
        assert largest == pytest.approx(1)
    else:
        assert 0.8 < largest < 0.999


def test_the_null_distribution_is_that_of_all_permutations():
    """Mean and p of many draws against those of every way to deal each token's choices out, the routers together."""
    ids = {"a": torch.tensor([[[0], [0], [1]], [[1], [2], [1]]]), "b": torch.tensor([[[0], [1], [1]], [[1], [0], [0]]])}
    all_orders = [torch.tensor(own).T for own in itertools.product([(0, 1), (1, 0)], repeat=3)]  # each [T, N]
    exact = {name: [round_index(own, 3, order) for order in all_orders] for name, own in ids.items()}
    each, overall = specialisation(ids, {"a": 3, "b": 3}, draws=4000)
    for name, own in each.items():
        observed = round_index(ids[name], 3)
        assert own.information == pytest.approx(observed)
        assert own.null_mean == pytest.approx(fmean(exact[name]), abs=0.02)
        assert own.p == pytest.approx(fmean(value >= observed - 1e-9 for value in exact[name]), abs=0.03)
    together = [fmean(pair) for pair in zip(*exact.values(), strict=True)]
    assert overall.null_mean == pytest.approx(fmean(together), abs=0.02)
    assert overall.p == pytest.approx(fmean(v >= overall.information - 1e-9 for v in together), abs=0.03)
    assert each["a"].kept == pytest.approx(1 / 3)


def test_rounds_that_do_not_matter_are_within_chance_and_those_that_do_are_not():
    generator = torch.Generator().manual_seed(0)
    alike = torch.randint(8, (3, 400, 2), generator=generator)
    (by_chance,) = specialisation({"a": alike}, {"a": 8}, draws=200)[0].values()
    assert by_chance.information <= by_chance.null_95 * 1.5
    assert by_chance.p > 0.01
    moved = alike.clone()
    moved[2, :100] = 0  # a quarter of the last round's tokens go to one expert
    (specialised,) = specialisation({"a": moved}, {"a": 8}, draws=200)[0].values()
    assert specialised.p == pytest.approx(1 / 201)
    assert specialised.information > 3 * specialised.null_95
    assert specialisation({"a": alike}, {"a": 8}, draws=50, seed=1) == specialisation(
        {"a": alike}, {"a": 8}, draws=50, seed=1
    )


def test_what_cannot_be_compared_is_refused():
    one = torch.zeros(1, 4, 2, dtype=torch.long)
    two = torch.zeros(2, 4, 2, dtype=torch.long)
    for choices, message in [
        ({"a": one}, "there is one round"),
        ({}, "at least one"),
        ({"a": two, "b": one}, "all with the same rounds"),
        ({"a": two[:, :0]}, "at least one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            specialisation(choices, dict.fromkeys(choices, 4))
    with pytest.raises(ValueError, match="at least one token and one draw"):
        specialisation({"a": two}, {"a": 4}, draws=0)


def test_where_every_expert_is_there_the_first_one_is_the_choice():
    ids = torch.tensor([[[2, 0, 1]]])
    assert chosen(ids, 3).tolist() == [[[2]]]
    assert chosen(ids, 4).tolist() == ids.tolist()

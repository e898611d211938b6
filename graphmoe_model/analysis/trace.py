"""Which experts the tokens of a text visit, round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graphmoe_model.analysis.prompts import read_prompts
from graphmoe_model.analysis.routers import mlp_routers, of_mlps
from graphmoe_model.analysis.specialisation import Specialisation, specialisation
from graphmoe_model.routing.token_choices import TokenChoices, collect_choices


class RouterTrace(NamedTuple):
    """What one router did with the tokens of a text.

    Attributes:
        num_experts: n.
        experts: [T, N, k], by falling probability.
        probabilities: [T, N, k], of the softmax over all experts.
    """

    num_experts: int
    experts: list[list[list[int]]]
    probabilities: list[list[list[float]]]


class Trace(NamedTuple):
    """Where the tokens of a text went, and how much all texts' experts specialise by round.

    Attributes:
        tokens: of the first text, as text.
        routers: router name -> what it did with these tokens. Those of the MLPs alone, as no others have rounds.
        by_router: router name -> the specialisation over the tokens of all texts.
        overall: that of all routers together.
        texts, num_tokens: how many there were in all.
    """

    tokens: list[str]
    routers: dict[str, RouterTrace]
    by_router: dict[str, Specialisation]
    overall: Specialisation
    texts: int
    num_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "texts": self.texts,
            "num_tokens": self.num_tokens,
            "specialisation": self.overall.as_dict(),
            "specialisation_by_router": {name: own.as_dict() for name, own in self.by_router.items()},
            "tokens": self.tokens,
            "routers": {name: own._asdict() for name, own in self.routers.items()},
        }


def trace_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    *,
    draws: int,
    seed: int = 0,
    reading: Callable[[int, int], None] | None = None,
    drawing: Callable[[int, int], None] | None = None,
) -> Trace:
    """Follow the tokens of prompts through the rounds of an adapter.

    Where every token goes to every expert (LoRAMoE), the specialisation is that of the expert with the largest
    probability.

    Args:
        model: with an adapter that has routers and at least two rounds.
        tokenizer: of that model, to show tokens as text.
        prompts: token ids of each; the first one's choices are kept token by token.
        batch_size: prompts per forward.
        draws, seed: of the null distribution.
        reading, drawing: are told how many of how many prompts are read, and draws done.

    Raises:
        TypeError: the model has no GraphMoE layer.
        ValueError: the adapter has one round, or no MLP of it has a router.
    """
    routers = mlp_routers(model)
    with collect_choices(model) as collected:
        read_prompts(model, prompts, batch_size, reading)
    choices = of_mlps(collected.ids(), routers)
    compared = {name: chosen(ids, collected.num_experts[name]) for name, ids in choices.items()}
    by_router, overall = specialisation(compared, collected.num_experts, draws=draws, seed=seed, progress=drawing)
    return Trace(
        tokens=[str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in prompts[0]],
        routers=_of_first(collected, choices, len(prompts[0])),
        by_router=by_router,
        overall=overall,
        texts=len(prompts),
        num_tokens=sum(map(len, prompts)),
    )


def chosen(ids: Tensor, num_experts: int) -> Tensor:
    """Return what of [T, N, k] is a choice: all, or the first one where every expert is there."""
    return ids[..., :1] if ids.shape[-1] == num_experts else ids


def _of_first(collected: TokenChoices, choices: Mapping[str, Tensor], tokens: int) -> dict[str, RouterTrace]:
    probabilities = collected.probabilities()
    return {
        name: RouterTrace(
            collected.num_experts[name],
            ids[:, :tokens].tolist(),
            [[[round(p, 4) for p in row] for row in own] for own in probabilities[name][:, :tokens].tolist()],
        )
        for name, ids in choices.items()
    }

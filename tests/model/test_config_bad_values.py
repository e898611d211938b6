"""What no GraphMoEConfig may hold: refused at once with the value and what was expected, whatever was drawn."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from peft import get_peft_model

from graphmoe_kernels.validation import shown
from graphmoe_model import GraphMoEConfig
from tests.model.attaching import snapshot
from tests.model.tiny_models import logits, tiny_config, tiny_model

MODEL = tiny_model()
PATTERN = "must be a dict from a module's name or a regular expression to a number, got "

BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"rank_pattern": None}, f"rank_pattern {PATTERN}None; leave it out"),
    ({"rank_pattern": []}, f"rank_pattern {PATTERN}[]"),
    ({"alpha_pattern": None}, f"alpha_pattern {PATTERN}None"),
    ({"alpha_pattern": "mlp"}, f"alpha_pattern {PATTERN}'mlp'"),
    ({"rank_pattern": {3: 4}}, "rank_pattern: the key 3 is no module's name; expected text, such as 'mlp'"),
    ({"rank_pattern": {"": 4}}, "rank_pattern: the key '' is no module's name"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is no regular expression (missing ), unterminated subpattern"),
    ({"alpha_pattern": {"*mlp": 4}}, "alpha_pattern: '*mlp' is no regular expression"),
    ({"rank_pattern": {"mlp": 2.0}}, "rank_pattern['mlp'] must be an integer of at least 1, got 2.0"),
    ({"target_modules": "("}, "target_modules: '(' is no regular expression"),
    ({"target_modules": 3}, "target_modules must be a regular expression, or a list of module names, got 3"),
    ({"target_modules": ["mlp", 3]}, "target_modules must be a regular expression, or a list of module names"),
    ({"target_modules": [["mlp"]]}, "target_modules must be a regular expression, or a list of module names"),
    ({"exclude_modules": "["}, "exclude_modules: '[' is no regular expression"),
    ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern: '(' is no regular expression"),
    ({"layers_to_transform": []}, "layers_to_transform must be a layer's index from 0 on or a list of them, got []; "),
    ({"layers_to_transform": -1}, "a layer's index from 0 on or a list of them, got -1"),
    ({"layers_to_transform": True}, "a layer's index from 0 on or a list of them, got True"),
    ({"layers_to_transform": "0"}, "a layer's index from 0 on or a list of them, got '0'"),
    ({"layers_to_transform": [0, "1"]}, "a layer's index from 0 on or a list of them, got [0, '1']"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of module names, such as ['lm_head'], got 'lm_he"),
    ({"modules_to_save": [""]}, "modules_to_save must be a list of module names"),
    ({"modules_to_save": ["lm_head("]}, "modules_to_save: 'lm_head(' is no regular expression"),
    ({"trainable_token_indices": []}, "trainable_token_indices of the input embeddings must be a list of ids from 0"),
    ({"trainable_token_indices": {}}, "trainable_token_indices must be a list of token ids, or a dict from an embeddi"),
    ({"trainable_token_indices": [1, -1]}, "must be a list of ids from 0 on, got [1, -1]"),
    ({"trainable_token_indices": [1, 2.0]}, "must be a list of ids from 0 on, got [1, 2.0]"),
    ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices of embed_tokens must be a list of ids"),
    ({"trainable_token_indices": [1, 2, 1]}, "trainable_token_indices of the input embeddings names a token twice"),
    ({"rounds": 10**9}, "rounds must be at most 100 (every round runs the layer again and keeps its activati"),
    ({"rounds": 10**5000}, "keeps its activations), got an integer of thousands of digits"),
    ({"r": 10**18}, "r must be at most 65536 (no layer is that wide), got 1000000000000000000"),
    ({"num_experts": 10**9}, "num_experts must be at most 65536 a layer, got 1000000000"),
    ({"num_experts": "2-" + "9" * 5000}, "num_experts='2-99999999"),
    ({"top_k": 10**9}, "top_k must be at most 65536"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a number that is positive, got 1000000"),
    ({"alpha_pattern": {"mlp": float("nan")}}, "alpha_pattern['mlp'] must be a number that is positive, got nan"),
    ({"gru_hidden_scale": 1e9}, "gru_hidden_scale must be a number that is positive and at most 16, got 1000000000.0"),
    ({"inference_mode": "no"}, "inference_mode must be True or False, got 'no'"),
]  # fmt: skip


@pytest.mark.parametrize(
    "values, message", BAD_VALUES, ids=[f"{i} {'+'.join(v)}" for i, (v, _) in enumerate(BAD_VALUES)]
)
def test_a_bad_value_is_refused(values, message):
    """At construction, and when it is put in afterwards, where the model stays as it was."""
    with pytest.raises(ValueError, match=re.escape(message)):
        GraphMoEConfig(**values)
    config, model = tiny_config(), MODEL
    for name, value in values.items():
        setattr(config, name, value)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, config)
    assert snapshot(model) == before


def test_long_values_are_cut_in_messages():
    """A message is read by a person: not ten thousand digits, nor Python's own error about them."""
    assert shown("x" * 10_000) == repr("x" * 10_000)[:80] + "... (10002 characters)"
    assert shown(10**5000) == "an integer of thousands of digits"


# --- a router without a gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {},
            r"top_k=1 with norm_topk_prob=True: .* no gradient but rounding noise.*set top_k=2 or more \(norm",
        ),
        ({"method": "mola"}, r"set top_k=2 or more, or norm_topk_prob=False$"),
    ],
)
def test_one_normalised_expert_is_warned_of(values, message):
    """The one chosen weight divided by itself is 1: nothing of the model's loss reaches the router."""
    with pytest.warns(UserWarning, match=message) as caught:
        GraphMoEConfig(top_k=1, **values)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2},
        {"top_k": 1, "norm_topk_prob": False},
        {"top_k": 1, "num_experts": 1},
        {"method": "lora"},
        {"top_k": 1, "inference_mode": True},
    ],
    ids=str,
)
def test_other_routers_are_not_warned_of(values):
    """Two experts, unnormalised weights, no choice at all, no router, no training."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraphMoEConfig(**values)


@pytest.mark.filterwarnings("ignore:top_k=1 with norm_topk_prob")
@pytest.mark.parametrize(
    "values, trains", [({"top_k": 1}, False), ({"top_k": 2}, True), ({"norm_topk_prob": False}, True)]
)
def test_the_warning_is_right(values, trains):
    """MoLA's routers get a gradient of the model's loss in all cases but the one that is warned of."""
    settings = {"method": "mola", "router_aux_loss_coef": 0.0, "init_lora_weights": False, "top_k": 1, **values}
    model = get_peft_model(tiny_model(), tiny_config(**settings)).train()
    ids = logits(model).argmax(-1)
    model(input_ids=ids, labels=ids).loss.backward()
    largest = {True: 0.0, False: 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            of_router = name.endswith("router.weight")
            largest[of_router] = max(largest[of_router], parameter.grad.abs().max().item())
    assert (largest[True] > 1e-5 * largest[False]) == trains

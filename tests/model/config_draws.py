"""Keyword arguments of `GraphMoEConfig`: values that a person could mean for every field, and values of any kind."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from graphmoe_model import GraphMoEConfig

FIELDS = sorted(f.name for f in fields(GraphMoEConfig) if f.init)

NEAR: dict[str, list[Any]] = {
    "task_type": ["CAUSAL_LM", None, "SEQ_CLS"],
    "r": [1, 2, 3, 16, 64],
    "lora_alpha": [1, 0.5, 7, 64],
    "lora_dropout": [0, 0.0, 0.5, 0.999],
    "use_rslora": [True, False],
    "use_dora": [True, False],
    "init_lora_weights": [True, False, "gaussian"],
    "inference_mode": [True, False],
    "target_modules": [
        *(None, ["mlp"], ["mlp", "q_proj"], ["mlp", "lm_head"], ["q_proj"], ["gate_proj"], ["mlp", "gate_proj"]),
        *({"mlp", "v_proj"}, "mlp", r".*\.mlp", r".*\.(mlp|o_proj)", "all-linear", ["model.layers.0.mlp"], ["nothing"]),
    ],
    "exclude_modules": [None, ["q_proj"], ["mlp"], ["model.layers.0.mlp"], r".*\.1\..*", "", ["nothing"]],
    "layers_to_transform": [None, 0, 1, 5, [0], [0, 1], [1, 1], [], [0, 7], (1,)],
    "layers_pattern": [None, "layers", ["layers"], "blocks", "", []],
    "rank_pattern": [
        {},
        {"mlp": 2},
        {"q_proj": 3},
        {"nothing": 4},
        {r"layers\.1\..*": 2},
        {"mlp": 0},
        {3: 4},
        {"(": 2},
    ],
    "alpha_pattern": [{}, {"mlp": 2.5}, {"q_proj": 3}, {"nothing": 4}, {"mlp": -1}, {"mlp": "2"}, {"*": 2}],
    "modules_to_save": [None, [], ["lm_head"], ["embed_tokens"], ["norm"], ["nothing"], ["router"], "lm_head", ["mlp"]],
    "trainable_token_indices": [None, [1, 2], [0], [63], [64], [-1], {"embed_tokens": [3]}, {"lm_head": [3]}, [1, 1]],
    "method": ["mixlora", "lora", "loramoe", "mola"],
    "num_experts": [None, 1, 2, 3, 8, [2, 3], [3], [2, 2, 2], "2-3", "1-2", "2-3-4", "4", "03-2", "2-", []],
    "top_k": [None, 1, 2, 3, 8],
    "rounds": [None, 1, 2, 4],
    "gru_hidden_scale": [0.1, 1, 1.5, 1 / 32, 0.001, 1e-9],
    "candidate_input": ["expert_output", "hidden_state"],
    "candidate_activation": ["sigmoid", "tanh"],
    "norm_topk_prob": [True, False],
    "router_aux_loss_coef": [None, 0, 0.0, 0.01, 1, 1e300],
    "router_aux_loss": ["paper", "switch"],
    "router_aux_loss_scope": ["local", "global"],
    "fold": ["auto", "always", "never"],
    "backend": ["auto", "torch", "triton"],
    "base_model_name_or_path": [None, "some/model"],
    "revision": [None, "main"],
}

WILD: list[Any] = [
    *(None, True, False, 0, -1, 10**18, 10**400, 10**5000, 0.5, -0.5, 1e308, float("nan"), float("inf"), 1j),
    *("", "x", "(", "None", "1", "mlp", "\0", "é", b"mlp", [], [None], [3], ["("], [[]], ["mlp", 3], (), set(), {}),
    *({"mlp": None}, {None: 1}, {"(": 1}, {"": 2}, {"mlp": 10**400}, object(), int, range(3)),
]


@st.composite
def settings(draw: Any) -> dict[str, Any]:
    """Values for up to five fields, most of them near to what the field takes."""
    names = draw(st.lists(st.sampled_from([*NEAR, *NEAR, *FIELDS]), max_size=5, unique=True))
    return {
        name: draw(st.sampled_from(NEAR[name] if name in NEAR and draw(st.integers(0, 3)) else WILD)) for name in names
    }

"""How much memory a GPU needs for a training step: arithmetic for what is held, the model's own code for the rest."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from graphmoe_kernels.cost import Sizes, fold_bytes
from graphmoe_model.base_models import adapted_on_meta
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.memory.activations import Activations, step_activations
from graphmoe_model.memory.parameter_counts import ParameterCounts, count_parameters
from graphmoe_model.memory.strategies import gathered_in_layer, gathered_in_loss, held
from graphmoe_tables.strategies import STRATEGIES, Sharding, Strategy, check_run, check_strategies

COMPONENTS = (
    *("base weights", "adapter weights", "gradients", "optimizer state", "buffers"),
    *("gathered weights", "activations"),
)


class Memory(NamedTuple):
    """Bytes on one GPU in a training step, at the moment when they are most.

    Attributes:
        components: all of `COMPONENTS`.
        kept_folds: what the layers keep besides in evaluation, where there are no activations to speak of.
    """

    components: dict[str, int]
    kept_folds: int

    @property
    def total(self) -> int:
        """The peak in training."""
        return sum(self.components.values())


def memory_per_gpu(
    config: GraphMoEConfig,
    model_config: Any,
    strategies: Sequence[str] = tuple(STRATEGIES),
    *,
    gpus: int = 8,
    tokens: int = 4096,
    checkpointing: bool = True,
    loss_tokens: int | None = None,
) -> dict[str, Memory]:
    """Compute the bytes that training an adapter takes on each GPU, by strategy.

    Counted are AdamW and bf16 mixed precision (a frozen base in bf16 or 4 bits, adapters and moments in fp32). Not
    counted: CUDA's context, NCCL's buffers, what the allocator holds in reserve, and what a kernel takes for itself
    while it runs: leave 2 to 4 GB.

    Args:
        config: the adapter's.
        model_config: of a causal language model of Transformers.
        strategies: names of `STRATEGIES`.
        gpus: how many processes there are; ``"single"`` has one.
        tokens: of each GPU in one forward.
        checkpointing: whether each decoder layer is run again in the backward pass.
        loss_tokens: of how many of the ``tokens`` there are logits and a loss; None for all of them.

    Raises:
        ValueError: an unknown strategy, fewer than one GPU or two tokens, more tokens in the loss than there are, or
            what `adapted_on_meta` refuses.
    """
    check_strategies(strategies)
    check_run(gpus, tokens, loss_tokens)
    model = adapted_on_meta(config, model_config).model
    found, folds = count_parameters(model), _kept_folds(model)
    activations = step_activations(
        lambda layers: _model_of(config, model_config, layers), tokens, checkpointing, loss_tokens or tokens
    )
    return {name: _memory(STRATEGIES[name], found, activations, folds, gpus) for name in strategies}


def _memory(strategy: Strategy, found: ParameterCounts, activations: Activations, folds: int, gpus: int) -> Memory:
    moments = (
        (gathered_in_loss(strategy, found), activations.in_loss),
        (gathered_in_layer(strategy, found), activations.in_layer),
    )
    gathered, own = max(moments, key=sum)
    components = held(strategy, found, 1 if strategy.sharding == Sharding.none else gpus)
    components |= {"gathered weights": gathered, "activations": found.layers * activations.layer + own}
    return Memory(components, 0 if strategy.shards_weights else folds)


def _model_of(config: GraphMoEConfig, model_config: Any, layers: int) -> PeftModel:
    """Build a model of so many layers, each with as many experts as the largest has, in the dtype it computes in."""
    config, model_config = copy.deepcopy(config), copy.deepcopy(model_config)
    config.num_experts = max(config.expert_counts())
    model_config.num_hidden_layers = layers
    return adapted_on_meta(config, model_config).model.to(torch.bfloat16)


def _kept_folds(model: PeftModel) -> int:
    """Add up the bytes of all layers' folds in evaluation, in bf16."""
    return sum(_fold_bytes(layer) for layer in model.modules() if isinstance(layer, FusedGraphMoEFFN))


def _fold_bytes(layer: FusedGraphMoEFFN) -> int:
    adapter: Any
    (adapter,) = layer.lora_graphmoe.values()
    config: GraphMoEConfig = adapter.config
    sizes = Sizes(
        hidden=layer.traits.hidden,
        intermediate=layer.traits.intermediate,
        gru_width=config.gru_width(layer.traits.hidden),
        experts=adapter.num_experts,
        top_k=min(config.top_k, adapter.num_experts),
        rank=adapter.rank,
        rounds=config.rounds,
        routers=config.base_method.routers or "none",
        dora=config.use_dora,
    )
    parts = fold_bytes(sizes, "executed")
    return sum(parts.values()) if config.rounds > 1 else parts["experts"]

"""``graphmoe memory``: its activations against real tensors, what is held against a real optimizer, its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, T5Config
from typer.testing import CliRunner

from graphmoe_cli.app import app
from graphmoe_cli.runs import memory as runs
from graphmoe_model import GraphMoEConfig
from graphmoe_model.base_models import adapted_on_meta, model_config
from graphmoe_model.memory import COMPONENTS, Memory, memory_per_gpu
from graphmoe_model.memory.activations import step_activations
from graphmoe_model.memory.live_bytes import LiveBytes
from graphmoe_model.memory.parameter_counts import count_parameters
from graphmoe_model.memory.strategies import held
from graphmoe_tables.strategies import STRATEGIES
from tests.model.checkpointing import checkpoint_activations
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model

TOKENS = 1024
ADAPTER = GraphMoEConfig(r=4, num_experts=4, gru_hidden_scale=0.25, task_type="CAUSAL_LM")


def llama(layers: int) -> Any:
    """Large enough that activations are more than what the operators take for themselves."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model("llama", vocab_size=128, num_hidden_layers=layers, **sizes)


def real(layers: int, checkpointing: bool, adapter: GraphMoEConfig = ADAPTER) -> nn.Module:
    model = get_peft_model(AutoModelForCausalLM.from_config(llama(layers)), adapter).train()
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    return model


def loss(model: nn.Module) -> torch.Tensor:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def peak(model: nn.Module) -> int:
    """The most bytes that PyTorch's allocator gave out in a step, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss(model).backward()
    now = most = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def saved(model: nn.Module) -> int:
    """Bytes that a forward leaves for the backward pass, parameters apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []  # an address may come again otherwise

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(found.values())


@pytest.mark.parametrize(
    ("coefficient", "tolerance"), [(0.0, 1e-3), (0.01, 0.015)], ids=["layers alone", "router loss"]
)
def test_a_layer_leaves_what_real_tensors_leave(coefficient, tolerance):
    """Computed without memory, measured with it. Something saved by the layer and not counted is a lot.

    A router loss takes its statistics after the layers, when part of theirs is free again: so far it is off.
    """
    adapter = replace(ADAPTER, router_aux_loss_coef=coefficient)
    layer = step_activations(
        lambda n: adapted_on_meta(adapter, llama(n)).model, TOKENS, checkpointing=False, loss_tokens=TOKENS
    ).layer
    measured = saved(real(2, False, adapter)) - saved(real(1, False, adapter))
    assert layer == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("loss_tokens", [TOKENS, 16])
def test_the_loss_holds_logits_of_the_tokens_that_have_one(loss_tokens):
    """With a vocabulary that dwarfs a layer: all that the loss holds at once is some tensors [tokens, vocabulary]."""
    vocabulary = 2**15

    def build(layers: int) -> nn.Module:
        base = llama(layers)
        base.vocab_size = vocabulary
        return adapted_on_meta(ADAPTER, base).model

    logits = 4 * loss_tokens * vocabulary
    found = step_activations(build, TOKENS, checkpointing=True, loss_tokens=loss_tokens)
    rest = step_activations(build, TOKENS, checkpointing=True, loss_tokens=1).in_loss
    assert 2 * logits <= found.in_loss <= 4 * logits + rest


@pytest.mark.slow
def test_the_peak_with_checkpointing_is_the_allocator_s():
    """Between the profiler's peak and that less what the experts' blocks take on a CPU (12 MiB), which no GPU takes."""
    found = step_activations(
        lambda n: adapted_on_meta(ADAPTER, llama(n)).model, TOKENS, checkpointing=True, loss_tokens=TOKENS
    )
    measured = peak(real(3, True))
    assert measured - 12 * 2**20 < 3 * found.layer + max(found.in_loss, found.in_layer) < measured


def test_live_bytes():
    """What is freed no longer counts, and views and what was there before never do."""
    known = nn.Linear(4, 4)
    with LiveBytes(known) as live:
        a = torch.ones(256)
        b = a[:8]
        known.weight.detach().view(-1)
        assert (live.now, live.peak) == (1024, 1024)
        del a, b
        assert (live.now, live.peak) == (0, 1024)
        live.restart()
        torch.ones(2)
    assert live.peak == 8


def test_what_one_process_holds_is_what_torch_holds():
    """Adapter, gradients and AdamW's moments to the byte."""
    model = tiny_peft_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.ones(1, 4, dtype=torch.long)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    single = held(STRATEGIES["single"], count_parameters(model), gpus=1)
    assert single["adapter weights"] == sum(p.nbytes for p in trained)
    assert (single["gradients"], single["optimizer state"], single["buffers"]) == (gradients, moments, 0)
    assert single["base weights"] == sum(p.numel() for p in tiny_model().parameters()) * 2  # in bf16


def test_more_gpus_share_what_is_sharded_and_nothing_else():
    found = count_parameters(tiny_peft_model())
    for name, strategy in STRATEGIES.items():
        two, four = (held(strategy, found, gpus=gpus) for gpus in (2, 4))
        for part in ("base weights", "adapter weights", "gradients", "optimizer state"):
            shared = strategy.shards_weights or (name == "zero2" and part in ("gradients", "optimizer state"))
            ratio = 2 if shared else 1
            if part == "base weights" and name == "fsdp2-4bit":
                assert 1.8 < two[part] / four[part] < 2  # the constants are not sharded
            else:
                assert two[part] == pytest.approx(ratio * four[part], abs=2), (name, part)


@pytest.mark.slow
def test_experts_that_differ_by_layer_are_counted():
    """A pattern has no place in the short models that the activations are computed with."""
    config = tiny_config(num_experts="2-4")
    found = memory_per_gpu(config, tiny_model().config, ["single"], tokens=8)["single"]
    expected = adapted_on_meta(config, tiny_model().config).model
    assert found.components["adapter weights"] == 4 * sum(p.numel() for p in expected.parameters() if p.requires_grad)


REFUSED = {
    "an unknown strategy": ({"strategies": ["fsdp"]}, "unknown strategy 'fsdp'; there are single, single-4bit, ddp"),
    "no GPU": ({"gpus": 0}, "gpus must be at least 1, got 0"),
    "one token": ({"tokens": 1}, "tokens must be at least 2, got 1"),
    "a loss on more tokens than there are": ({"tokens": 8, "loss_tokens": 9}, "from 1 to 8, got 9"),
    "a loss on none": ({"tokens": 8, "loss_tokens": 0}, "from 1 to 8, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        memory_per_gpu(tiny_config(), tiny_model().config, **arguments)


def test_no_causal_language_model():
    with pytest.raises(ValueError, match="this is no causal language model"):
        memory_per_gpu(tiny_config(), T5Config())


def graphmoe(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["memory", *arguments])


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """What the command asks `memory_per_gpu`, which gives made-up figures."""
    calls: list[Any] = []

    def made_up(config, model_config, strategies, **options):
        calls.append((config, model_config, options))
        components = {name: 10**9 * (i + 1) for i, name in enumerate(COMPONENTS)}
        return {name: Memory(components, kept_folds=5 * 10**8) for name in strategies}

    monkeypatch.setattr(runs, "memory_per_gpu", made_up)
    return calls


def test_the_command_asks_for_what_its_options_say(asked):
    """An option taken and forgotten would print the figures of something else."""
    options = "--strategy ddp zero3 ddp --gpus 4 --preset mixlora --r 2 --rounds 4 --no-checkpointing"
    sizes = ("--tokens", "16", "--loss-tokens", "4")
    result = graphmoe("--model", "tiny", *options.split(), *sizes, "--json")
    assert result.exit_code == 0, result.output
    ((config, base, given),) = asked
    assert config.to_dict() == GraphMoEConfig.from_preset("mixlora", r=2, rounds=4).to_dict()
    assert base.to_dict() == model_config("tiny").to_dict()
    assert given == {"gpus": 4, "tokens": 16, "loss_tokens": 4, "checkpointing": False}
    printed = json.loads(result.stdout)
    (adapter,) = printed["adapters"]
    assert (printed["model"], adapter["name"], list(adapter["bytes"])) == ("tiny", "mixlora", ["ddp", "zero3"])
    assert adapter["bytes"]["ddp"]["total"] == 28 * 10**9
    assert adapter["bytes"]["ddp"]["folds kept in evaluation"] == 5 * 10**8


def test_several_presets_have_a_table_each(asked):
    """As in `graphmoe params`, whose --preset takes a list."""
    result = graphmoe("--model", "tiny", "--preset", "lora", "mixlora", "--strategy", "ddp", "--r", "4")
    assert result.exit_code == 0, result.output
    assert [config.to_dict() for config, *_ in asked] == [
        GraphMoEConfig.from_preset(name, r=4).to_dict() for name in ("lora", "mixlora")
    ]
    titles = [line for line in result.stdout.splitlines() if "to train" in line]
    assert [title.split(" on tiny")[0].rpartition("to train ")[2] for title in titles] == ["LoRA", "MixLoRA"]


def test_the_command_prints_a_table_of_all_strategies(asked):
    result = graphmoe("--model", "tiny")
    assert result.exit_code == 0, result.output
    title = "GB on each GPU, to train GraphMoE(MixLoRA) on tiny: 8 GPUs, 4,096 tokens on each, bf16, AdamW, with"
    assert title in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    for name in STRATEGIES:
        assert [name, "1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "7.0", "28.0", "0.5"] in rows


def test_the_strategy_single_has_one_gpu(asked):
    assert "on tiny: 1 GPU, 4,096 tokens" in graphmoe("--model", "tiny", "--strategy", "single").stdout


WRONG = {
    "unknown strategy": ("--model tiny --strategy fsdp1", "unknown strategy 'fsdp1'"),
    "unknown preset": ("--model tiny --preset mixlor", "unknown preset 'mixlor'"),
    "unknown model": ("--model ./nowhere", "there is no folder ./nowhere"),
    "no GPU": ("--model tiny --gpus 0", "gpus must be at least 1, got 0"),
    "rank 0": ("--model tiny --r 0", "r must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_ends_in_one_line_and_status_2(case):
    arguments, message = WRONG[case]
    result = graphmoe(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1

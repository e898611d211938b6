"""Profiles: what time counts for which category, on traces written by hand and on tiny models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM

from graphmoe_kernels import ranges
from graphmoe_model import GraphMoEConfig
from graphmoe_model.base_models import MODEL_SHAPES
from graphmoe_model.profiling import CATEGORIES, Profile, profile_model
from graphmoe_model.profiling.attribution import attribute
from graphmoe_model.profiling.models import adapter_title, profiled_config, saved_model, with_fresh
from graphmoe_model.profiling.modules import module_ranges
from graphmoe_model.profiling.out_of_memory import check_fits, memory_error
from graphmoe_model.profiling.report import markdown, print_report, warnings
from graphmoe_tables.methods import METHODS, preset_settings
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model, tokens

ADAPTERS = {
    "none": {"attention", "mlp", "other"},
    "MixLoRA, T = 1": {"attention", "mlp", "experts", "routing", "other"},
    "GraphMoE(MixLoRA), T = 3": set(CATEGORIES),
}


@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_categories_have_time_exactly_where_they_have_work(adapter, fold):
    """Both ways to compute the rounds name the same parts, and nothing is counted for a part that is not there."""
    if adapter == "none":
        model = tiny_model()
    else:
        model = tiny_peft_model(rounds=int(adapter[-1]), fold=fold)
    for found in profile_model(model, adapter, lengths=[5], repetitions=1):
        assert {name for name, spent in found.seconds.items() if spent > 0} == ADAPTERS[adapter]
        assert set(found.seconds) == set(CATEGORIES)
        assert found.wall_seconds > 0


BUSY = {"device": "cpu", "cores": 2, "threads": 2, "load average": 1.7}
QUIET = {**BUSY, "load average": 0.2}


def profile_of(ranges: float) -> Profile:
    """A profile whose attention's share ranged over this much."""
    seconds = dict.fromkeys(CATEGORIES, 0.1)
    spread = {name: (0.1, 0.1 + ranges * (name == "attention")) for name in CATEGORIES}
    return Profile("tiny", "none", "prefill", 64, seconds, spread, 0.6, 0.7, 5)


def test_figures_of_a_busy_machine_carry_a_warning():
    """On two cores that somebody else uses the shares are nonsense, which nothing said."""
    (warning,) = warnings([profile_of(0.01)], BUSY)
    assert "a load of 1.7 on 2 cores, of which this took 2" in warning
    (warning,) = warnings([profile_of(0.01), profile_of(0.3)], QUIET)
    assert "shares ranged over more than 10% of the forward in none, prefill of 64 tokens" in warning
    assert warnings([profile_of(0.01)], QUIET) == []
    assert warnings([profile_of(0.01)], {**BUSY, "threads": 1, "cores": 4}) == []
    assert warnings([profile_of(0.01)], {**BUSY, "load average": None}) == []  # Windows has none
    assert "busy" in markdown([profile_of(0.01)], BUSY)
    shown = Console(record=True, width=400)
    print_report([profile_of(0.01)], BUSY, shown)
    assert "the machine was busy" in shown.export_text()


def test_lora_on_the_linears_of_an_mlp_counts_as_mlp_and_attention():
    lora = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM"))
    (found,) = profile_model(lora, "LoRA", ["prefill"], [5], repetitions=1)
    assert {name for name, spent in found.seconds.items() if spent > 0} == ADAPTERS["none"]


def test_a_disabled_adapter_is_profiled_as_the_plain_model():
    model = tiny_peft_model()
    with model.disable_adapter():
        (found,) = profile_model(model, "disabled", ["prefill"], [5], repetitions=1)
    assert {name for name, spent in found.seconds.items() if spent > 0} == ADAPTERS["none"]


def test_the_categories_sum_to_the_forward(tmp_path):
    """In a trace of a real model: whatever no range claims is "other", and nothing is claimed twice."""
    folder = tmp_path / "made" / "here"
    profile_model(tiny_peft_model(), "GraphMoE(MixLoRA), T = 3", lengths=[5], repetitions=1, traces=folder)
    traces = sorted(folder.iterdir())
    assert [t.name for t in traces] == [f"trace_graphmoe-mixlora-t-3_{phase}_5.json" for phase in ("decode", "prefill")]
    for trace in traces:
        events = json.loads(trace.read_text())["traceEvents"]
        (forward,) = attribute(events, on_device=False)
        (whole,) = (e["dur"] for e in events if e["name"] == "graphmoe::forward")
        assert sum(forward.values()) == pytest.approx(whole / 1e6, abs=1e-8)
        assert min(forward.values()) >= 0


def test_a_decode_step_is_one_token_on_a_cache_of_the_asked_length():
    """Every repetition: a cache that grows from call to call would measure other lengths than it says."""
    model = tiny_model()
    seen = []

    def note(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        lengths = [o.get_seq_length() for o in options.values() if isinstance(o, Cache)]
        seen.append((options["input_ids"].shape, *lengths))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    profile_model(model, "none", ["decode"], [6], batch=2, repetitions=2)
    handle.remove()
    prefill, *steps = seen
    assert prefill == ((2, 6),)
    assert len(steps) > 4
    assert set(steps) == {((2, 1), 6)}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_switched_on(fails, monkeypatch):
    """Neither after a profile nor after one that an error ended in the middle of a range."""
    model = tiny_peft_model().train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = hooks(model)
    if fails:
        router = model.base_model.model.model.layers[1].mlp

        def fail(x):
            if ranges._recording:
                raise RuntimeError("in the middle")
            return type(router).forward(router, x)

        monkeypatch.setattr(router, "forward", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            profile_model(model, "GraphMoE(MixLoRA), T = 3", ["prefill"], [5], repetitions=1)
    else:
        profile_model(model, "GraphMoE(MixLoRA), T = 3", ["prefill"], [5], repetitions=1)
    assert hooks(model) == before
    assert [module.training for module in model.modules()] == modes
    assert not ranges._recording
    assert not torch.autograd._profiler_enabled()
    assert torch.is_grad_enabled()


def test_ranges_are_in_a_trace_only_while_they_are_recorded():
    """Off, they must cost a layer nothing; a range closed by an error must not swallow what comes after it."""
    model = tiny_peft_model().eval()

    def found() -> set[str]:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(input_ids=tokens())
        return {e.name.removeprefix("graphmoe::") for e in profiler.events() if e.name.startswith("graphmoe::")}

    parts = {"mlp", "experts", "routing", "gru"}
    assert not found() & {*parts, "attention"}
    with ranges.recorded_ranges():
        assert found() >= parts
        with module_ranges(model):
            assert found() >= {*parts, "attention"}
    assert not found() & {*parts, "attention"}


def test_as_dict_is_what_other_programs_read():
    seconds = dict.fromkeys(CATEGORIES, 0.5)
    found = Profile("tiny", "none", "decode", 64, seconds, dict.fromkeys(CATEGORIES, (0.1, 0.2)), 1.0, 2.0, 5)
    expected = {"model": "tiny", "adapter": "none", "phase": "decode", "tokens": 64, "seconds": seconds}
    assert found.as_dict() == expected
    assert found.total == 3.0
    assert found.share("attention", "mlp") == pytest.approx(1 / 3)


def sparse_model() -> nn.Module:
    model = tiny_model()
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 32))
    return model


def compiled_layer() -> nn.Module:
    model = tiny_model()
    model.model.layers[0].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "model, arguments, error, message",
    [
        (tiny_model, {"phases": ["train"]}, ValueError, "unknown phase 'train'; expected 'prefill' or 'decode'"),
        (tiny_model, {"phases": []}, ValueError, "unknown phase none"),
        (tiny_model, {"lengths": [8, 0]}, ValueError, "at least 1 token, got 0"),
        (tiny_model, {"lengths": []}, ValueError, "got no length at all"),
        (tiny_model, {"lengths": [128]}, ValueError, "128 tokens and one to decode is longer than the model's 128 pos"),
        (tiny_model, {"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        (tiny_model, {"repetitions": 0}, ValueError, "repetitions must be at least 1, got 0"),
        (sparse_model, {"lengths": [8]}, ValueError, r"layers without a gated MLP \(layer 1: model.layers.1.mlp\)"),
        (lambda: nn.Linear(4, 4), {}, ValueError, "Linear has no config"),
        (lambda: torch.compile(tiny_model(), backend="eager"), {}, TypeError, "profile it before torch.compile"),
        (compiled_layer, {}, TypeError, "profile it before torch.compile"),
        (lambda: tiny_model().to("meta"), {"lengths": [8]}, ValueError, "cannot see what runs on meta"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, error, message):
    with pytest.raises(error, match=message):
        profile_model(model(), "none", **arguments)


@pytest.mark.parametrize(
    "text, amount",
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB", "20.00 GiB"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes. Error", "4.00 GiB"),
    ],
)
def test_out_of_memory_says_where_and_how_much(text, amount):
    message = f"prefill needed {amount} more than there is; try less"
    with pytest.raises(MemoryError, match=message), memory_error("prefill", "try less"):
        raise RuntimeError(text)


def test_other_errors_are_no_memory_errors():
    with pytest.raises(RuntimeError, match="shapes"), memory_error("prefill", "try less"):
        raise RuntimeError("shapes differ")


def test_a_model_that_cannot_fit_is_refused_before_it_is_built():
    """Linux kills a process that takes too much; it has no error to catch."""
    with pytest.raises(MemoryError, match=r"the model takes 2048000.0 GiB in bfloat16, cpu has .* fewer layers"):
        check_fits(2**40 * 1000, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_known_models_are_models_that_can_be_adapted(name):
    """On the meta device: sizes that do not fit together fail here, not on the machine of a user."""
    config = profiled_config(name, layers=1)
    assert config.num_hidden_layers == 1
    assert profiled_config(name).num_hidden_layers == MODEL_SHAPES[name].profiled_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (
        MODEL_SHAPES[name].num_attention_heads * MODEL_SHAPES[name].head_dim,
        MODEL_SHAPES[name].hidden_size,
    )


def test_fresh_adapters_count_in_every_term_and_leave_the_model_as_it_was():
    """A zero weight would have products that a kernel might skip, and an adapter left behind would be in the next."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with with_fresh(model, "mixlora", 2) as (adapted, title):
        assert title == "GraphMoE(MixLoRA), T = 2"
        trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert trainable
        zero = [n for n, p in trainable.items() if not p.any() and "candidate.bias" not in n]
        assert not zero
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_adapters_are_called_by_their_method():
    assert adapter_title(tiny_config(rounds=1)) == "MixLoRA, T = 1"
    assert adapter_title(tiny_config(rounds=4)) == "GraphMoE(MixLoRA), T = 4"
    assert adapter_title(tiny_config(method="mola", use_dora=True)) == "GraphMoE(MoDA), T = 3"
    assert adapter_title(tiny_config(method="loramoe", rounds=1)) == "LoRAMoE, T = 1"
    assert adapter_title(GraphMoEConfig(method="lora", rounds=1)) == "LoRA"
    assert adapter_title(LoraConfig()) == "LoRA"


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.routers])
def test_fresh_adapters_of_every_method_have_their_time_in_its_parts(method, rounds):
    """At the sizes that its paper gives it; a later round has a GRU, whatever kind of experts it is on."""
    with with_fresh(tiny_model(), method, rounds) as (adapted, title):
        assert title == f"{METHODS[method].name(False, rounds)}, T = {rounds}"
        config = adapted.peft_config["default"]
        assert {name: getattr(config, name) for name in preset_settings(method)} == {
            **preset_settings(method),
            "rounds": rounds,
        }
        (found,) = profile_model(adapted, title, ["prefill"], [5], repetitions=1)
    with_time = {name for name, spent in found.seconds.items() if spent > 0}
    assert with_time == set(CATEGORIES) - ({"gru"} if rounds == 1 else set())


def test_other_architectures_have_the_same_categories():
    """Attention and MLP are found by structure: a fused gate_up_proj, another attention class."""
    for kind in ("phi3", "gemma2"):
        (found,) = profile_model(tiny_peft_model(kind), "GraphMoE(MixLoRA), T = 3", ["decode"], [5], repetitions=1)
        assert min(found.seconds.values()) > 0


def test_a_model_without_logits_to_keep_is_profiled_too():
    """The option is left out where a model's forward does not know it."""

    class Older(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None):
            return super().forward(input_ids, None, None, past_key_values, use_cache=use_cache)

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    (found,) = profile_model(Older(config), "none", ["prefill"], [5], name="older", repetitions=1)
    assert (found.model, found.tokens) == ("older", 5)


def test_a_quantised_model_without_its_package_names_the_extra(tmp_path, monkeypatch):
    """Transformers names the package alone, in a version that it would take."""
    tiny_model().save_pretrained(tmp_path)
    missing = ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(missing))
    with pytest.raises(ValueError, match=r"requires bitsandbytes; .*pip install 'graphmoe\[quant\]'"):
        saved_model(str(tmp_path), None, torch.device("cpu"))

"""Profiles of a model as it stands: warm-up, the call by itself, the same call under `torch.profiler`."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile, supported_activities

from graphmoe_kernels import named_range, recorded_ranges
from graphmoe_model.profiling.attribution import FORWARD, attribute, last_forward
from graphmoe_model.profiling.modules import categories, module_ranges
from graphmoe_model.profiling.out_of_memory import memory_error
from graphmoe_model.profiling.result import Profile, summarise
from graphmoe_tables.models import PHASES, check_lengths

WARM_UPS = 2  # the first builds the folds and, on a GPU, compiles kernels
SHORT = 0.05  # seconds; a machine's hiccup is as long as several calls that are shorter

Call = Callable[[], Any]


def profile_model(
    model: nn.Module,
    adapter: str,
    phases: Sequence[str] = PHASES,
    lengths: Sequence[int] = (64, 256, 1024),
    *,
    name: str | None = None,
    batch: int = 1,
    repetitions: int = 5,
    traces: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Profile]:
    """Measure where the time of a forward goes, for every phase and length, on the device that the model is on.

    The forward is the one that ``generate`` makes: no gradients, a cache, logits of the last token alone. Token ids are
    random. The model's mode is as before afterwards, and no hook stays on it.

    Args:
        model: a causal language model of Transformers, with or without an adapter of PEFT, its weights in place.
        adapter: what the profiles call the adapter.
        phases: of `PHASES`: ``"prefill"`` of all tokens, ``"decode"`` of one token with a cache of that many.
        lengths: tokens of the sequences.
        name: what the profiles call the model; without one its name or path, or its type.
        batch: sequences.
        repetitions: calls of which the medians are given, with and without the profiler; three times as many of
            calls that take less than `SHORT`.
        traces: a folder, made if need be, for Chrome traces of one forward each,
            ``trace_<adapter>_<phase>_<tokens>.json``; None keeps none.
        progress: called with a line before every profile.

    Raises:
        TypeError: the model is compiled: a compiled graph has no ranges.
        ValueError: an unknown phase, a number below 1, a length beyond the model's positions, a device other than CPU
            and CUDA, a model without what `graphmoe_model.profiling.modules.categories` looks for.
        MemoryError: a profile did not fit into memory; the message says which.
    """
    config = _check(model, phases, lengths, batch=batch, repetitions=repetitions)
    device = next(model.parameters()).device
    if traces is not None:
        traces.mkdir(parents=True, exist_ok=True)
    profiles = []
    with _evaluated(model):
        for phase in phases:
            for tokens in lengths:
                if progress is not None:
                    progress(f"{adapter}, {phase} of {tokens} tokens")
                trace = None if traces is None else traces / f"trace_{_slug(adapter)}_{phase}_{tokens}.json"
                with memory_error(
                    f"{phase}, {tokens} tokens, batch {batch}", "try shorter sequences or a smaller batch"
                ):
                    prepare = _preparer(model, phase, _token_ids(config.vocab_size, batch, tokens, device))
                    alone, profiled, forwards = _measure(model, prepare, device, repetitions, trace)
                seconds, spread = summarise(forwards)
                title = name or config.name_or_path or config.model_type
                walls = median(alone), median(profiled)
                profiles.append(Profile(title, adapter, phase, tokens, seconds, spread, *walls, len(forwards)))
    return profiles


def _check(model: nn.Module, phases: Sequence[str], lengths: Sequence[int], **counts: int) -> Any:
    """Check every argument, and return the language model's configuration."""
    unknown = [phase for phase in phases if phase not in PHASES]
    if unknown or not phases:
        raise ValueError(f"unknown phase {', '.join(map(repr, unknown)) or 'none'}; expected 'prefill' or 'decode'")
    for what, count in counts.items():
        if count < 1:
            raise ValueError(f"{what} must be at least 1, got {count}")
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        raise TypeError("the model is compiled, and a compiled graph has no ranges; profile it before torch.compile")
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config; expected a language model of Transformers")
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    check_lengths(lengths, phases, getattr(config, "max_position_embeddings", None))
    categories(model)
    device = next(model.parameters()).device
    activities = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}
    if activities.get(device.type) not in supported_activities():
        raise ValueError(f"this PyTorch's profiler cannot see what runs on {device}; profiles run on CPU and CUDA")
    return config


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients inside the block; then every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _token_ids(vocabulary: int, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(device)


def _preparer(model: nn.Module, phase: str, ids: torch.Tensor) -> Callable[[], Call]:
    """Return what makes a call ready: a decode step gets a cache of its own, as it writes to it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    options: dict[str, Any] = {"use_cache": True}
    known = inspect.signature(base.forward).parameters
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1
    if phase == "prefill":
        return lambda: lambda: model(input_ids=ids, **options)
    name = "cache" if "cache" in known else "past_key_values"  # Transformers 5.24 renames it, model by model
    kept = model(input_ids=ids, **options)[name]
    last = ids[:, -1:]  # [B, 1]

    def prepare() -> Call:
        cache = {name: copy.deepcopy(kept)}
        return lambda: model(input_ids=last, **cache, **options)

    return prepare


def _measure(
    model: nn.Module, prepare: Callable[[], Call], device: torch.device, repetitions: int, trace: Path | None
) -> tuple[list[float], list[float], list[dict[str, float]]]:
    """Time the calls alone and the profiled ones, in seconds, and the latter by category."""
    warm = [_elapsed(prepare(), device) for _ in range(WARM_UPS)]
    repetitions *= 3 if warm[-1] < SHORT else 1
    alone = [_elapsed(prepare(), device) for _ in range(repetitions)]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with module_ranges(model), recorded_ranges(), profile(activities=activities) as profiler:
        # One more: the first range and the first operators on record are many times slower than the next ones.
        profiled = [_elapsed(_in_range(prepare()), device) for _ in range(repetitions + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        document = json.loads(path.read_text(encoding="utf-8"))
    forwards = attribute(document["traceEvents"], on_device=device.type == "cuda")
    if trace is not None:  # one forward is what people look at; all of them would be too much for a browser
        document["traceEvents"] = last_forward(document["traceEvents"])
        trace.write_text(json.dumps(document), encoding="utf-8")
    return alone, profiled[1:], forwards[1:]


def _in_range(call: Call) -> Call:
    def ranged() -> None:
        with named_range(FORWARD):
            call()

    return ranged


def _elapsed(call: Call, device: torch.device) -> float:
    """Time a call in seconds, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _slug(adapter: str) -> str:
    """Write the adapter as a part of a file's name: "GraphMoE(MixLoRA), T = 3" is graphmoe-mixlora-t-3."""
    return "-".join("".join(c if c.isalnum() else " " for c in adapter.lower()).split())

"""More than a layer in one case: a decoder layer around each contender's MLP, and `generate` on a small whole model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cases import Case, Contender
from benchmarks.checks import Built, Judge, Verdict, device_error, sample_rows, verdict
from benchmarks.devices import Device
from benchmarks.layers import Layer, Layers
from benchmarks.operators import DTYPES
from benchmarks.plain import Forward
from benchmarks.providers import PROVIDERS
from benchmarks.sizes import VOCABULARY, Model
from benchmarks.timing import Prepared
from benchmarks.work import Work, layer_work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.testing import within_budget
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from graphmoe_model.profiling import profile_model

# Inputs that are tried until one has enough sampled tokens whose routing is decided.
SEEDS = 20
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# provider -> (fold, backend) of the adapter
SETTINGS = {"triton": ("auto", "triton"), "torch": ("auto", "torch"), "literal": ("never", "torch")}
# What a profile calls an adapter, by provider; ours by T. And what every forward has: a share of nothing would mislead.
TITLES = {"dense": "none", "peft_lora": "LoRA"}
ALWAYS = ("attention", "mlp")
REPETITIONS = 3


def make_model(m: Model, layers: int, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A causal language model of random weights: a model's decoder layers, but few of them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=m.hidden,
        intermediate_size=m.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(8)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


class FullCache:
    """Keys and values of ``context`` earlier tokens and of one new one, written to the same place in every call.

    It stands in for the model's cache: a call leaves it as long as it was, so calls can be repeated, and captured.
    """

    def __init__(self, model: Model, context: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(5)
        shape = (2, 1, model.kv_heads, context + 1, model.head_dim)  # keys and values
        self.both = torch.randn(*shape, generator=generator, device=device).to(dtype)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, [1, heads, context + 1, head_dim] each, the new ones last; the attention calls it."""
        self.both[0, :, :, -1:], self.both[1, :, :, -1:] = keys, values
        return self.both[0], self.both[1]


class Wrapped(nn.Module):
    """A forward over tokens [N, D] in the place of an MLP, which is given [B, S, D]."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.over_tokens = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.over_tokens(x.reshape(-1, x.shape[-1])).view(x.shape)


class Skeleton:
    """A decoder layer but for its MLP: attention and norms of random weights."""

    def __init__(self, case: Case, device: torch.device) -> None:
        sizes, dtype = case.sizes, DTYPES[case.sizes.dtype]
        whole = make_model(case.model, 1, dtype, device).model
        self.decoder = whole.layers[0]
        del self.decoder.mlp
        self.shape = (case.batch, sizes.tokens // case.batch, sizes.hidden)
        start = case.context or 0
        positions = torch.arange(start, start + self.shape[1], device=device)[None]  # [1, S]
        self.cache = None if case.context is None else FullCache(case.model, case.context, dtype, device)
        self.rotary = whole.rotary_emb(torch.empty(1, dtype=dtype, device=device), positions)

    def forward(self, mlp: Forward) -> Forward:
        """The decoder layer with this MLP over tokens: [B, S, D] -> [B, S, D]."""
        decoder = copy.copy(self.decoder)
        decoder._modules = {**self.decoder._modules, "mlp": Wrapped(mlp)}
        # By position: Transformers 5.24 renames the cache's argument. Between them: mask and position ids.
        return lambda h: decoder(h, None, None, self.cache, position_embeddings=self.rotary)

    def mlp_input(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """What the MLP reads and what its output is added to, [N, D] each."""
        read: list[Tensor] = []

        def silent(x: Tensor) -> Tensor:
            read.append(x)
            return torch.zeros_like(x)

        with torch.no_grad():
            residual = self.forward(silent)(h)
        return read[0], residual.flatten(0, 1)


class DecoderTiming:
    """The contenders of a case of the group ``decoder``."""

    def __init__(self, case: Case, layers: Layers) -> None:
        self.case, self.layers = case, layers
        self.skeleton = Skeleton(case, layers.device.torch)
        most = max((c.sizes for c in case.contenders), key=lambda s: s.rounds)
        self.h, rows = self._input(layers.get(most), most)
        x, self.residual = self.skeleton.mlp_input(self.h)
        self.judge = Judge({"x": x}, rows, False, DTYPES[case.sizes.dtype])

    def prepare(self, contender: Contender) -> Prepared:
        """The decoder layer around the provider's MLP."""
        provider, sizes = PROVIDERS[contender.provider], contender.sizes
        built = provider.build(self.layers.get(sizes), sizes)
        built.set_mode(False)
        forward = self.skeleton.forward(lambda x: built.subject.run({"x": x})["y"])

        def infer() -> Tensor:
            with torch.no_grad():
                return forward(self.h)

        work, attention = layer_work(provider.form, sizes, False), attention_work(self.case, sizes)
        return Prepared(
            contender,
            lambda: self.compare(built, infer()),
            infer,
            work=Work((work.bytes or 0.0) + (attention.bytes or 0.0), work.operations + attention.operations),
            capture=self.case.graph and provider.capturable,
            verify=lambda found: self.compare(built, found).fault,
        )

    def compare(self, built: Built, result: Tensor) -> Verdict:
        """The output at the sampled tokens, less the residual, in whose shadow an error of the MLP would be small."""
        plain, exact = self.judge.definitions(built)
        residual = self.residual[self.judge.rows]
        name, found = "added by the MLP", result.flatten(0, 1)[self.judge.rows].double() - residual.double()
        own = (residual + plain["y"]).double() - residual.double()
        return verdict({name: found}, {name: own}, {name: exact["y"]}, self.judge.dtype)

    def _input(self, layer: Layer, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """h [B, S, D], and sampled rows whose routing is decided behind the attention."""
        for seed in range(SEEDS):
            h = layer.draw(sizes.tokens, seed=20 + seed).view(self.skeleton.shape)
            x, _ = self.skeleton.mlp_input(h)
            sample = sample_rows(sizes.tokens, x.device)
            rows = sample[layer.decided(x[sample], sizes)]
            if len(rows) >= max(1, len(sample) // 4):
                return h, rows
        raise RuntimeError(f"of {SEEDS} inputs none has enough tokens whose routing rounding does not change")


def attention_work(case: Case, sizes: Sizes) -> Work:
    """Projections and products with keys and values; the norms' bytes are left out."""
    model, tokens, e = case.model, sizes.tokens, sizes.element
    wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = 2 * model.hidden * (wide + narrow)
    length = tokens // case.batch
    seen = case.context + 1 if case.context is not None else (length + 1) / 2  # keys a token looks at, on average
    products = tokens * (weights + 2 * wide * seen)
    cached = 2 * narrow * ((case.context or 0) + tokens)
    return Work(float(e * (weights + cached + tokens * (4 * model.hidden + 2 * wide))), 2.0 * products)


class GenerationTiming:
    """The contenders of a case that generates.

    All share the base model's parameters. Adapters are put on as users do it, on MLPs and attention, with random
    weights: how good the text is does not matter, that every product is done does.
    """

    def __init__(self, case: Case, layers: Layers) -> None:
        self.case, device = case, layers.device.torch
        self.dtype = DTYPES[case.sizes.dtype]
        self.base = make_model(case.model, case.layers, self.dtype, device)
        generator = torch.Generator(device).manual_seed(9)
        self.prompt = torch.randint(VOCABULARY, (1, case.context or 1), generator=generator, device=device)

    def prepare(self, contender: Contender) -> Prepared:
        """A call makes the case's `new_tokens` tokens, greedily, and never stops before."""
        model, new = with_adapter(self.base, contender.provider, contender.sizes), self.case.new_tokens
        mask, length = torch.ones_like(self.prompt), {"min_new_tokens": new, "max_new_tokens": new}

        def generate() -> Tensor:
            with torch.no_grad():
                return model.generate(
                    input_ids=self.prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **length
                )

        return Prepared(contender, lambda: self._check(model, contender, generate()), generate, units=new)

    def _check(self, model: nn.Module, contender: Contender, generated: Tensor) -> Verdict:
        """Logits of the prompt against the plain definitions in fp64, and as many tokens as were asked for.

        By the median of the positions' errors: where rounding lets a token choose another expert, it alone is off. The
        base model and plain LoRA are the code of Transformers and PEFT as it is: there is nothing to hold them to.
        """
        expected = self.prompt.shape[1] + self.case.new_tokens
        if generated.shape != (1, expected):
            return Verdict({}, f"generated {tuple(generated.shape)} instead of (1, {expected}) tokens")
        if contender.provider not in SETTINGS:
            return Verdict({}, None)
        plain, exact = as_reference(model), as_reference(copy.deepcopy(model).double())
        with torch.no_grad():
            found, own, oracle = (m(input_ids=self.prompt).logits[0] for m in (model, plain, exact))  # [S, V] each
        error, budget = (
            torch.tensor([device_error(row, true) for row, true in zip(each, oracle, strict=True)]).median().item()
            for each in (found, own)
        )
        fits = within_budget(error, budget, self.dtype)
        fault = None if fits else f"logits: error {error:.1e}, the plain computation's own is {budget:.1e}"
        return Verdict({"logits": (error, budget)}, fault)


def with_adapter(base: LlamaForCausalLM, provider: str, sizes: Sizes) -> Any:
    """The model with a provider's adapter; it shares the base model's parameters, and leaves ``base`` alone.

    Raises:
        ValueError: a provider that is no way to run a model.
    """
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    common: dict[str, Any] = {"r": sizes.rank, "lora_alpha": 2 * sizes.rank, "init_lora_weights": False}
    if provider == "dense":
        return model
    if provider == "peft_lora":
        return get_peft_model(model, LoraConfig(target_modules=list(LINEARS), **common)).eval()
    if provider not in SETTINGS:
        raise ValueError(f"{provider!r} is no way to run a model; expected dense, peft_lora, {', '.join(SETTINGS)}")
    fold, backend = SETTINGS[provider]
    common |= {"num_experts": sizes.experts, "top_k": sizes.top_k, "rounds": sizes.rounds}
    return get_peft_model(model, GraphMoEConfig(fold=fold, backend=backend, **common)).eval()


def as_reference(model: Any) -> Any:
    """The model with its adapter's plain definitions; a copy that shares the parameters."""
    found = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in found.modules():
        if isinstance(module, FusedGraphMoEFFN):
            adapter: Any
            for adapter in module.lora_graphmoe.values():
                adapter.config.fold, adapter.config.backend = "never", "reference"
            module.refold()
    return found


def profiles(case: Case, device: Device) -> list[dict[str, Any]]:
    """Seconds of a small whole model's forward by part (the paper's Fig 6) for every contender, prefill and decode, at
    the lengths of the case.

    Raises:
        AssertionError: a part that every forward has took no time at all.
    """
    base = make_model(case.model, case.layers, DTYPES[case.sizes.dtype], device.torch)
    found = []
    for provider, sizes, _ in case.contenders:
        title = TITLES.get(
            provider, "MixLoRA, T = 1" if sizes.rounds == 1 else f"GraphMoE(MixLoRA), T = {sizes.rounds}"
        )
        adapted = with_adapter(base, provider, sizes)
        made = profile_model(adapted, title, lengths=case.lengths, name=case.model.name, repetitions=REPETITIONS)
        found += [profile.as_dict() for profile in made]
    for each in found:
        if missing := [part for part in ALWAYS if not each["seconds"][part] > 0]:
            raise AssertionError(f"{each['adapter']}, {each['phase']}: {', '.join(missing)} took no time")
    return found

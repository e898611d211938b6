"""A whole decoder layer in one case: the attention of Transformers around each contender's MLP."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.cases import Case, Contender
from benchmarks.checks import Built, Judge, Tensors, Verdict, sample_rows, verdict
from benchmarks.layers import Layer, Layers
from benchmarks.operators import DTYPES
from benchmarks.plain import Forward
from benchmarks.providers import PROVIDERS
from benchmarks.sizes import Model
from benchmarks.timing import Prepared
from benchmarks.work import Work, layer_work
from graphmoe_kernels.cost import Sizes

# Inputs that are tried until one has enough sampled tokens whose routing is decided.
SEEDS = 20


class FullCache:
    """Keys and values of ``context`` earlier tokens and of one new one, written to the same place in every call.

    It stands in for the model's cache: a call leaves it as long as it was, so calls can be repeated, and captured.
    """

    def __init__(self, model: Model, context: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(5)
        shape = (1, model.kv_heads, context + 1, model.head_dim)
        self.keys, self.values = (
            torch.randn(*shape, generator=generator, device=device).to(dtype) for _ in range(2)
        )  # [1, heads, context + 1, head_dim] each

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last; the attention calls it."""
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values


class Wrapped(nn.Module):
    """A forward over tokens [N, D] in the place of an MLP, which is given [B, S, D]."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.over_tokens = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.over_tokens(x.reshape(-1, x.shape[-1])).view(x.shape)


class Skeleton:
    """The decoder layer but for its MLP: attention and norms of random weights."""

    def __init__(self, case: Case, sizes: Sizes, device: torch.device) -> None:
        model, dtype = case.model, DTYPES[sizes.dtype]
        config = LlamaConfig(
            hidden_size=model.hidden,
            intermediate_size=8,  # of the MLP that is taken out
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(6)
        with torch.device(device):
            self.decoder = LlamaDecoderLayer(config, layer_idx=0).to(dtype).eval().requires_grad_(False)
            rotary = LlamaRotaryEmbedding(config)
        self.batch, self.length = case.batch, sizes.tokens // case.batch
        start = case.context or 0
        positions = torch.arange(start, start + self.length, device=device)[None]  # [1, S]
        self.cache = None if case.context is None else FullCache(model, case.context, dtype, device)
        self.rotary = rotary(torch.empty(1, dtype=dtype, device=device), positions)

    def forward(self, mlp: nn.Module) -> Forward:
        """The decoder layer with this MLP: [B, S, D] -> [B, S, D]."""
        decoder = copy.copy(self.decoder)
        decoder._modules = dict(self.decoder._modules)
        decoder._modules["mlp"] = mlp

        def forward(h: Tensor) -> Tensor:
            # By position: Transformers 5.24 renames the cache's argument. Between them: mask and position ids.
            return decoder(h, None, None, self.cache, position_embeddings=self.rotary)

        return forward

    def mlp_input(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """What the MLP reads and what its output is added to, [N, D] each."""
        read: list[Tensor] = []

        def silent(x: Tensor) -> Tensor:
            read.append(x)
            return torch.zeros_like(x)

        with torch.no_grad():
            residual = self.forward(Wrapped(silent))(h)
        return read[0], residual.flatten(0, 1)


class DecoderTiming:
    """The contenders of a case of the group ``decoder``."""

    def __init__(self, case: Case, layers: Layers) -> None:
        self.case, self.layers = case, layers
        first = case.contenders[0].sizes
        self.skeleton = Skeleton(case, first, layers.device.torch)
        most = max((c.sizes for c in case.contenders), key=lambda s: s.rounds)
        self.h, rows = self._input(layers.get(most), most)
        x, self.residual = self.skeleton.mlp_input(self.h)
        self.judge = Judge({"x": x}, rows, False, DTYPES[first.dtype])

    def prepare(self, contender: Contender) -> Prepared:
        """The decoder layer around the provider's MLP."""
        provider, sizes = PROVIDERS[contender.provider], contender.sizes
        built = provider.build(self.layers.get(sizes), sizes)
        built.set_mode(False)
        forward = self.skeleton.forward(Wrapped(lambda x: built.subject.run({"x": x})["y"]))

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
        rows, residual = self.judge.rows, self.residual[self.judge.rows]

        def added(y: Tensor) -> Tensors:
            return {"added by the MLP": y.double() - residual.double()}

        oracle = {"added by the MLP": exact["y"]}
        return verdict(added(result.flatten(0, 1)[rows]), added(residual + plain["y"]), oracle, self.judge.dtype)

    def _input(self, layer: Layer, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """h [B, S, D], and sampled rows whose routing is decided behind the attention."""
        for seed in range(SEEDS):
            shape = (self.skeleton.batch, self.skeleton.length, sizes.hidden)
            h = layer.draw(sizes.tokens, seed=20 + seed).view(shape)
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

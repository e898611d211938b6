"""The weights of one layer that every provider computes with, inputs for them, and what they have to equal in fp64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.checks import Subject, sample_rows
from benchmarks.devices import Device
from benchmarks.operators import DTYPES
from benchmarks.plain import Forward
from graphmoe_kernels import DenseMLP, LayerWeights, RethinkingOutput, RethinkingSpec, rethink
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.testing import cast_layer, trainable
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

# A sampled token's k-th and (k+1)-th logits are so far apart in every round that rounding does not choose.
MARGIN = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
# alpha = 2r, as in the paper's Table 2.
SCALE = 2.0


def over_tokens(forward: Forward, leaves: dict[str, Tensor]) -> Subject:
    """What computes y [N, D] from x [N, D], with the tensors whose gradients its training step needs too."""
    return Subject(lambda given: {"y": forward(given["x"])}, leaves)


def make_mlp(sizes: Sizes, device: Device) -> LlamaMLP:
    """The frozen MLP of Transformers, of random weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_attention_heads=1)
    with torch.device(device.torch):
        return LlamaMLP(config).to(DTYPES[sizes.dtype]).requires_grad_(False)


def dense_weights(mlp: LlamaMLP) -> DenseMLP:
    """Its tensors as the kernels take them."""
    return DenseMLP(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)


class Layers:
    """Layers by their sizes, made when they are first asked for; all of one width share an MLP.

    Args:
        device: where they lie.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._layers: dict[Sizes, Layer] = {}
        self._mlps: dict[Sizes, LlamaMLP] = {}

    def get(self, sizes: Sizes) -> Layer:
        """The layer of these widths, experts and rank."""
        width, key = _width(sizes), _key(sizes)
        if width not in self._mlps:
            self._mlps[width] = make_mlp(sizes, self.device)
        if key not in self._layers:
            self._layers[key] = Layer(sizes, self.device, self._mlps[width])
        return self._layers[key]

    def keep(self, needed: Iterable[Sizes]) -> None:
        """Free what is not of the sizes ``needed`` next."""
        needed = list(needed)
        keys, widths = {_key(sizes) for sizes in needed}, {_width(sizes) for sizes in needed}
        self._layers = {key: layer for key, layer in self._layers.items() if key in keys}
        self._mlps = {width: mlp for width, mlp in self._mlps.items() if width in widths}
        self.device.release()


def _key(sizes: Sizes) -> Sizes:
    return replace(sizes, tokens=1, rounds=1, top_k=1)


def _width(sizes: Sizes) -> Sizes:
    return Sizes(sizes.hidden, sizes.intermediate, 1, experts=2, dtype=sizes.dtype)


class Layer:
    """An MLP with one adapter over it, whatever the rounds.

    Args:
        sizes: of the layer; its tokens and rounds are not read.
        device: where it lies.
        mlp: the MLP, where it is shared with other layers.
    """

    def __init__(self, sizes: Sizes, device: Device, mlp: LlamaMLP | None = None) -> None:
        self.sizes, self.device, self.dtype = replace(sizes, tokens=1, rounds=2), device, DTYPES[sizes.dtype]
        self.mlp = mlp or make_mlp(sizes, device)
        torch.manual_seed(1)
        self._first = self._make_ffn(self.sizes, "auto", "auto")  # the adapter follows the MLP's device and dtype
        adapter: Any = self._first.lora_graphmoe["default"]
        self.adapter = adapter
        assert adapter.gru is not None
        self._all = adapter.weights(dense_weights(self.mlp))
        with torch.no_grad():
            for router in self._all.experts.routers():  # logits of the same spread at every width: that of D = 4096
                router.mul_((4096 / router.shape[1]) ** 0.5)
            for magnitude in self._all.experts.lora.magnitudes or ():  # off their start, where DoRA's vectors are 1
                magnitude.mul_(1 + 0.25 * torch.rand_like(magnitude))
        self._exact: LayerWeights | None = None

    def spec(self, sizes: Sizes) -> RethinkingSpec:
        """The settings of the layer at some rounds and top-k."""
        return RethinkingSpec(sizes.rounds, sizes.top_k, scale=SCALE)

    def weights(self, sizes: Sizes) -> LayerWeights:
        """The tensors; a layer of one round has no GRU."""
        return self._all if sizes.rounds > 1 else self._all._replace(gru=None)

    def exact(self, sizes: Sizes) -> LayerWeights:
        """The same values in fp64."""
        if self._exact is None:
            self._exact = cast_layer(self._all, torch.float64, requires_grad=True)
        return self._exact if sizes.rounds > 1 else self._exact._replace(gru=None)

    def ffn(self, sizes: Sizes, fold: str, backend: str) -> FusedGraphMoEFFN:
        """This package's layer over these parameters."""
        found = self._make_ffn(sizes, fold, backend)
        adapter: Any = found.lora_graphmoe["default"]
        adapter.router, adapter.experts = self.adapter.router, self.adapter.experts
        if sizes.rounds > 1:
            adapter.gru = self.adapter.gru
        return found

    def _make_ffn(self, s: Sizes, fold: str, backend: str) -> FusedGraphMoEFFN:
        mixed = "loramoe" if s.top_k == s.experts else "mola"
        config = GraphMoEConfig(
            method={"layer": "mixlora", "linear": mixed, "none": "lora"}[s.routers],
            use_dora=s.dora,
            r=s.rank,
            lora_alpha=int(SCALE * s.rank),
            lora_dropout=0.0,
            num_experts=s.experts,
            top_k=s.top_k,
            rounds=s.rounds,
            gru_hidden_scale=(s.gru_width + 0.5) / s.hidden,
            router_aux_loss_coef=0.0,
            fold=fold,
            backend=backend,
            init_lora_weights=False,
        )
        return FusedGraphMoEFFN(self.mlp, config)

    def definition(self, sizes: Sizes, exact: bool) -> Subject:
        """The plain definition of the layer over its values, in fp64 or in its own dtype."""
        weights = self.exact(sizes) if exact else self.weights(sizes)
        return over_tokens(
            lambda x: torch.cat([part.y for part in self._rethink(x, sizes, weights)]), trainable(weights)
        )

    def _rethink(self, x: Tensor, sizes: Sizes, weights: LayerWeights) -> Iterator[RethinkingOutput]:
        """The reference, which gathers weights per token: a few tokens at a time bound its memory."""
        for part in x.split(32):
            yield rethink(part, weights, self.spec(sizes), fold="never", backend="reference")

    def draw(self, tokens: int, seed: int) -> Tensor:
        """Random x [N, D]."""
        generator = torch.Generator(self.device.torch).manual_seed(seed)
        shape = (tokens, self.sizes.hidden)
        return torch.randn(*shape, generator=generator, device=self.device.torch).to(self.dtype)

    def input(self, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """x [N, D] and the rows of the sample, whose routing is decided beyond rounding in every round."""
        rows = sample_rows(sizes.tokens, self.device.torch)
        routers = max(1, len(self._all.experts.routers()))
        pool = self.draw(4 * routers * len(rows) + 16, seed=2)
        decided = pool[self.decided(pool, sizes)]
        if decided.shape[0] < len(rows):
            raise RuntimeError(f"only {decided.shape[0]} of {len(pool)} random tokens have a decided routing")
        x = self.draw(sizes.tokens, seed=3)
        x[rows] = decided[: len(rows)]
        return x, rows

    def decided(self, x: Tensor, sizes: Sizes) -> Tensor:
        """Which tokens of x [N, D] have a routing that rounding does not change in any round, [N] bool."""
        if sizes.top_k == sizes.experts:
            return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        with torch.no_grad():
            parts = [part.router_logits for part in self._rethink(x.double(), sizes, self.exact(sizes))]
        routings = [torch.stack([each for router in part for each in router]) for part in parts]
        logits = torch.cat(routings, dim=1)  # [routers * T, N, n]
        ordered = logits.sort(dim=-1, descending=True).values
        gap = ordered[..., sizes.top_k - 1] - ordered[..., sizes.top_k]
        return (gap > MARGIN.get(self.dtype, 0.0)).all(dim=0)

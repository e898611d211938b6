"""The whole layer: every way to compute it from one set of weights, and who of them is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.cases import DTYPES
from benchmarks.gpu.checks import Verdict, sample_rows, verdict
from benchmarks.gpu.devices import Device
from benchmarks.gpu.operators import Outputs
from benchmarks.providers import PROVIDERS
from graphmoe_kernels import DenseMLP, LayerWeights, RethinkingSpec, rethink
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.testing import cast_layer, trainable
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

# A sampled token's k-th and (k+1)-th logits are so far apart in every round that rounding does not choose.
MARGIN = 0.1
POOL = 256

Forward = Callable[[Tensor], Tensor]


class Provider(NamedTuple):
    """One way to compute the layer; ``checked`` is False for the dense MLP, which computes something else."""

    name: str
    forward: Forward
    module: nn.Module | None
    checked: bool = True


class Layer:
    """A layer's weights, its providers and its oracle.

    Args:
        sizes: of the layer; its tokens are not read.
        device: where it lies.
    """

    def __init__(self, sizes: Sizes, device: Device) -> None:
        self.sizes, self.device, self.dtype = sizes, device, DTYPES[sizes.dtype]
        torch.manual_seed(0)
        with torch.device(device.torch):
            config = LlamaConfig(hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_attention_heads=1)
            self.mlp = LlamaMLP(config).to(self.dtype)
        self.fused = self._ffn("auto", "triton")  # the adapter follows the MLP's device and dtype
        adapter: Any = self.fused.lora_graphmoe["default"]
        self.adapter = adapter
        with torch.no_grad():  # logits of the same spread at every width: that of D = 4096
            adapter.router.weight.mul_((4096 / sizes.hidden) ** 0.5)
        gru = None if adapter.gru is None else adapter.gru.tensors()
        base = DenseMLP(self.mlp.gate_proj.weight, self.mlp.up_proj.weight, self.mlp.down_proj.weight)
        self.weights = LayerWeights(base, adapter.router.weight, adapter.experts.tensors(), gru)
        self.spec = RethinkingSpec(sizes.rounds, sizes.top_k, scale=2.0)
        self._exact = cast_layer(self.weights, torch.float64, requires_grad=True)

    def _ffn(self, fold: str, backend: str) -> FusedGraphMoEFFN:
        s = self.sizes
        config = GraphMoEConfig(
            r=s.rank,
            lora_alpha=2 * s.rank,
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

    def sharing(self, fold: str, backend: str) -> FusedGraphMoEFFN:
        """A layer of other settings over the same parameters."""
        ffn = self._ffn(fold, backend)
        adapter: Any = ffn.lora_graphmoe["default"]
        adapter.router, adapter.experts, adapter.gru = self.adapter.router, self.adapter.experts, self.adapter.gru
        return ffn

    def provider(self, name: str) -> Provider:
        """One of `NAMES`.

        Raises:
            ValueError: an unknown name.
        """
        if name == "fused":
            return Provider(name, self.fused, self.fused)
        if name == "dense":
            return Provider(name, self.mlp, self.mlp, checked=False)
        if name == "peer":
            return Provider(name, PROVIDERS["peer_mixlora"].prepare(self.weights, self.spec), None)
        settings = {"torch": ("auto", "torch"), "literal": ("never", "torch"), "literal compiled": ("never", "torch")}
        if name not in settings:
            raise ValueError(f"unknown provider {name!r}; expected one of {', '.join(NAMES)}")
        ffn = self.sharing(*settings[name])
        if name == "literal compiled":
            torch._dynamo.reset()
            return Provider(name, torch.compile(ffn, dynamic=False), ffn)
        return Provider(name, ffn, ffn)

    def leaves(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        return trainable(self.weights)

    def input(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x [N, D] and the rows of the sample, whose routing is decided beyond rounding in every round."""
        generator = torch.Generator(self.device.torch).manual_seed(seed)

        def draw(count: int) -> Tensor:
            shape = (count, self.sizes.hidden)
            return torch.randn(*shape, generator=generator, device=self.device.torch).to(self.dtype)

        rows = sample_rows(tokens, self.device.torch)
        pool = draw(POOL)
        decided = pool[self._decided(pool)]
        if decided.shape[0] < len(rows):
            raise RuntimeError(f"only {decided.shape[0]} of {POOL} random tokens have a decided routing")
        x = draw(tokens)
        x[rows] = decided[: len(rows)]
        return x, rows

    def _decided(self, x: Tensor) -> Tensor:
        with torch.no_grad(), _recorded_logits() as seen:
            for part in x.split(32):  # the reference gathers weights per token
                self._reference(part.double(), self._exact)
        logits = torch.stack([torch.cat(seen[t :: self.spec.rounds]) for t in range(self.spec.rounds)])  # [T, N, n]
        if self.spec.top_k == self.sizes.experts:
            return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        ordered = logits.sort(dim=-1, descending=True).values
        return (ordered[..., self.spec.top_k - 1] - ordered[..., self.spec.top_k] > MARGIN).all(dim=0)

    def _reference(self, x: Tensor, weights: LayerWeights) -> Tensor:
        return rethink(x, weights, self.spec, fold="never", backend="reference").y

    def check(self, provider: Provider, x: Tensor, rows: Tensor, training: bool) -> Verdict:
        """Output on the sampled rows and, in training, every gradient of a loss over them, against fp64."""
        generator = torch.Generator(self.device.torch).manual_seed(7)
        upstream = torch.randn(len(rows), x.shape[1], generator=generator, device=x.device).to(x.dtype)
        exact = self._results(
            lambda a: self._reference(a, self._exact), x[rows].double(), upstream, self._exact, training
        )
        plain = self._results(lambda a: self._reference(a, self.weights), x[rows], upstream, self.weights, training)
        set_mode(provider, training)
        wide = torch.zeros_like(x).index_copy_(0, rows, upstream)
        found = self._results(provider.forward, x, wide, self.weights, training)
        found = {name: t[rows] if name in ("y", "x") else t for name, t in found.items()}
        floor = 1e-3 * torch.linalg.vector_norm(upstream.double()).item() if training else 0.0
        return verdict(found, plain, exact, self.dtype, floor)

    def _results(self, forward: Forward, x: Tensor, upstream: Tensor, weights: LayerWeights, training: bool) -> Outputs:
        if not training:
            with torch.no_grad():
                return {"y": forward(x)}
        leaf = x.detach().clone().requires_grad_()
        leaves = {"x": leaf, **trainable(weights)}
        y = forward(leaf)
        grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype), allow_unused=True)
        found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}
        return {"y": y.detach(), **found}

    def step(self, provider: Provider, x: Tensor, upstream: Tensor) -> Callable[[], object]:
        """Forward and backward: the gradients of x and, but for the dense MLP, of every trainable tensor."""
        leaves = list(self.leaves().values()) if provider.checked else []

        def train() -> object:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(provider.forward(leaf), [leaf, *leaves], upstream, allow_unused=True)

        return train


NAMES = ("fused", "dense", "literal", "torch", "literal compiled", "peer")


def set_mode(provider: Provider, training: bool) -> None:
    """Training or evaluation mode, for providers that have one."""
    if provider.module is not None:
        provider.module.train(training)


@contextmanager
def _recorded_logits() -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    original = rounds.route

    def route(*arguments: Any, **options: Any) -> Any:
        routing = original(*arguments, **options)
        seen.append(routing.logits)
        return routing

    with mock.patch.object(rounds, "route", route):
        yield seen

"""`generate` on a small whole model in one case: the base model, plain LoRA, and this package through PEFT."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cases import Case, Contender
from benchmarks.checks import Verdict, device_error
from benchmarks.layers import Layers
from benchmarks.operators import DTYPES
from benchmarks.sizes import VOCABULARY, Model
from benchmarks.timing import Prepared
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.testing import within_budget
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# provider -> (fold, backend) of the adapter
SETTINGS = {"triton": ("auto", "triton"), "torch": ("auto", "torch"), "literal": ("never", "torch")}


class GenerationTiming:
    """The contenders of the case of the group ``model``.

    All share the base model's parameters. Adapters are put on as users do it, on MLPs and attention, with random
    weights: how good the text is does not matter, that every product is done does.
    """

    def __init__(self, case: Case, layers: Layers) -> None:
        self.case, self.sizes, self.new_tokens = case, case.contenders[0].sizes, case.new_tokens
        self.dtype, device = DTYPES[self.sizes.dtype], layers.device.torch
        self.base = make_model(case.model, case.layers, self.dtype, device)
        generator = torch.Generator(device).manual_seed(9)
        self.prompt = torch.randint(VOCABULARY, (1, case.context or 1), generator=generator, device=device)

    def prepare(self, contender: Contender) -> Prepared:
        """A call makes `new_tokens` tokens, greedily, and never stops before."""
        model = with_adapter(self.base, contender.provider, contender.sizes)

        def generate() -> Tensor:
            with torch.no_grad():
                return model.generate(
                    input_ids=self.prompt,
                    attention_mask=torch.ones_like(self.prompt),
                    do_sample=False,
                    min_new_tokens=self.new_tokens,
                    max_new_tokens=self.new_tokens,
                    pad_token_id=0,
                )

        return Prepared(contender, lambda: self._check(model, contender, generate()), generate, units=self.new_tokens)

    def _check(self, model: nn.Module, contender: Contender, generated: Tensor) -> Verdict:
        """Logits of the prompt against the plain definitions in fp64, and as many tokens as were asked for.

        By the median of the positions' errors: where rounding lets a token choose another expert, it alone is off. The
        base model and plain LoRA are the code of Transformers and PEFT as it is: there is nothing to hold them to.
        """
        expected = self.prompt.shape[1] + self.new_tokens
        if generated.shape != (1, expected):
            return Verdict({}, f"generated {tuple(generated.shape)} instead of (1, {expected}) tokens")
        if contender.provider not in SETTINGS:
            return Verdict({}, None)
        plain = as_reference(model)
        exact = as_reference(copy.deepcopy(model).double())
        with torch.no_grad():
            found, own, oracle = (m(input_ids=self.prompt).logits[0] for m in (model, plain, exact))  # [S, V] each
        errors = [
            torch.tensor([device_error(row, true) for row, true in zip(each, oracle, strict=True)]).median().item()
            for each in (found, own)
        ]
        fits = within_budget(errors[0], errors[1], self.dtype)
        fault = None if fits else f"logits: error {errors[0]:.1e}, the plain computation's own is {errors[1]:.1e}"
        return Verdict({"logits": (errors[0], errors[1])}, fault)


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
    return model.to(dtype).eval()


def with_adapter(base: LlamaForCausalLM, provider: str, sizes: Sizes) -> Any:
    """The model with a provider's adapter; it shares the base model's parameters, and leaves ``base`` alone.

    Raises:
        ValueError: a provider that is no way to run a model.
    """
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if provider == "dense":
        return model
    if provider == "peft_lora":
        targets = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=targets, init_lora_weights=False)
        return get_peft_model(model, lora).eval()
    if provider not in SETTINGS:
        raise ValueError(f"{provider!r} is no way to run a model; expected dense, peft_lora, {', '.join(SETTINGS)}")
    fold, backend = SETTINGS[provider]
    config = GraphMoEConfig(
        r=sizes.rank,
        lora_alpha=2 * sizes.rank,
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        rounds=sizes.rounds,
        fold=fold,
        backend=backend,
        init_lora_weights=False,
    )
    return get_peft_model(model, config).eval()


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

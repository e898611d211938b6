"""The model that vLLM runs: its own for the base, with an adapter's layers in it once the weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from graphmoe_inference.folder import BASE, WEIGHTS, read_export
from graphmoe_vllm.config import BASES
from graphmoe_vllm.layers import FUSED, adapt


class GraphMoEForCausalLM(nn.Module):
    """A causal language model that ``graphmoe export`` wrote.

    Args:
        vllm_config: vLLM's settings of the engine; ``model_config.hf_config`` is of `ExportedConfig`.
        prefix: of its layers' names.

    Raises:
        ValueError: the engine is to do what the layers cannot (see `check_engine`), or as `read_export`.
    """

    # vLLM's loader looks for weights by these patterns in the model's folder; the base lies in one of its own.
    allow_patterns_overrides = (f"{BASE}/*.safetensors",)
    fall_back_to_pt_during_load = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        check_engine(vllm_config)
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        self.folder = Path(model_config.model)
        self.exported = read_export(self.folder)
        module, _, name = BASES[self.config.model_type].partition(":")
        self.base = getattr(import_module(module), name)(vllm_config=vllm_config, prefix=prefix)
        self._layers = vllm_config.compilation_config.static_forward_context
        self._adapted = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [N, D] of token ids [N]."""
        return self.base.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Hidden states [N, D] of the batch's tokens, one sequence after the other.

        Args:
            input_ids: [N]; None where there are embeddings.
            positions: [N], of the tokens in their sequences.
            intermediate_tensors: None, as there is one pipeline stage.
            inputs_embeds: [N, D].

        Raises:
            RuntimeError: the adapter was never loaded.
        """
        if not self._adapted:
            raise RuntimeError("the adapter's weights were not loaded; use --load-format auto or safetensors")
        return self.base(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [N, V] of hidden states [N, D]."""
        return self.base.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's weights, then put the adapter's layers over them.

        Args:
            weights: the base's, by the names of its files.

        Returns:
            The names of all parameters.

        Raises:
            ValueError: the base lacks weights, or has others; the adapter does not fit it.
            RuntimeError: they were loaded before.
        """
        if self._adapted:
            raise RuntimeError("the weights of a GraphMoE model are loaded once; start the engine again for others")
        in_files: set[str] = set()
        loaded = self.base.load_weights(_noted(weights, in_files))
        if missing := self._missing(loaded, in_files):
            raise ValueError(f"{self.folder / BASE} lacks weights: {missing[:4]}; export the model again")
        device = next(self.base.parameters()).device
        # Copies: a file's tensors lie where the file has them, and products at odd addresses round otherwise.
        tensors = {key: tensor.clone().to(device) for key, tensor in load_file(self.folder / WEIGHTS).items()}
        adapt(self.base, self.exported, tensors, str(self.folder), self._layers)
        self.requires_grad_(False)
        self._adapted = True
        return {name for name, _ in self.named_parameters()}

    def _missing(self, loaded: set[str], in_files: set[str]) -> list[str]:
        """Name the weights that were in no file: vLLM lets them pass, and would compute with what memory held.

        It counts a fused linear as loaded once it has one of its parts.
        """
        missing = []
        for name, _ in self.base.named_parameters():
            if not name.endswith((".weight", ".bias")):
                continue
            *parent, last, kind = name.split(".")
            parts = [".".join((*parent, part, kind)) for part in FUSED.get(last, ())]
            if name not in loaded:
                missing.append(name)
            elif parts and name not in in_files:
                missing += [part for part in parts if part not in in_files]
        return sorted(missing)


def _noted(weights: Iterable[tuple[str, Tensor]], names: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        names.add(name)
        yield name, tensor


def check_engine(vllm_config: Any) -> None:
    """Check that the engine asks nothing that the layers cannot do.

    Args:
        vllm_config: vLLM's settings of the engine.

    Raises:
        ValueError: several devices share a layer or the layers, weights are quantised or made up, LoRA of vLLM's own
            is on, or the model is no folder.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for option in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = getattr(parallel, option)
        if size != 1:
            raise ValueError(
                f"{option} is {size}, and GraphMoE's layers need a model whole on one device; set it to 1 (more "
                "devices serve more requests by data_parallel_size)"
            )
    if vllm_config.quant_config is not None or model.quantization is not None:
        raise ValueError(
            f"quantization is {model.quantization!r}, and experts need dense weights; leave --quantization out"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "LoRA is enabled in vLLM, whose layers GraphMoE's replace; leave --enable-lora out: the exported folder "
            "has its adapter"
        )
    if vllm_config.load_config.load_format not in ("auto", "hf", "safetensors"):
        raise ValueError(
            f"load_format is {vllm_config.load_config.load_format!r}, which reads no exported folder; use auto"
        )
    if not Path(model.model).is_dir():
        raise ValueError(f"there is no folder {model.model}; copy the exported model here and name its folder")

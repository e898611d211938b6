"""An engine's settings, as far as the plugin and the loader read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig

from .model_executor.models.registry import ModelRegistry


@dataclass
class ModelConfig:
    """The configuration is read by Transformers, the tokenizer from the model's folder unless another is named."""

    model: str
    tokenizer: str | None = None
    dtype: torch.dtype | None = None
    quantization: str | None = None
    hf_config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.hf_config = AutoConfig.from_pretrained(self.model)
        self.tokenizer = self.tokenizer or self.model
        self.dtype = self.dtype or self.hf_config.dtype or torch.float32
        self.model_class = ModelRegistry.resolve_model_cls(self.hf_config.architectures)


@dataclass
class ParallelConfig:
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


@dataclass
class LoadConfig:
    load_format: str = "auto"


@dataclass
class CompilationConfig:
    static_forward_context: dict[str, Any] = field(default_factory=dict)


@dataclass
class VllmConfig:
    model_config: ModelConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    load_config: LoadConfig = field(default_factory=LoadConfig)
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    quant_config: Any = None
    lora_config: Any = None

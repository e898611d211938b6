"""What the analyses of a trained adapter share: its checks, the loaded model, prompts, and the conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from graphmoe_cli.analyze_options import ModelOptions
from graphmoe_cli.runs.evaluate import DTYPES
from graphmoe_cli.runs.terminal import hide_loading_bars
from graphmoe_model.base_models import ModelSource, check_base, load_base_model, load_tokenizer
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.evaluation.document import adapter_settings, conditions_of
from graphmoe_model.machine import chosen_device
from graphmoe_model.presentation import short_model, short_paths
from graphmoe_model.profiling.models import adapter_title
from graphmoe_model.questions import QuestionEncoder, QuestionSet


class AnalyzedModel:
    """A base model and the saved adapters that are put on it, one after the other.

    Args:
        options: of the command.

    Raises:
        ValueError: whatever is wrong with an adapter, or the device, before the model is
            loaded; then what is wrong with the model.
    """

    def __init__(self, options: ModelOptions, at_least_rounds: int = 1) -> None:
        hide_loading_bars()
        self.options, self.device = options, chosen_device(options.device)
        self.configs = {name: _checked(name, options, at_least_rounds) for name in options.adapter}
        dtype = DTYPES.get(options.dtype)
        self._source = ModelSource(options.model, options.gguf_file, dtype=dtype, device=str(self.device))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._source)
        self._base: Any = None

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer: as asked for, else what the model has positions for."""
        positions = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        return self.options.max_length or positions or 2048

    @property
    def base(self) -> Any:
        """The base model, loaded when it is first needed."""
        if self._base is None:
            self._base = load_base_model(self._source)
        return self._base

    @contextmanager
    def adapted(self, name: str) -> Iterator[Any]:
        """Put an adapter on the model for the time of the block."""
        model = attach_adapter(self.base, name, self.configs[name])
        try:
            yield model
        finally:
            self._base = model.unload()

    def title(self, name: str) -> str:
        """Return what tables call an adapter: its method, and its folder where another has that method too."""
        titles = [adapter_title(config) for config in self.configs.values()]
        own = adapter_title(self.configs[name])
        return own if titles.count(own) == 1 else f"{own}, {short_paths(list(self.configs))[name]}"

    def prompts(self, questions: QuestionSet | Sequence[Any]) -> list[list[int]]:
        """Return the token ids of what `graphmoe eval` has the model read of each question by the first token."""
        encoder = QuestionEncoder(self.tokenizer, self.max_length)
        return [encoder.prompt_ids(question) for question in questions]

    def asked(self) -> dict[str, Any]:
        """Say which model and adapters are analyzed, before they are loaded."""
        return {
            "model": self.options.model,
            "gguf_file": self.options.gguf_file,
            "adapters": {name: adapter_settings(config) for name, config in self.configs.items()},
        }

    def conditions(self) -> dict[str, Any]:
        """Say with what and when, for the JSON."""
        return {
            **conditions_of(self.base, self.device),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.asked(),
            "batch_size": self.options.batch_size,
            "max_length": self.max_length,
        }

    def described(self) -> str:
        """Say it on one line, for a picture."""
        found = self.conditions()
        name = self.options.gguf_file or short_model(self.options.model)
        return f"{name}, {found['dtype']}, {found['device']}, torch {torch.__version__}"


def _checked(name: str, options: ModelOptions, at_least_rounds: int) -> PeftConfig:
    config = saved_config(name)
    if not isinstance(config, GraphMoEConfig) or config.base_method.routers is None:
        raise ValueError(
            f"the adapter {name} is {adapter_title(config)}, which has no router, so there is no routing to analyze; "
            "name one of MixLoRA, LoRAMoE, MoLA or GraphMoE on them"
        )
    if config.rounds < at_least_rounds:
        raise ValueError(
            f"the adapter {name} is {adapter_title(config)}: it has one round, so there are no rounds to compare; name "
            "one of two rounds or more"
        )
    if not options.allow_other_base:
        check_base(config, name, options.model)
    return config

"""The model in memory as lm-eval calls it."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api import task
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

# Told how many of how many prompts are done; one per label scoring, one per choice of texts.
Progress = Callable[[int, int], None]


class InMemoryLM(HFLM):
    """lm-eval's language model over a loaded model, adapters included.

    Log-probabilities are taken in fp32 whatever the model's dtype: in bf16 those of two labels often are the same
    number where their logits differ.

    Args:
        model: a causal language model; it is set to evaluation mode.
        tokenizer: of that model; it stays as it is.
        batch_size: prompts per forward.
        max_length: tokens of a prompt with its answer; None: what the model's configuration says.
        progress: is told how far the forwards are.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        # HFLM gives its tokenizer a padding token, and asks for one that begins empty prompts, of which there are none.
        first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype=torch.float32,
            prefix_token_id=first,
        )
        self._progress, self._done, self._total = progress, 0, 0

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        del disable_tqdm  # `progress` shows it
        # Those that differ in their last token alone share a forward.
        forwards = {(*context, *answer[:-1]) for _, context, answer in requests}
        self._done, self._total = 0, len(forwards)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits = super()._model_call(inps, attn_mask, labels)
        if self._progress is not None:
            self._done += len(inps)
            self._progress(min(self._done, self._total), self._total)
        return logits


class QuestionLM(InMemoryLM):
    """Reads the tokens that `QuestionEncoder` made of each question, so that lm-eval neither tokenizes nor cuts.

    By itself it would cut a long prompt's beginning-of-sequence token off, and cut each choice's prompt elsewhere.
    """

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-probability of each request's answer, and whether it is the most likely text."""
        encoded = [(r.args, list(r.doc["prompt_ids"]), list(r.doc["choice_ids"][r.idx])) for r in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Leave out what nothing here reads: what lm-eval logs at each start, its progress bars over work of milliseconds,
    and its description of the machine (seconds of ``pip list``, ``nvidia-smi`` and ``git``).

    Python's random numbers are put back: lm-eval draws names for tasks whether it needs them or not.
    """
    logger = logging.getLogger("lm_eval")
    level, bar, state = logger.level, task.tqdm, random.getstate()
    describe, commit = evaluator.add_env_info, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)
    evaluator.add_env_info, evaluator.get_git_commit_hash = lambda results: None, lambda: None
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm, evaluator.add_env_info, evaluator.get_git_commit_hash = bar, describe, commit
        random.setstate(state)

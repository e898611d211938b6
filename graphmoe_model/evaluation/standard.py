"""lm-eval's own tasks, on the model in memory."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from graphmoe_model.base_models import hub_is_reachable
from graphmoe_model.evaluation.language_model import InMemoryLM, Progress, quiet_lm_eval
from graphmoe_model.messages import first_line


def check_reachable(names: Sequence[str]) -> None:
    """Refuse lm-eval's tasks where their data would be asked of a hub that does not answer.

    Raises:
        ValueError: says what to do.
    """
    if names and not constants.is_offline_mode() and not hub_is_reachable():
        raise ValueError(
            f"lm-eval's tasks ({', '.join(names)}) read their data from the hub, and {constants.ENDPOINT} cannot be "
            "reached; where the data is in the cache, set HF_HUB_OFFLINE=1, or name a .jsonl file by --data"
        )


def evaluate_standard(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    shots: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks that lm-eval comes with.

    Args:
        model: a causal language model with or without adapters; it is set to evaluation mode.
        tokenizer: of that model.
        names: of lm-eval's tasks, groups or tags.
        shots: how many examples; None: each task's own number.
        batch_size: prompts per forward.
        limit: how many questions per task at most.
        max_length: tokens of a prompt with its answer; None: the model's own limit.
        seed: of lm-eval's random numbers, the choice of examples among them.
        progress: is told how far the forwards are.

    Returns:
        Task -> lm-eval's metrics, its number of questions as ``questions``.

    Raises:
        ValueError: a name that lm-eval does not have, or data that cannot be had.
    """
    with quiet_lm_eval():
        manager = TaskManager()
        known = manager.all_tasks
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=5)
                hint = (
                    f"near it are {', '.join(near)}" if near else f"it has {len(known):,}, which lm-eval ls tasks lists"
                )
                raise ValueError(f"lm-eval has no task {name!r}; {hint}")
        try:
            found = simple_evaluate(
                model=InMemoryLM(model, tokenizer, batch_size, max_length, progress),
                tasks=list(names),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, KeyError) as error:  # ConnectionError, and what datasets says of a missing cache
            raise ValueError(
                f"lm-eval cannot load the data of {', '.join(names)}: {first_line(error)}; load it once on a machine "
                "with a connection and copy the cache (HF_HOME), or name a .jsonl file by --data"
            ) from error
    return {name: _metrics(found, name) for name in found["results"]}


def _metrics(found: dict[str, Any], name: str) -> dict[str, Any]:
    """A task's metrics by their plain names; lm-eval appends the filter, which mostly is 'none'."""
    counts = found["n-samples"].get(name)
    metrics: dict[str, Any] = {} if counts is None else {"questions": counts["effective"]}
    for key, value in found["results"][name].items():
        if isinstance(value, (int, float)) and key not in ("sample_len", "sample_count"):
            metrics[key.removesuffix(",none")] = float(value)
    return metrics

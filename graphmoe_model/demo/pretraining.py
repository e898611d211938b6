"""Teaching a small model that is made from nothing: what comes before an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from graphmoe_model.training.callbacks import LastStep, ProgressLine
from graphmoe_model.training.rows import make_collator


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    *,
    title: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    say: Callable[[str], None] = print,
) -> None:
    """Train all weights of a model, on a CPU.

    It is Transformers' Trainer as it comes and no recipe: a recipe is an adapter's, over a base model that stays as it
    is, and its data are questions alone, where this model reads texts too.

    Args:
        model: with random weights.
        tokenizer: of that model.
        rows: ``input_ids`` and ``labels`` of each text, a list or a dataset.
        title: of the bar that shows how far it is, and of the lines where there is no terminal.
        steps, batch_size, learning_rate, seed: of AdamW; the rate rises in the first fifteenth of the steps and falls
            by a cosine.
        say: takes a line for each tenth of the steps where there is no terminal.

    Raises:
        DivergedError: the loss is no number any more.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            adam_beta2=0.98,
            warmup_steps=max(1, steps // 15),
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 10),
            logging_nan_inf_filter=False,  # with it a loss that is not finite would be logged as an earlier one
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=make_collator(tokenizer, model, packing=False),
            callbacks=[LastStep(), ProgressLine(lambda line: say(f"{title}, {line}"), title)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

"""Questions as rows of token ids, put together to batches."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from graphmoe_model.questions import Question, QuestionEncoder, count_shared
from graphmoe_model.questions.encoding import IGNORED
from graphmoe_tables.methods import preset_settings
from graphmoe_tables.recipe import TrainingRecipe


class Rows(NamedTuple):
    """What a run reads.

    Attributes:
        dataset: ``input_ids`` and ``labels``; where questions share a row, ``seq_lengths`` too.
        questions: how many there were.
        truncated: how many of them lost their start.
        digest: SHA-256 of all ids and labels before packing, in their order.
    """

    dataset: Dataset
    questions: int
    truncated: int
    digest: str


def make_rows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, recipe: TrainingRecipe, *, packing: bool
) -> Rows:
    """Encode questions; ``packing`` puts several into one row, none of them cut.

    Raises:
        ValueError: there are none, or a label is not one token of this tokenizer (`QuestionEncoder.check_labels`).
    """
    if not questions:
        raise ValueError("there are no questions; name a task or a file with at least one by --data (--eval-data)")
    encoder = QuestionEncoder(tokenizer, recipe.max_length)
    encoder.check_labels(questions)
    rows = [encoder.training_row(question, recipe.whole_sequence) for question in questions]
    digest = hashlib.sha256(json.dumps([[row["input_ids"], row["labels"]] for row in rows]).encode()).hexdigest()
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    dataset = Dataset.from_dict(columns)
    if packing:
        dataset = pack_dataset(dataset, recipe.max_length, "bfd", {"load_from_cache_file": False})
    return Rows(dataset, len(rows), encoder.truncated, digest)


def notes_on(
    recipe: TrainingRecipe,
    asked_length: int,
    rows: Rows,
    questions: Sequence[Question],
    eval_questions: Sequence[Question],
) -> Iterator[str]:
    """Yield what the user should know before training begins."""
    yield from _note_on_scale(recipe)
    if recipe.max_length < asked_length:
        yield (
            f"--max-length {asked_length} is more than the {recipe.max_length} positions that the model has: rows have "
            f"up to {recipe.max_length} tokens"
        )
    if rows.truncated:
        more = "the model" if recipe.max_length < asked_length else "--max-length"
        yield (
            f"{rows.truncated} of {rows.questions} questions are longer than {recipe.max_length} tokens and lose their "
            f"start; {more} sets how many there may be"
        )
    if shared := count_shared(eval_questions, questions):
        yield (
            f"{shared:,} of {len(eval_questions):,} questions of --eval-data are in --data too: their loss is of what "
            "was learned by heart, and chooses the checkpoint by it; leave them out of one of the two"
        )


def _note_on_scale(recipe: TrainingRecipe) -> Iterator[str]:
    """A rank that is given alone changes the scale alpha / r with it, as in PEFT."""
    if recipe.preset is None or recipe.use_rslora:
        return
    preset = preset_settings(recipe.preset)
    r, alpha = recipe.r, recipe.lora_alpha
    if r is not None and alpha is not None and alpha == preset["lora_alpha"] and r != preset["r"]:
        yield (
            f"--r {r} with the preset's alpha of {alpha} is a scale alpha / r of {alpha / r:g}, where the preset has "
            f"{alpha / preset['r']:g}; for that one give --lora-alpha {alpha * r / preset['r']:g} too"
        )


def make_collator(tokenizer: PreTrainedTokenizerBase, model: nn.Module, *, packing: bool) -> Any:
    """Return what makes batches of rows: padded on the right, or packed rows joined without any padding.

    Padding has no label and is left out by the attention mask. The questions of a packed row are kept apart by their
    position ids, and the first token of each has no label, as what stands before it is another question.

    A model that can leave logits out (Transformers' ``logits_to_keep``) is asked for those alone that a label is
    compared with: `LabelledLogits`.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None and not packing:
        raise ValueError("the tokenizer has neither a padding nor an end token to fill rows with; pass --packing")
    whole = DataCollatorForLanguageModeling(padding or 0, padding_free=packing)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return LabelledLogits(whole) if "logits_to_keep" in inspect.signature(base.forward).parameters else whole


class LabelledLogits:
    """Batches whose logits are computed at positions that have a label in some row, and nowhere else.

    With the loss on each answer's one token a batch of B questions needs at most B positions of logits, not all of
    their tokens: for Llama-3's 128,256 entries and 4,096 tokens that saves 2.1 GB in fp32, and its gradient.

    Args:
        whole: makes batches with ``labels`` [B, S].
    """

    def __init__(self, whole: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.whole = whole

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch with ``logits_to_keep`` [K], positions, and ``shift_labels`` [B, K], what follows them."""
        batch = self.whole(rows)
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # [B, S]: of each position's next token
        kept = (following != IGNORED).any(dim=0).nonzero().squeeze(1)  # [K]
        batch["logits_to_keep"], batch["shift_labels"] = kept, following[:, kept]
        # The loss reads shift_labels. Whoever counts labels, with their first column or without, counts the same.
        batch["labels"] = F.pad(batch["shift_labels"], (1, 0), value=IGNORED)  # [B, 1 + K]
        return batch

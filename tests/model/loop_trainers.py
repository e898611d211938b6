"""Every trainer of the table of training loops, over a tiny Llama and a few words, at its defaults but for sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from graphmoe_model import RouterLossCallback, router_loss
from tests.model.tiny_models import VOCABULARY, tiny_config, tiny_model

datasets = pytest.importorskip("datasets")  # the train extra; a machine may run the other tests without it
trl = pytest.importorskip("trl")

ADAPTER = {"rounds": 3, "init_lora_weights": False, "router_aux_loss_coef": 0.5}


def words(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0 to w63."""
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, padding_side=padding_side, **special)


def policy() -> PeftModel:
    """A causal language model with an adapter that is away from its start."""
    return get_peft_model(tiny_model(), tiny_config(**ADAPTER))


def reward_model() -> PeftModel:
    """A model with one score a sequence, its head trained and saved beside the adapter."""
    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config)
    return get_peft_model(base, tiny_config(**{**ADAPTER, "task_type": "SEQ_CLS"}))


class KeepGradients(TrainerCallback):
    """Every step's gradients by parameter, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.detach().clone() for n, p in named if p.requires_grad and p.grad is not None})


PROMPTS = ["w5 w6 w7 w8", "w9 w10", "w20 w21 w22"]
ANSWERS = ["w11 w12 w13 w14 w15", "w16", "w17 w18"]
OTHERS = ["w30", "w31 w32 w33 w34", "w35 w36 w37"]


def rows(count: int, **columns: list) -> Any:
    """A dataset of the columns, each repeated to the count."""
    return datasets.Dataset.from_dict({name: [v[i % len(v)] for i in range(count)] for name, v in columns.items()})


def texts(count: int, distinct: int = 3) -> Any:
    return rows(count, text=[f"{p} {a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)][:distinct])


def pairs(count: int, distinct: int = 3) -> Any:
    return rows(count, prompt=PROMPTS[:distinct], chosen=ANSWERS[:distinct], rejected=OTHERS[:distinct])


def judged(count: int, distinct: int = 3) -> Any:
    """Completions in turn good and bad."""
    answers = [answer for both in zip(ANSWERS, OTHERS, strict=True) for answer in both][: 2 * distinct]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)][: 2 * distinct]
    return rows(count, prompt=prompts, completion=answers, label=[True, False])


def prompts(count: int, distinct: int = 3) -> Any:
    return rows(count, prompt=PROMPTS[:distinct])


def token_rows(count: int, distinct: int = 3) -> list[dict[str, list[int]]]:
    """As `texts`, for Trainer: ids and labels."""
    encoded = [words()(row["text"])["input_ids"] for row in texts(count, distinct)]
    return [{"input_ids": ids, "labels": ids} for ids in encoded]


def word_count_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """GRPO's: how many different words there are, so that completions of a group differ."""
    return [float(len(set(completion.split())) + len(completion) % 3) for completion in completions]


class RewardTrainerWithRouterLoss(trl.RewardTrainer):
    """The way docs/training.md gives: TRL's RewardTrainer ignores ``outputs.loss``."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            loss = loss + router_loss(model)
        return (loss, outputs) if return_outputs else loss


class Kind(NamedTuple):
    """How to make one trainer.

    Attributes:
        trainer, arguments: its classes.
        model: makes what it trains.
        data: makes its dataset from a row count and how many of the rows differ.
        options: what it needs beyond `sizes`, of the arguments.
        more: further arguments of the trainer itself.
        logs: whether ``aux_loss`` is in its logs.
    """

    trainer: type[Trainer]
    arguments: type[TrainingArguments]
    model: Callable[[], nn.Module]
    data: Callable[..., Any]
    options: dict[str, Any]
    more: Callable[[], dict[str, Any]]
    logs: bool = True


def _tokenizer() -> dict[str, Any]:
    return {"processing_class": words("left")}


def _collator() -> dict[str, Any]:
    return {"data_collator": DataCollatorForTokenClassification(words()), "callbacks": [RouterLossCallback()]}


GENERATION = {"num_generations": 2, "max_completion_length": 4}
KINDS = {
    "SFT": Kind(trl.SFTTrainer, trl.SFTConfig, policy, texts, {}, _tokenizer),
    "DPO": Kind(trl.DPOTrainer, trl.DPOConfig, policy, pairs, {}, _tokenizer),
    "DPO from a base model": Kind(
        trl.DPOTrainer,
        trl.DPOConfig,
        tiny_model,
        pairs,
        {},
        lambda: {**_tokenizer(), "peft_config": tiny_config(**ADAPTER)},
    ),
    "KTO": Kind(trl.KTOTrainer, trl.KTOConfig, policy, judged, {}, _tokenizer),
    "KTO from a base model": Kind(
        trl.KTOTrainer,
        trl.KTOConfig,
        tiny_model,
        judged,
        {},
        lambda: {**_tokenizer(), "peft_config": tiny_config(**ADAPTER)},
    ),
    "GRPO": Kind(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        policy,
        prompts,
        GENERATION,
        lambda: {**_tokenizer(), "reward_funcs": word_count_reward},
    ),
    "GRPO with a reference": Kind(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        policy,
        prompts,
        {**GENERATION, "beta": 0.1},
        lambda: {**_tokenizer(), "reward_funcs": word_count_reward},
    ),
    "Reward": Kind(RewardTrainerWithRouterLoss, trl.RewardConfig, reward_model, pairs, {}, _tokenizer, logs=False),
    "Trainer": Kind(Trainer, TrainingArguments, policy, token_rows, {}, _collator),
}


def sizes(output_dir: Any, rows_a_step: int, accumulation: int) -> dict[str, Any]:
    """Two logged steps on the CPU over rows in their order; nothing clipped, saved or reported."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": rows_a_step // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


class Outcome(NamedTuple):
    """A trainer after its steps, every step's logs and gradients, and the adapter before the first."""

    trainer: Trainer
    logs: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    start: dict[str, Tensor]


def trained(
    kind: str,
    output_dir: Any,
    *,
    rows_a_step: int = 4,
    accumulation: int = 1,
    distinct: int = 3,
    trainer: type[Trainer] | None = None,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """Two steps of a trainer of `KINDS`, at its defaults but for ``options``; ``more`` are the trainer's own."""
    made = KINDS[kind]
    arguments = made.arguments(**{**sizes(output_dir, rows_a_step, accumulation), **made.options, **options})
    datasets.disable_progress_bars()
    given = {**made.more(), **(more or {})}
    kept = KeepGradients()
    run = (trainer or made.trainer)(
        made.model(), args=arguments, train_dataset=made.data(2 * rows_a_step, distinct), **given
    )
    run.add_callback(kept)
    start = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    return Outcome(run, [log for log in run.state.log_history if "loss" in log], kept.steps, start)

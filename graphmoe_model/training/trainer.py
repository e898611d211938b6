"""Transformers' Trainer with the recipe's optimizer groups, and checkpoints that are whole or known not to be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from graphmoe_model.parameters import optimizer_groups
from graphmoe_model.training.run_folder import COMPLETE, PREFIX, complete, rotate
from graphmoe_tables.recipe import TrainingRecipe

_FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",  # an adapter is saved whole
}


class RecipeTrainer(Trainer):
    """Trains by a recipe.

    It is Trainer and not TRL's SFTTrainer: the rows are ids and labels already, so what SFTTrainer does to texts has
    nothing to do, while it would compute the entropy of all logits at every step, hold the adapter of a quantised base
    in bf16, and under ZeRO-3 force the reentrant kind of checkpointing, which leaves the router loss without a
    gradient. Packing and the joining of packed rows are TRL's.
    """

    def __init__(self, recipe: TrainingRecipe, *args: Any, **kwargs: Any) -> None:
        self.recipe = recipe
        super().__init__(*args, **kwargs)
        # A recipe leaves the vocabulary as it is. PEFT would ask at every save whether it has grown: the folder's
        # config.json, which one of a GGUF file lacks, or the hub, for a minute where that does not answer.
        saved: Any = self.model
        saved.save_pretrained = partial(saved.save_pretrained, save_embedding_layers=False)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make AdamW over `optimizer_groups`."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            recipe = self.recipe
            groups = optimizer_groups(
                trained,
                learning_rate=recipe.learning_rate,
                experts=recipe.expert_learning_rate,
                router=recipe.router_learning_rate,
                gru=recipe.gru_learning_rate,
                attention=recipe.attention_learning_rate,
                weight_decay=recipe.weight_decay,
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train nothing where a run is gone on with whose steps are all done: Trainer would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, mark it as whole, and only then remove older ones."""
        folder = Path(self.recipe.output)
        own = folder / f"{PREFIX}{self.state.global_step}"
        if self.args.should_save:
            (own / COMPLETE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete(own)
            rotate(folder, self.recipe.keep_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


class RecipeArguments(TrainingArguments):
    """Trainer's arguments, whose device can be read checkpoints to.

    Of several processes without a GPU it is ``cpu:0`` by Accelerate, which ``torch.load`` does not know: a run of them
    could not be resumed.
    """

    @property
    def device(self) -> torch.device:
        """This process's device, without a number where it is the CPU."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found


def _checkpointing(enabled: bool) -> dict[str, Any]:
    """Name checkpointing as the installed Transformers does: its newest deprecates "gradient"."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False} if enabled else None}


def check_processes(recipe: TrainingRecipe, state: PartialState, processes: int) -> None:
    """`ValueError` if Accelerate, finding no GPU to split a model over, would train in each process on its own."""
    if state.num_processes != processes:
        option = "fsdp" if recipe.fsdp else "deepspeed"
        raise ValueError(
            f"--{option} needs a GPU for each process, and there is none: each of the {processes} processes would "
            f"train a model of its own; leave --{option} out to train by DDP"
        )


def make_arguments(recipe: TrainingRecipe, processes: int, steps: int) -> TrainingArguments:
    """Return Trainer's arguments for a recipe whose machine-dependent fields are set.

    Args:
        recipe: `graphmoe_model.training.run.fitted` to the machine.
        processes: how many train together.
        steps: of the whole run.

    Raises:
        ValueError: the batch cannot be shared out equally, or Transformers refuses something.
    """
    evaluates = recipe.eval_data is not None
    assert recipe.save_steps is not None  # set by then
    fsdp: Any = True if recipe.fsdp else None  # a text in the annotation, and a text is deprecated
    return RecipeArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=recipe.batch // processes,
        per_device_eval_batch_size=max(1, recipe.batch // processes),
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=round(recipe.warmup * steps),
        seed=recipe.seed,
        bf16=bool(recipe.bf16),
        # Accelerate shards on GPUs alone, and without one has to be told that the CPU is meant
        use_cpu=recipe.use_cpu or not (torch.cuda.is_available() or recipe.fsdp or recipe.deepspeed),
        **_checkpointing(bool(recipe.gradient_checkpointing)),
        save_strategy="steps",
        save_steps=recipe.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.save_steps if evaluates else None,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        prediction_loss_only=True,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,  # a run of few long steps would say nothing for hours
        logging_nan_inf_filter=False,  # with it a loss that is not finite would be logged as an earlier one
        remove_unused_columns=False,  # packed rows have one that the model does not take but the collator does
        disable_tqdm=True,
        report_to="none",  # the callbacks that report come after those that add to the logs
        ddp_find_unused_parameters=False,
        fsdp=fsdp,
        fsdp_config=dict(_FSDP2) if recipe.fsdp else None,
        deepspeed=recipe.deepspeed,
    )

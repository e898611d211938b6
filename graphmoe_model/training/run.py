"""A whole training run: from a recipe and questions to an adapter, its recipe and its result in a folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available

from graphmoe_model.base_models import ModelSource, load_base_config, load_tokenizer
from graphmoe_model.parameters import adapter_parameters, parameters_by_component
from graphmoe_model.questions import Question
from graphmoe_model.routing.callback import RouterLossCallback
from graphmoe_model.training.callbacks import ExpertLoadLog, LastStep, ProgressLine
from graphmoe_model.training.models import adapter_config, base_source, check_installed, load_model, within_positions
from graphmoe_model.training.result import TrainingResult, conditions, peak_memory, read_result, write_result
from graphmoe_model.training.rows import Rows, make_collator, make_rows, notes_on
from graphmoe_model.training.run_folder import DATA_FILE, PREFIX, check_folder, check_space, last_whole, remove
from graphmoe_model.training.trainer import RecipeTrainer, check_processes, make_arguments
from graphmoe_model.whole_files import write_whole
from graphmoe_tables.paths import looked_for
from graphmoe_tables.recipe import TrainingRecipe
from graphmoe_tables.recipe_files import write_recipe


def train(
    recipe: TrainingRecipe,
    questions: Sequence[Question],
    eval_questions: Sequence[Question] = (),
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train an adapter and save it in ``recipe.output``, with `RECIPE_FILE` and `RESULT_FILE`.

    Under ``torchrun`` or ``accelerate launch`` every process calls it; the first alone prints and writes.

    Args:
        recipe: what to do.
        questions: to train on, in this order (each epoch has an order of its own).
        eval_questions: those whose loss chooses the best checkpoint; wanted if the recipe names ``eval_data``.
        resume: go on with the run in the output folder, if there is one. It ends as one that was never interrupted: on
            a CPU to the bit.
        say: takes lines for the user.
        callbacks: of Trainer, called after this package's own.

    Raises:
        ValueError: whatever is wrong with the recipe, the questions, the model or the folder, before anything is
            trained.
        DivergedError: a loss that is not finite, while it is trained; a `ValueError` too.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's and accelerate's; the process group comes later
    tell = say if int(os.environ.get("RANK", 0)) == 0 else _silent
    check_installed(recipe)
    recipe = fitted(recipe.resolved(), processes)
    source = base_source(recipe)
    config = adapter_config(recipe)
    base = load_base_config(source)
    asked_length, recipe = recipe.max_length, within_positions(recipe, base)
    tokenizer = load_tokenizer(source)
    rows = make_rows(questions, tokenizer, recipe, packing=recipe.packing)
    evaluation = make_rows(eval_questions, tokenizer, recipe, packing=False) if recipe.eval_data is not None else None
    steps = total_steps(recipe, len(rows.dataset))
    recipe = dataclasses.replace(recipe, save_steps=recipe.save_steps or max(1, steps // 10))
    folder = Path(recipe.output)
    goes_on = check_folder(recipe, resume)
    check_data(folder, rows, evaluation, goes_on)  # also of a finished run: what it finished may be other questions
    finished = read_result(folder) if goes_on else None
    if finished is not None:
        tell(f"{folder} holds the finished run of this recipe: nothing is left to do")
        return finished
    parameters = adapter_parameters(config, base).total
    check_space(recipe, parameters)
    for line in notes_on(recipe, asked_length, rows, questions, eval_questions):
        tell(line)
    if evaluation is not None:
        tell(f"evaluation: {evaluation.questions:,} questions, each {recipe.save_steps:,} steps (--save-steps)")
    in_a_step = min(recipe.batch * recipe.accumulation, len(rows.dataset))
    tell(
        f"questions: {rows.questions:,}, steps: {steps:,}, rows per step: {in_a_step:,}, trainable parameters: "
        f"{parameters:,}; the loss is shown of step 1 and then by --logging-steps {recipe.logging_steps}"
    )
    arguments = make_arguments(recipe, processes, steps)
    _ = arguments.device  # starts the process group, for FSDP and DeepSpeed in their own way
    state = PartialState()
    check_processes(recipe, state, processes)
    checkpoint, broken = last_whole(folder)
    state.wait_for_everyone()  # nobody writes before all have looked
    if state.is_main_process:
        _begin(recipe, rows, evaluation, broken, tell)
    if resume:
        where = f"goes on from {checkpoint.name}" if checkpoint else "there is no whole checkpoint: starts anew"
        tell(f"{folder}: {where}")
    trainer = _trainer(recipe, source, arguments, tokenizer, rows, evaluation, tell, callbacks)
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - begun
    trainer.save_model(recipe.output)  # gathers what is spread over processes, so on each of them
    trainer.save_state()  # trainer_state.json: all that was logged
    resumed = 0 if checkpoint is None else int(checkpoint.name.removeprefix(PREFIX))
    result = _result(recipe, trainer, rows, resumed, seconds, processes)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(recipe.output)
        write_result(result, recipe.output)
    state.wait_for_everyone()
    return result


def fitted(recipe: TrainingRecipe, processes: int) -> TrainingRecipe:
    """Return a recipe with what depends on the machine filled in.

    Raises:
        ValueError: the batch cannot be shared out equally, FSDP is asked for in a single process, Accelerate was
            configured for what the recipe does not ask for, or there is no such file for DeepSpeed.
    """
    on_gpu = torch.cuda.is_available() and not recipe.use_cpu
    if recipe.batch % processes:
        raise ValueError(
            f"batch (--batch) is the rows of all processes together and must be a multiple of their number, "
            f"{processes}, got {recipe.batch}"
        )
    if recipe.fsdp and processes == 1:
        raise ValueError(
            "--fsdp splits the model over processes: start several, "
            "torchrun --nproc_per_node 2 -m graphmoe_cli train ... --fsdp"
        )
    for asked, given, option in (
        ("FSDP", recipe.fsdp, "--fsdp"),
        ("DEEPSPEED", recipe.deepspeed is not None, "--deepspeed FILE"),
    ):
        if os.environ.get(f"ACCELERATE_USE_{asked}", "false").lower() == "true" and not given:
            raise ValueError(
                f"accelerate launch was configured for {asked}, which the recipe does not say: pass {option}, so that "
                "it is saved with the run, or launch by docs/configs/ddp.yaml"
            )
    if recipe.deepspeed is not None and not Path(recipe.deepspeed).is_file():
        raise ValueError(
            f"--deepspeed {recipe.deepspeed}: there is no such file (docs/configs has zero2.json and zero3.json)"
            f"{looked_for(recipe.deepspeed)}"
        )
    bf16 = (on_gpu and torch.cuda.is_bf16_supported()) if recipe.bf16 is None else recipe.bf16
    checkpointing = on_gpu if recipe.gradient_checkpointing is None else recipe.gradient_checkpointing
    return dataclasses.replace(recipe, bf16=bf16, gradient_checkpointing=checkpointing)


def total_steps(recipe: TrainingRecipe, rows: int) -> int:
    """Return how many steps a run of this many rows has."""
    per_epoch = math.ceil(math.ceil(rows / recipe.batch) / recipe.accumulation)
    return recipe.max_steps or math.ceil(recipe.epochs * per_epoch)


def check_data(folder: Path, rows: Rows, evaluation: Rows | None, goes_on: bool) -> None:
    """`ValueError` if a run that is gone on with was begun on other questions."""
    file = folder / DATA_FILE
    if goes_on and file.exists() and json.loads(file.read_text(encoding="utf-8")) != _digests(rows, evaluation):
        raise ValueError(
            f"--output {folder} holds a run on other questions: what --data or --eval-data names has changed; "
            "put it back, or name another folder"
        )


def _digests(rows: Rows, evaluation: Rows | None) -> dict[str, Any]:
    return {
        name: {"questions": own.questions, "sha256": own.digest}
        for name, own in {"data": rows, "eval_data": evaluation}.items()
        if own is not None
    }


def _begin(
    recipe: TrainingRecipe, rows: Rows, evaluation: Rows | None, broken: list[Path], tell: Callable[[str], None]
) -> None:
    """Write what the run is, and clear away checkpoints that a killed run left in part."""
    folder = Path(recipe.output)
    for checkpoint in broken:
        tell(f"{checkpoint.name} is not whole, as it was being written or removed when the run ended: passed over")
        remove(checkpoint)
    write_recipe(recipe, folder)
    write_whole(folder / DATA_FILE, json.dumps(_digests(rows, evaluation), indent=2) + "\n")


def _trainer(
    recipe: TrainingRecipe,
    source: ModelSource,
    arguments: TrainingArguments,
    tokenizer: Any,
    rows: Rows,
    evaluation: Rows | None,
    tell: Callable[[str], None],
    more_callbacks: Sequence[TrainerCallback],
) -> RecipeTrainer:
    """Load the model, after the arguments, as ZeRO-3 splits weights while they are read, and make its trainer."""
    callbacks = [
        RouterLossCallback(),
        ExpertLoadLog(recipe.output),
        LastStep(),
        *_reporting(recipe),
        ProgressLine(tell),
        *more_callbacks,
    ]
    model = load_model(recipe, source)
    trainer = RecipeTrainer(
        recipe,
        model,
        arguments,
        train_dataset=rows.dataset,
        eval_dataset=None if evaluation is None else evaluation.dataset,
        data_collator=make_collator(tokenizer, model, packing=recipe.packing),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reporting(recipe: TrainingRecipe) -> list[Any]:
    """Make the callbacks that report; `RuntimeError` of Transformers if what is asked for is not installed."""
    if recipe.report_to == "none" or (recipe.report_to == "auto" and not is_tensorboard_available()):
        return []
    name = "tensorboard" if recipe.report_to == "auto" else recipe.report_to
    return [callback() for callback in get_reporting_integration_callbacks([name])]


def _result(
    recipe: TrainingRecipe, trainer: RecipeTrainer, rows: Rows, resumed: int, seconds: float, processes: int
) -> TrainingResult:
    history = trainer.state.log_history
    losses = [log["loss"] for log in history if "loss" in log]
    balance = [log["aux_loss"] for log in history if "aux_loss" in log]
    weights = Path(recipe.output) / SAFETENSORS_WEIGHTS_NAME
    device, model = trainer.args.device, trainer.model
    assert model is not None
    return TrainingResult(
        steps=trainer.state.global_step,
        resumed_from=resumed,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        last_router_loss=balance[-1] if balance else None,
        eval_loss=trainer.state.best_metric,
        best_step=trainer.state.best_global_step,
        questions=rows.questions,
        truncated=rows.truncated,
        seconds=round(seconds, 3),
        peak_memory=peak_memory(device),
        trainable_parameters=sum(parameters_by_component(model).values()),
        adapter_bytes=weights.stat().st_size if weights.exists() else 0,
        conditions=conditions(device, torch.bfloat16 if recipe.bf16 else torch.float32, processes, recipe.seed),
    )


def _silent(line: str) -> None:
    """Say nothing, as every process but the first."""

"""The router loss in Trainer's logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from graphmoe_model.routing.router_loss_hooks import find_hooks


class RouterLossCallback(TrainerCallback):
    """Puts ``aux_loss`` (Eq. 8 without its coefficient, a mean over forwards) into Trainer's logs.

    It is of this process's tokens; with ``router_aux_loss_scope="global"`` of all processes', the same in each.
    ``loss`` in the logs contains the router loss with or without this callback. TRL's trainers log ``aux_loss``
    themselves. Reporting callbacks (TensorBoard, Weights & Biases) see it if they come after this one:
    ``Trainer(..., args with report_to="none", callbacks=[RouterLossCallback(), TensorBoardCallback()])``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start listening; ``TypeError`` if the model that is trained has no GraphMoE adapter."""
        hooks = find_hooks(kwargs["model"])
        if hooks is None:
            raise TypeError(f"RouterLossCallback: this {type(kwargs['model']).__name__} has no GraphMoE adapter")
        hooks.sums, hooks.listening = None, True
        self._hooks = hooks

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the mean since the last training log, if a loss had it."""
        logs = kwargs["logs"]
        if "loss" not in logs or "aux_loss" in logs or self._hooks.sums is None:
            return
        total, forwards = self._hooks.sums.tolist()
        logs["aux_loss"] = total / forwards
        state.log_history[-1]["aux_loss"] = logs["aux_loss"]
        self._hooks.sums = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self._hooks.sums, self._hooks.listening = None, False

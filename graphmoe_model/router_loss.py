"""The router's load-balance loss (GraphMoE, Eq. 8): computed from the layers' records, added to the model's loss.

Per layer and round L = n * sum_i f_i p_i, with f_i expert i's share of all top-k choices (sum_i f_i = 1) and p_i its
mean routing probability over the tokens, padding left out of both. Perfectly balanced routing gives L = 1 in the
switch form, where p is the full softmax, and L = the mean probability mass of the k chosen experts (at most 1) in the
paper's form, where p is zero outside the top k. L is averaged over rounds and routers: one a layer, or one a linear.

Eq. 8 is taken over one forward. Under gradient accumulation the micro-batches' losses are averaged, which differs from
Eq. 8 over the whole batch by the covariance of f and p among micro-batches: it falls as 1 / (tokens a micro-batch).
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from graphmoe_model.routing_record import RoutingContext, RoutingRecord, routed_layers

_UNUSED = (
    "the last training forward got no labels, so its router loss became part of no loss: add "
    "graphmoe_model.router_loss(model) to yours before backward (label smoothing and compute_loss_func of a Trainer "
    "hide the labels from the model), or set router_aux_loss_coef=0"
)
_NO_GRADIENT = (
    "the router loss has no gradient: reentrant activation checkpointing runs the layers without one. Use "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, or set router_aux_loss_coef=0"
)


class RouterLoss(NamedTuple):
    """One forward's router loss.

    Attributes:
        balance: scalar, Eq. 8 averaged over routers and rounds.
        weighted: scalar, the same with every layer's ``router_aux_loss_coef``.
    """

    balance: Tensor
    weighted: Tensor


def balance_loss(record: RoutingRecord) -> Tensor:
    """Eq. 8 of one router, averaged over its rounds: a scalar in the dtype of ``record.mass``, 0 without tokens."""
    counts, mass, tokens = record
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)  # f, [T, n]
    probability = mass / tokens.clamp(min=1)  # p, [T, n]
    return counts.shape[-1] * (share * probability).sum(dim=-1).mean()


def router_loss(model: nn.Module) -> Tensor:
    """The last training forward's router loss, ready to be added: ``router_aux_loss_coef`` * Eq. 8, a scalar.

    For training loops that compute their loss from the logits. Where labels are given to a model with the adapter,
    ``outputs.loss`` contains this loss already. Under ``torch.no_grad()`` it is a reading, allowed at any time.

    Raises:
        TypeError: there is no GraphMoE layer in ``model``.
        RuntimeError: no training forward was recorded, or the loss is in ``outputs.loss`` already, or it has no
            gradient (reentrant checkpointing).
    """
    layers = list(routed_layers(model).values())
    if not layers:
        raise TypeError(f"no GraphMoE layer in this {type(model).__name__}, so there is no router loss")
    contexts = [layer.routing_context for layer in layers]
    if torch.is_grad_enabled() and any(context.in_loss for context in contexts):
        raise RuntimeError(
            "the last forward was given labels, so outputs.loss contains the router loss already and adding it would "
            "count it twice; use outputs.loss as it is, pass no labels, or read the value under torch.no_grad()"
        )
    loss = _last_loss(layers)
    if loss is None:
        if any(_coefficient(layer) > 0 for layer in layers):
            raise RuntimeError("no routing is recorded: run a forward in training mode (model.train()) first")
        return torch.zeros((), device=next(model.parameters()).device)
    for context in contexts:
        context.unused = False
    return loss.weighted


def _last_loss(layers: list[Any]) -> RouterLoss | None:
    """Over the routers that have a record and a positive coefficient; None if there are none."""
    counted = [layer for layer in layers if _coefficient(layer) > 0]
    pairs = [(_coefficient(layer), record) for layer in counted for record in layer.routing.values()]
    if not pairs:
        return None
    if torch.is_grad_enabled():
        for layer in counted:
            if _trains_router(layer) and not all(record.mass.requires_grad for record in layer.routing.values()):
                raise RuntimeError(_NO_GRADIENT)
    device = pairs[0][1].mass.device
    losses = torch.stack([balance_loss(record).to(device) for _, record in pairs])
    coefficients = losses.new_tensor([coefficient for coefficient, _ in pairs])
    return RouterLoss(losses.mean(), (coefficients * losses).mean())


def _trains_router(layer: Any) -> bool:
    adapter = layer.lora_graphmoe[layer.active_name()]
    return any(p.requires_grad for name, p in adapter.named_parameters() if "router" in name.split("."))


def _coefficient(layer: Any) -> float:
    config = layer.active_config()
    return 0.0 if config is None else config.router_aux_loss_coef


# --- in the model's forward ------------------------------------------------------------------------------------------


class RouterLossHooks:
    """Hooks around the base model's forward: they tell its layers what is padding and add the router loss to its loss.

    Hooks on the base model, unlike a tuner's forward, also see ``generate`` and a model that Transformers itself loaded
    with the adapter. In training, a forward with labels returns ``loss`` + the router loss. With ``num_items_in_batch``
    (Trainer) the router loss is weighted by the forward's share of those items, as Trainer then adds the micro-batches'
    losses up without dividing. Evaluation leaves ``loss`` alone.

    TRL ignores ``loss``. It takes ``outputs.aux_loss`` (Eq. 8 here; 0 in evaluation), weights, averages and logs it
    if the model's configuration has the two fields by which Transformers declares routers, so they are set.

    Activation checkpointing needs the padding mask again in the backward pass, so it is kept until the next forward:
    with checkpointing, run each batch's backward before the next batch's forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.context = RoutingContext()
        self.running: Tensor | None = None  # [sum of losses, forwards], while a RouterLossCallback listens
        self._handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Start the records anew, with this batch's padding mask."""
        context = self.context
        if model.training or context.collecting:
            if model.training and torch.is_grad_enabled():
                if context.unused:
                    warnings.warn(_UNUSED, stacklevel=2)
                context.unused = False
            mask = _argument(model, args, kwargs, "attention_mask")
            context.token_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            context.in_loss = False
            for layer in routed_layers(model).values():
                layer.routing = {}
        if kwargs.get("output_router_logits") or kwargs.get("fused_lm_head"):
            kwargs = {**kwargs, "output_router_logits": False}  # the base has no routers; `after` fills in aux_loss
        return args, kwargs

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """Add the router loss to a training forward's loss."""
        layers = list(routed_layers(model).values()) if model.training else []
        differentiable = model.training and torch.is_grad_enabled()
        reports = getattr(outputs, "aux_loss", 0) is None  # a field that stands open: TRL's
        has_loss = _argument(model, args, kwargs, "labels") is not None and _holds_loss(outputs)
        loss = _last_loss(layers) if has_loss or reports else None
        if differentiable:
            self.context.unused = not (has_loss or reports) and any(_coefficient(layer) > 0 for layer in layers)
        else:
            self.context.token_mask = None
        if reports:
            outputs["aux_loss"] = outputs.loss.new_zeros(()) if loss is None else loss.balance
        if loss is None:
            return outputs
        self._note(loss.balance)
        if not has_loss:
            return outputs
        self.context.in_loss = True
        for layer in layers:  # the loss has the graph; a record that kept it too would outlive a discarded loss
            layer.routing = {name: record.detach() for name, record in layer.routing.items()}
        return _add_to_loss(outputs, loss.weighted * _batch_share(model, args, kwargs))

    def _note(self, balance: Tensor) -> None:
        if self.running is not None:
            seen = balance.detach().float()
            self.running = self.running.to(seen.device) + torch.stack([seen, torch.ones_like(seen)])


def _holds_loss(outputs: Any) -> bool:
    """Whether outputs of a forward with labels are of a form whose loss can be found."""
    return isinstance(outputs, tuple) or (isinstance(outputs, dict) and outputs.get("loss") is not None)


def _add_to_loss(outputs: Any, loss: Tensor) -> Any:
    if isinstance(outputs, tuple):
        return (outputs[0] + loss.to(outputs[0].device), *outputs[1:])
    outputs["loss"] = outputs["loss"] + loss.to(outputs["loss"].device)
    return outputs


def _batch_share(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float:
    """This forward's part of ``num_items_in_batch``, counted as Trainer counts it; 1 without that argument."""
    total = kwargs.get("num_items_in_batch")
    if total is None:
        return 1.0
    labels = kwargs.get("shift_labels")
    if labels is None:
        labels = _argument(model, args, kwargs, "labels")
        if LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss:
            labels = labels[..., 1:]
    return labels.ne(-100).sum() / total


def _argument(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """A forward's argument, by keyword or position; None if it was not given."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(type(model).forward).parameters)[1 : len(args) + 1]
    return args[names.index(name)] if name in names else None


def attach_router_loss(model: nn.Module) -> None:
    """Put the hooks on a base model whose layers were just adapted; all layers then share one context.

    Raises:
        ValueError: the base model has routers and a router loss of its own, and the adapter's coefficient is not 0.
    """
    layers = list(routed_layers(model).values())
    hooks = find_hooks(model) or RouterLossHooks(model)
    for layer in layers:
        layer.routing_context = hooks.context
    coefficient = max(map(_coefficient, layers), default=0.0)
    config = _text_config(model)
    if config is None or coefficient == 0:
        return
    if hasattr(type(config), "output_router_logits"):
        raise ValueError(
            f"{type(model).__name__} has routers and a router loss of its own, which would be mixed up with this "
            "adapter's; set router_aux_loss_coef=0"
        )
    config.output_router_logits, config.router_aux_loss_coef = True, coefficient


def detach_router_loss(model: nn.Module) -> None:
    """Undo `attach_router_loss`, for a base model that its adapters were unloaded from."""
    hooks = find_hooks(model)
    if hooks is None:
        return
    hooks.remove()
    config = _text_config(model)
    for name in ("output_router_logits", "router_aux_loss_coef"):
        if config is not None and name in vars(config) and not hasattr(type(config), name):
            delattr(config, name)


def find_hooks(model: nn.Module) -> RouterLossHooks | None:
    """The router-loss hooks on a model or, for a wrapped one, on the base model inside it."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, RouterLossHooks):
                return owner
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


# --- in Trainer's logs -----------------------------------------------------------------------------------------------


class RouterLossCallback(TrainerCallback):
    """Puts ``aux_loss`` (Eq. 8 without its coefficient, a mean over forwards, this process's own) into Trainer's logs.

    ``loss`` in the logs contains the router loss with or without this callback. TRL's trainers log ``aux_loss``
    themselves. Reporting callbacks (TensorBoard, Weights & Biases) see it if they come after this one:
    ``Trainer(..., args with report_to="none", callbacks=[RouterLossCallback(), TensorBoardCallback()])``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start listening; ``TypeError`` if the model that is trained has no GraphMoE adapter."""
        hooks = find_hooks(kwargs["model"])
        if hooks is None:
            raise TypeError(f"RouterLossCallback: this {type(kwargs['model']).__name__} has no GraphMoE adapter")
        hooks.running = torch.zeros(2)
        self._hooks = hooks

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the mean since the last training log."""
        logs = kwargs["logs"]
        if "loss" not in logs or "aux_loss" in logs or self._hooks.running is None:
            return
        total, forwards = self._hooks.running.tolist()
        logs["aux_loss"] = total / max(forwards, 1)
        state.log_history[-1]["aux_loss"] = logs["aux_loss"]
        self._hooks.running = torch.zeros(2)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self._hooks.running = None

"""Hooks around the base model's forward that tell its layers what is padding and add the router loss to its loss."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.routing.global_routing import sum_over_processes
from graphmoe_model.routing.loss import RouterLoss, loss_of
from graphmoe_model.routing.record import ForwardRouting, RoutingContext, in_backward, routed_layers
from graphmoe_model.storage.weight_management import check_root_gathered

_UNUSED = (
    "GraphMoE: the last training forward got no labels, so its router loss became part of no loss: add "
    "graphmoe_model.router_loss(model) to yours before backward (label smoothing and compute_loss_func of a Trainer "
    "hide the labels from the model), or set router_aux_loss_coef=0"
)
_NOT_ASKED = (
    "GraphMoE: this trainer takes the router loss from outputs.aux_loss, but did not ask for it, so it becomes part of "
    "no loss: make the adapter active before the trainer is made, or give the trainer's configuration a "
    "router_aux_loss_coef; to train without it, set the adapter's router_aux_loss_coef=0"
)


class RouterLossHooks:
    """Hooks on a base model: its layers learn what is padding, and its loss gets the router loss.

    Hooks on the base model, unlike a tuner's forward, also see ``generate`` and a model that Transformers itself loaded
    with the adapter. In training, a forward with labels returns ``loss`` + the router loss. With ``num_items_in_batch``
    (Trainer) the router loss is weighted by the forward's share of those items, as Trainer then adds the micro-batches'
    losses up without dividing. Evaluation leaves ``loss`` alone. With ``router_aux_loss_scope="global"`` every training
    forward with gradients takes part in one collective, with labels or without.

    TRL ignores ``loss``. It asks for ``outputs.aux_loss`` (Eq. 8 here; 0 in evaluation), weights, averages and logs it
    if the model's configuration declares routers, as `graphmoe_model.routing.trainer_view` has it do.

    The decoder inside the model has hooks too, for callers that run it without its head.

    Attributes:
        context: shared with the layers.
        layers: the base model's routed layers.
        told: the coefficient that a trainer read from the configuration, by which it will weight ``aux_loss``; 0 if it
            said that it takes none, None if it has one of its own.
        sums: [sum of losses, forwards], while a RouterLossCallback listens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.context = RoutingContext()
        self.layers: list[Any] = []
        self.told: float | None = None
        self.sums: Tensor | None = None
        self.listening = False
        self._has_routers = declares(model, "output_router_logits")
        self._has_router_loss = declares(model, "router_aux_loss_coef")
        handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
        if isinstance(decoder, nn.Module) and decoder is not model:
            handles += [
                decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
                decoder.register_forward_hook(self.after_decoder, always_call=True),
            ]
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def remove_if_unused(self) -> None:
        """Take the hooks off once no layer has an adapter any more."""
        if not any(layer.lora_graphmoe for layer in self.layers):
            self.remove()

    # --- a forward of the whole model

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Open this forward's records, with its padding mask."""
        check_root_gathered(model)
        self._start(model, args, kwargs)
        if kwargs.get("output_router_logits") and not self._has_routers:
            kwargs = {**kwargs, "output_router_logits": False}  # the base has no routers; `after` fills in aux_loss
        return args, kwargs

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """Close the records, and add the router loss to a training forward's loss."""
        forward = self.context.finish()
        if outputs is None:  # the forward ended in an exception, which goes on
            return None
        is_open = not self._has_router_loss and getattr(outputs, "aux_loss", 0) is None
        asked = "output_router_logits" in kwargs and is_open
        has_loss = _argument(model, args, kwargs, "labels") is not None and _holds_loss(outputs)
        loss = None
        share: Tensor | float = _batch_share(model, args, kwargs) if has_loss else 1.0
        if forward is not None:
            sum_over_processes(forward, self.layers, share)
            share = share if forward.all_processes is None else forward.all_processes.share
            loss = loss_of([forward]) if has_loss or asked else None
        if forward is not None and model.training:
            self._keep(forward, has_loss or asked)
            routed = forward.has_routers() and forward.differentiable
            if kwargs.get("fused_lm_head") and not asked and routed and self.told != 0:
                warnings.warn(_NOT_ASKED, stacklevel=2)
        if asked:
            outputs["aux_loss"] = outputs.loss.new_zeros(()) if loss is None else self._as_told(loss)
        if loss is None or forward is None:
            return outputs
        if not forward.repeats:
            self._note(loss.balance)
        if not has_loss:
            return outputs
        forward.in_loss = True
        forward.release()  # the loss has the graph; records that kept it too would outlive a discarded loss
        return _add_to_loss(outputs, loss.weighted * share)

    # --- a forward of the decoder alone

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the records, unless the whole model's forward has."""
        if self.context.running() is None:
            self._start(decoder, args, kwargs).alone = True

    def after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """Close the records that `before_decoder` opened."""
        forward = self.context.running()
        if forward is None or not forward.alone:
            return
        self.context.finish()
        if outputs is not None and decoder.training:
            sum_over_processes(forward, self.layers)
            self._keep(forward, used=False)

    # --- what both do

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardRouting:
        recording = model.training or self.context.loads
        mask = _argument(model, args, kwargs, "attention_mask") if recording else None
        forward = ForwardRouting(
            token_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            differentiable=model.training and torch.is_grad_enabled(),
            repeats=in_backward(),
            frame=None if torch.compiler.is_compiling() else sys._getframe(2),
        )
        last = self.context.trained
        if forward.differentiable and not forward.repeats and last is not None and self._active():
            if last.unused:
                warnings.warn(_UNUSED, stacklevel=3)
                last.unused = False
            last.release()  # whoever wants its loss has it by now
        self.context.start(forward)
        return forward

    def _keep(self, forward: ForwardRouting, used: bool) -> None:
        """Remember a training forward, if it is one of the adapter's and no repetition."""
        if not self._active():
            return
        forward.unused = forward.differentiable and forward.has_routers() and not used
        self.context.keep(forward)

    def _active(self) -> bool:
        return any(layer.active_name() is not None for layer in self.layers)

    def _as_told(self, loss: RouterLoss) -> Tensor:
        """Compute Eq. 8 for a trainer that weights it by what it was told: the active adapter's coefficient decides."""
        told = self.told
        if not told or loss.coefficients == {told}:
            return loss.balance
        return loss.weighted / told

    def _note(self, balance: Tensor) -> None:
        if self.listening:
            seen = balance.detach().float()
            noted = torch.stack([seen, torch.ones_like(seen)])
            self.sums = noted if self.sums is None else self.sums.to(seen.device) + noted


def _holds_loss(outputs: Any) -> bool:
    """Tell whether outputs of a forward with labels are of a form whose loss can be found."""
    if isinstance(outputs, ModelOutput):  # by attribute: Dynamo does not see its items
        return getattr(outputs, "loss", None) is not None
    return isinstance(outputs, tuple) or (isinstance(outputs, dict) and outputs.get("loss") is not None)


def _add_to_loss(outputs: Any, loss: Tensor) -> Any:
    if isinstance(outputs, tuple):
        return (outputs[0] + loss.to(outputs[0].device), *outputs[1:])
    if isinstance(outputs, ModelOutput):
        total: Any = outputs  # a dataclass, by its fields
        total.loss = total.loss + loss.to(total.loss.device)
    else:
        outputs["loss"] = outputs["loss"] + loss.to(outputs["loss"].device)
    return outputs


def _batch_share(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float:
    """Compute this forward's part of ``num_items_in_batch``, counted as Trainer does; 1 without that argument."""
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
    """Return a forward's argument, by keyword or position; None if it was not given."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(type(model).forward).parameters)[1 : len(args) + 1]
    return args[names.index(name)] if name in names else None


# --- attaching -------------------------------------------------------------------------------------------------------


def declares(model: nn.Module, field: str) -> bool:
    """Tell whether a model's own configuration has a field.

    Transformers' mixtures of experts have ``output_router_logits``; those that add a router loss to theirs have
    ``router_aux_loss_coef`` too. DeepSeek-V3 has routers and no such loss.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return hasattr(text, field)


def check_router_loss(model: nn.Module, config: GraphMoEConfig) -> None:
    """Refuse a router loss on a base model that has routers and a router loss of its own.

    Raises:
        ValueError: both have one.
    """
    if config.router_aux_loss_coef > 0 and declares(model, "router_aux_loss_coef"):
        raise ValueError(
            f"{type(model).__name__} has routers and a router loss of its own, which would be mixed up with this "
            "adapter's; set router_aux_loss_coef=0"
        )


def attach_router_loss(model: nn.Module) -> None:
    """Put the hooks on a base model whose layers were just adapted; all layers then share one context."""
    hooks = find_hooks(model) or RouterLossHooks(model)
    hooks.layers = list(routed_layers(model).values())
    for layer in hooks.layers:
        layer.routing_context = hooks.context
        layer.router_loss_hooks = hooks


def detach_router_loss(model: nn.Module) -> None:
    """Undo `attach_router_loss`, for a base model that its adapters were unloaded from."""
    hooks = find_hooks(model)
    if hooks is not None:
        hooks.remove()


def find_hooks(model: nn.Module) -> RouterLossHooks | None:
    """Find the router-loss hooks on a model or, for a wrapped one, on the base model inside it."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, RouterLossHooks):
                return owner
    return None

"""A base model's configuration as trainers read it through a GraphMoE adapter: it declares the adapter's routers.

TRL takes a router loss from models whose configuration has ``output_router_logits`` and ``router_aux_loss_coef``. The
base has no routers, the adapter has, and which adapter is active changes. So the base's own configuration stays as it
is; ``PeftModel.config`` is a view of it that answers these two names for the adapter that is active when it is asked.
"""

from __future__ import annotations

import copy
from typing import Any

from graphmoe_model.routing.loss import coefficient_of
from graphmoe_model.routing.router_loss_hooks import RouterLossHooks

_OWN = frozenset({"_config", "_hooks", "output_router_logits", "router_aux_loss_coef"})


class RoutedConfig:
    """All of a Transformers configuration, with the two names by which Transformers declares routers.

    Both are missing while the active adapter has no router loss. Everything else is read from and written to the
    configuration itself; what is copied, pickled or saved is the configuration.
    """

    _config: Any
    _hooks: RouterLossHooks

    def __init__(self, config: Any, hooks: RouterLossHooks) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_hooks", hooks)

    @property
    def output_router_logits(self) -> bool:
        """Say that routers are there; ``AttributeError`` while there is no router loss."""
        self._coefficient("output_router_logits")
        return True

    @property
    def router_aux_loss_coef(self) -> float:
        """Give the active adapter's, by which the reader will weight ``aux_loss``; ``AttributeError`` if it is 0."""
        self._hooks.told = self._coefficient("router_aux_loss_coef")
        return self._hooks.told

    def _coefficient(self, name: str) -> float:
        coefficient = coefficient_of(self._hooks.layers)
        if coefficient == 0:
            raise AttributeError(f"{type(self).__name__} has no {name}: the active adapter has no router loss")
        return coefficient

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Return the configuration's own text configuration, in the same view."""
        text = self._config.get_text_config(*args, **kwargs)
        return self if text is self._config else routed_config(text, self._hooks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "output_router_logits":
            if not value:  # a trainer that takes no router loss
                self._hooks.told = 0.0
        elif name == "router_aux_loss_coef":  # a trainer's own coefficient: it weights Eq. 8 as it is
            self._hooks.told = self._hooks.told if value == self._hooks.told else None
        elif name not in _OWN:
            setattr(self._config, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._config, name)

    def __eq__(self, other: object) -> bool:
        return bool(self._config == (other._config if type(other) is type(self) else other))

    __hash__ = None  # type: ignore[assignment]  # as a configuration

    def __repr__(self) -> str:
        return repr(self._config)

    def __dir__(self) -> list[str]:
        return dir(self._config)

    def __copy__(self) -> Any:
        return copy.copy(self._config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._config, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._config.__reduce_ex__(protocol)


_VIEWS: dict[type, type[RoutedConfig]] = {}  # by the class of configuration; a dictionary, as Dynamo reads it


def _view_of(kind: type) -> type[RoutedConfig]:
    """Make the class of view for a class of configuration.

    ``isinstance`` and the Auto classes, which look at the name of ``type(config)``, take it for that class.
    """
    if kind not in _VIEWS:
        _VIEWS[kind] = type(
            kind.__name__, (RoutedConfig,), {"__class__": property(lambda self: kind), "__module__": __name__}
        )
    return _VIEWS[kind]


def routed_config(config: Any, hooks: RouterLossHooks) -> Any:
    """Make the view of a base model's configuration."""
    return _view_of(type(config))(config, hooks)

"""PEFT's and Transformers' loaders, by which an adapter is loaded whole and of one save, or not at all.

They look at its folder before the model changes and again after the weights were read, and put the model back as it was
if anything is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from peft.utils import CONFIG_NAME
from torch import nn

from graphmoe_model.checkpoints.digest import FIELD, check_digest
from graphmoe_model.checkpoints.fitting import misfit, missing_modules
from graphmoe_model.checkpoints.weights import inspect_weights, tensor_names, weights_path
from graphmoe_model.config import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.undo import ModelState

Loader = Callable[..., Any]


@dataclass(frozen=True)
class Source:
    """An adapter's folder as it was when its loading began."""

    folder: Path
    weights: Path
    state: tuple[object, ...]

    @classmethod
    def opened(cls, folder: Path | None, config: GraphMoEConfig | None = None) -> Source | None:
        """Look at a folder before it is loaded; None if it is none of a GraphMoE adapter's, or lacks weights.

        Raises:
            ValueError: configuration and weights are of different saves, or one of them cannot be read.
        """
        weights = None if folder is None else weights_path(folder)
        if folder is None or weights is None:
            return None
        settings = _settings(folder)
        if settings is None:
            _check_config(folder, weights)  # PEFT says what it misses in another method's
            settings = {}
        if config is None and settings.get("peft_type") != GraphMoEPeftType.GRAPHMOE.value:
            return None
        source = cls(folder, weights, _identities(folder, weights))
        given = None if config is None else config.saved_digest
        check_digest(folder, settings.get(FIELD) if given is None else given, inspect_weights(weights))
        source.check_unchanged()
        return source

    def check_unchanged(self) -> None:
        """Refuse to go on if a file was replaced since: what was read may be of two saves."""
        if _identities(self.folder, self.weights) != self.state:
            raise ValueError(
                f"{self.folder} was saved again while it was being loaded, so its configuration and weights may be of "
                "two saves; load it again"
            )


_source: ContextVar[Source | None] = ContextVar("the adapter that is being loaded", default=None)


def check_source() -> None:
    """Refuse weights that were just read if their folder changed since its loading began; see `checked_load`."""
    source = _source.get()
    if source is not None:
        source.check_unchanged()


def checked_from_pretrained(from_pretrained: Any) -> Any:
    """Wrap ``PeftModel.from_pretrained``: whatever it refuses leaves the model as it was.

    An adapter of two saves is refused before the model changes.
    """
    function = from_pretrained.__func__

    @wraps(function)
    def checked(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> PeftModel:
        config = kwargs.get("config", args[2] if len(args) > 2 else None)
        if config is not None and not isinstance(config, GraphMoEConfig):
            return function(cls, model, model_id, *args, **kwargs)
        before = ModelState(model)
        source = _source.set(Source.opened(_local(model_id, kwargs), config))
        try:
            return function(cls, model, model_id, *args, **kwargs)
        except BaseException:
            before.restore()
            raise
        finally:
            _source.reset(source)

    return classmethod(checked)


def checked_load(load: Loader) -> Loader:
    """Wrap ``PeftModel.load_adapter``: a GraphMoE adapter is loaded whole, or the model stays as it was."""

    @wraps(load)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type != GraphMoEPeftType.GRAPHMOE:
            return load(self, model_id, adapter_name, *args, **kwargs)
        before = None if adapter_name in self.peft_config else ModelState(self)
        folder = _local(model_id, kwargs)
        source = _source.get()
        if source is None or source.folder != folder:
            source = Source.opened(folder)
        token = _source.set(source)
        try:
            return load(self, model_id, adapter_name, *args, **kwargs)
        except BaseException as error:
            problems = []
            if isinstance(error, KeyError) and adapter_name in self.peft_config and folder is not None:
                problems = missing_modules(self, adapter_name, _names(folder))
            if before is not None:
                before.restore()
            if problems:
                raise misfit(adapter_name, problems) from error
            raise
        finally:
            _source.reset(token)

    return load_adapter


def checked_transformers_load(load: Loader) -> Loader:
    """Wrap ``load_adapter`` of Transformers' models, which ``from_pretrained`` of an adapter's folder calls.

    It loads the adapter's own tensors and logs what else is there or is not. A GraphMoE adapter of which something
    would be missing is refused, and the model is as it was.
    """

    @wraps(load)
    def load_adapter(self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        name = "default" if adapter_name is None else adapter_name
        load_config = kwargs.get("load_config")
        model_id = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        before = None if name in getattr(self, "peft_config", {}) else ModelState(self)
        source = Source.opened(_local(model_id, kwargs.get("adapter_kwargs") or {}))
        if source is not None:
            _check_transformers(_settings(source.folder) or {}, str(source.folder))
        try:
            info = load(self, peft_model_id, adapter_name, *args, **kwargs)
            config = self.peft_config[name]
            if isinstance(config, GraphMoEConfig):
                _check_transformers(vars(config), str(model_id))
                _check_loaded(self, name, info)
            if source is not None:
                source.check_unchanged()
        except BaseException:
            added = getattr(self, "peft_config", {}).get(name)
            if before is not None and isinstance(added, GraphMoEConfig):
                before.restore()
            raise
        return info

    return load_adapter


def _check_transformers(settings: dict[str, Any], what: str) -> None:
    """Refuse what Transformers' loader leaves out."""
    left_out = [name for name in ("modules_to_save", "trainable_token_indices") if settings.get(name)]
    if left_out:
        given = " and ".join(f"{name}={settings[name]!r}" for name in left_out)
        raise ValueError(
            f"{what} has {given}, whose weights Transformers' loader leaves out, so the model would run with the base "
            "model's; load it by PEFT: AutoPeftModelForCausalLM.from_pretrained(folder), or "
            "PeftModel.from_pretrained(model, folder)"
        )


def _check_loaded(model: nn.Module, adapter_name: str, info: Any) -> None:
    """Refuse an adapter of which tensors were missing or without a place; Transformers itself refuses other shapes."""
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
    own = set(_filter_state_dict_by_key_prefixes(model.state_dict(), prefixes))
    problems = [f"{name}: missing from the checkpoint" for name in sorted(own & set(info.missing_keys))]
    problems += [f"{name}: not in the model" for name in sorted(info.unexpected_keys)]
    problems += [f"{mismatch[0]}: another shape than in the model" for mismatch in sorted(info.mismatched_keys)]
    if problems:
        raise misfit(adapter_name, problems)


def _local(model_id: Any, kwargs: dict[str, Any]) -> Path | None:
    """Return the adapter's folder, if it is one on disk; what is fetched from a hub is a commit, which is whole."""
    if model_id is None:
        return None
    folder = Path(model_id) / (kwargs.get("subfolder") or "")
    return folder if folder.is_dir() else None


def _settings(folder: Path) -> dict[str, Any] | None:
    """Read the content of adapter_config.json; None if there is none, or none that can be read."""
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _check_config(folder: Path, weights: Path) -> None:
    """Refuse a configuration that is there and cannot be read, if the weights beside it are of a GraphMoE adapter."""
    path = folder / CONFIG_NAME
    if not path.exists() or inspect_weights(weights) is None:
        return
    size = path.stat().st_size
    raise ValueError(
        f"{path} ({size:,} bytes) holds no JSON object: it is cut off or damaged; save or fetch the adapter again"
    )


def _identities(folder: Path, weights: Path) -> tuple[object, ...]:
    """Collect what tells each file from one that was moved into its place."""
    found: list[object] = [weights_path(folder)]
    for path in (folder / CONFIG_NAME, weights):
        try:
            status = path.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _names(folder: Path) -> list[str]:
    path = weights_path(folder)
    return [] if path is None else tensor_names(path)

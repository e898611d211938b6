"""An adapted module by its path: where it is in the model, and which tensors a saved adapter has for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.conversion.layout import Entry, linear_entries, mlp_entries
from graphmoe_model.module_names import ROOT

_PATH = re.compile(r"(?P<stem>.+)\.(?P<layer>\d+)\.(?P<place>\D.*)")


class Module(NamedTuple):
    """An adapted module, by its path.

    ``model.layers.3.self_attn.q_proj`` has the stem ``model.layers``, the layer 3 and the place ``self_attn.q_proj``. A
    module outside of numbered layers has the layer None and its whole path as its place.
    """

    path: str
    is_mlp: bool
    stem: str
    layer: int | None
    place: str

    @classmethod
    def at(cls, path: str, is_mlp: bool) -> Module:
        """Take a module's path apart."""
        match = _PATH.fullmatch(path)
        if match is None:
            return cls(path, is_mlp, "", None, path)
        return cls(path, is_mlp, match["stem"], int(match["layer"]), match["place"])

    def entries(self, config: GraphMoEConfig) -> Iterator[tuple[str, Entry]]:
        """List its tensors, by their full names."""
        for entry in mlp_entries(config) if self.is_mlp else linear_entries(config):
            yield f"{ROOT}{self.path}.{entry.name}", entry

"""GraphMoE in Axolotl: ``adapter: graphmoe`` in a YAML file, with ``plugins: [graphmoe_axolotl.GraphMoEPlugin]``."""

from graphmoe_axolotl.args import GraphMoEArgs
from graphmoe_axolotl.plugin import GraphMoEPlugin

__all__ = ["GraphMoEArgs", "GraphMoEPlugin"]

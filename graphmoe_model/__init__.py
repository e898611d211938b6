"""The GraphMoE layer, its configuration, and the method as PEFT knows it, which importing this registers."""

from graphmoe_model.config import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.mlp_layouts import MLPLayout, register_mlp_layout
from graphmoe_model.parameters.groups import optimizer_groups
from graphmoe_model.registration import register
from graphmoe_model.routing.callback import RouterLossCallback
from graphmoe_model.routing.expert_load import collect_routing
from graphmoe_model.routing.loss import router_loss
from graphmoe_model.tuner.model import GraphMoEModel
from graphmoe_model.tuner.peft_helpers import create_loraplus_optimizer

register()

__all__ = [
    "FusedGraphMoEFFN",
    "GraphMoEConfig",
    "GraphMoEModel",
    "GraphMoEPeftType",
    "MLPLayout",
    "RouterLossCallback",
    "collect_routing",
    "create_loraplus_optimizer",
    "optimizer_groups",
    "register_mlp_layout",
    "router_loss",
]

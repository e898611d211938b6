"""What an adapter trains, by component: counted, on a model or from a config alone, and as an optimizer's groups."""

from graphmoe_model.parameters.counting import (
    COMPONENTS,
    AdapterParameters,
    adapter_parameters,
    parameters_by_component,
)
from graphmoe_model.parameters.groups import optimizer_groups

__all__ = ["COMPONENTS", "AdapterParameters", "adapter_parameters", "optimizer_groups", "parameters_by_component"]

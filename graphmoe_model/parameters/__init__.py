"""How many parameters an adapter trains, by component: counted on a model, or from a config without its weights."""

from graphmoe_model.parameters.counting import (
    COMPONENTS,
    AdapterParameters,
    adapter_parameters,
    parameters_by_component,
)

__all__ = ["COMPONENTS", "AdapterParameters", "adapter_parameters", "parameters_by_component"]

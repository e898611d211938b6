"""Base models by name, and models with an adapter that take no memory for weights."""

from graphmoe_model.base_models.hub import hub_is_reachable
from graphmoe_model.base_models.loading import (
    Bits,
    ModelSource,
    load_base_config,
    load_base_model,
    load_tokenizer,
)
from graphmoe_model.base_models.matching import check_base, check_task
from graphmoe_model.base_models.on_meta import AdaptedOnMeta, adapted_on_meta
from graphmoe_model.base_models.shapes import check_is_model, is_local_model, load_config, model_config
from graphmoe_model.base_models.unpacking import unpack
from graphmoe_tables.models import MODEL_SHAPES, ModelShape, model_shape

__all__ = [
    "MODEL_SHAPES",
    "AdaptedOnMeta",
    "Bits",
    "ModelShape",
    "ModelSource",
    "adapted_on_meta",
    "check_base",
    "check_is_model",
    "check_task",
    "hub_is_reachable",
    "is_local_model",
    "load_base_config",
    "load_base_model",
    "load_config",
    "load_tokenizer",
    "model_config",
    "model_shape",
    "unpack",
]

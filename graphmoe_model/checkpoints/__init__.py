"""Adapter checkpoints are whole: replaced as a whole when they are saved, checked as a whole when they are loaded.

Saving: `saving` wraps PEFT's, `whole` refuses to save a part, `folder` replaces the files together, `digest` marks them
as of one save. Loading: `loading` wraps PEFT's and Transformers', `weights` reads a file without running code in it,
`fitting` compares it with the model, `spread` writes to parameters that are spread over processes. `tensor_names` knows
which tensors are an adapter's, `configuration` reads its settings.
"""

from graphmoe_model.checkpoints.configuration import read_config, saved_adapter_config
from graphmoe_model.checkpoints.digest import check_digest, stamp
from graphmoe_model.checkpoints.fitting import fitting_state
from graphmoe_model.checkpoints.folder import check_target, fill_folder, in_use, temporary_folder
from graphmoe_model.checkpoints.loading import (
    check_source,
    checked_from_pretrained,
    checked_load,
    checked_transformers_load,
)
from graphmoe_model.checkpoints.saving import save_whole
from graphmoe_model.checkpoints.spread import load_into_spread, loaded_in_place
from graphmoe_model.checkpoints.tensor_names import own_tensors, saved_key
from graphmoe_model.checkpoints.weights import Weights, read_weights_file, weights_file
from graphmoe_model.checkpoints.whole import NotWhole, whole_adapter_state, whole_transformers_state

__all__ = [
    "NotWhole",
    "Weights",
    "check_digest",
    "check_source",
    "check_target",
    "checked_from_pretrained",
    "checked_load",
    "checked_transformers_load",
    "fill_folder",
    "fitting_state",
    "in_use",
    "load_into_spread",
    "loaded_in_place",
    "own_tensors",
    "read_config",
    "read_weights_file",
    "save_whole",
    "saved_adapter_config",
    "saved_key",
    "stamp",
    "temporary_folder",
    "weights_file",
    "whole_adapter_state",
    "whole_transformers_state",
]

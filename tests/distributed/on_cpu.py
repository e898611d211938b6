"""Let accelerate shard over processes that have no GPU, and DeepSpeed do so without a compiler.

accelerate turns FSDP and DeepSpeed into nothing at all where it finds no accelerator: a test would then compare one
plain model with another. Nothing else of accelerate, Transformers or DeepSpeed is changed.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def shard_on_cpu() -> None:
    """Have this process's ``Accelerator`` do on the CPU, over gloo, what ``accelerate launch`` asked it to do.

    To be called before the first ``Accelerator`` or ``TrainingArguments``. Plain DDP needs it not: ``use_cpu=True``.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    if find_spec("deepspeed"):
        backend: Any = import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm it is torch itself
        backend.build_shm_op = lambda: None  # compiled at first use; gloo does without

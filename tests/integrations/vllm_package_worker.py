"""Loads exported folders by the real vLLM and writes logits or errors; started by `test_vllm_package.py`.

vLLM's kernels are compiled for its device and do not load elsewhere. So attention is computed here by PyTorch, without
a cache of keys and values, and vLLM's other operators run in their own PyTorch form. All else is vLLM's: plugins, the
configuration, the registry, the loader, the models.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
import torch.nn.functional as F

LENGTH = 9


def attention(self, query, key, value, output_shape=None, output_dtype=None):
    """Causal attention of sequences of one length, laid end to end."""
    del output_shape, output_dtype
    heads = [(query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads)]
    q, k, v = (t.view(-1, LENGTH, n, self.head_size).transpose(1, 2) for t, n in heads)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=self.impl.scale)
    return out.transpose(1, 2).reshape(query.shape)


def main(jobs_file: str, ids_file: str) -> None:
    """Run each job: a folder, options of the engine, and the file for the logits, or for the error's text."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    ids = torch.load(ids_file)
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            found = logits(engine(job["folder"], **job["options"]), ids)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        torch.save(found, job["output"])


def engine(folder, **options):
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    given = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4, "dtype": "float32", **options}
    settings = EngineArgs(model=folder, **given).create_engine_config()
    if not parallel_state.model_parallel_is_initialized():
        start(settings)
    return settings


def start(settings) -> None:
    """One process as vLLM's group of devices, and attention by PyTorch."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.attention import Attention
    from vllm.utils.network_utils import get_open_port

    Attention.forward = attention
    torch.accelerator.empty_cache = lambda: None  # it has no CPU, and vLLM's worker for CPUs does the same
    with set_current_vllm_config(settings):
        at = f"tcp://127.0.0.1:{get_open_port()}"
        parallel_state.init_distributed_environment(1, 0, at, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)


@torch.inference_mode()
def logits(settings, ids):
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model

    with torch.inference_mode(False), set_current_vllm_config(settings):
        model = get_model(vllm_config=settings)
    for module in model.modules():
        if hasattr(module, "forward_native"):
            module._forward_method = module.forward_native
    positions = torch.arange(LENGTH).repeat(len(ids))
    with set_current_vllm_config(settings), set_forward_context(None, settings, num_tokens=ids.numel()):
        hidden = model(ids.flatten(), positions)
        return model.compute_logits(hidden).view(*ids.shape, -1)


if __name__ == "__main__":
    main(*sys.argv[1:])

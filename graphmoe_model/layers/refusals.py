"""What no layer with routed experts can do, in the words of its refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def not_mergeable(configs: Iterable[Any]) -> str:
    """Return why adapters of these `GraphMoEConfig` are not merged here, and what to do: PEFT merges a plain LoRA."""
    if all(config.method == "lora" and config.rounds == 1 for config in configs):
        return (
            "this adapter is a plain LoRA (method='lora', one round), which is merged as PEFT's own, not here: save it "
            "with save_pretrained('ADAPTER'), convert it (graphmoe convert ADAPTER TARGET --to peft), load TARGET with "
            "PeftModel.from_pretrained(base, 'TARGET') and call merge_and_unload() on that. Or keep it as it is, or "
            "unload() it"
        )
    return (
        "GraphMoE adapters cannot be merged into the base model: which experts run depends on the input, and later "
        "rounds are nonlinear in it. Keep the adapter (its folds are cached for inference), or unload() it. An adapter "
        "of method='lora' with one round can be merged as PEFT's own LoRA: graphmoe convert ADAPTER TARGET --to peft."
    )


NO_DATA_PARALLEL = (
    "GraphMoE layers do not run under nn.DataParallel, in which Trainer wraps a model by itself where it sees several "
    "GPUs and no launcher: its copies have no parameters, so a router's loss would train no router, and all copies "
    "would share one record of their routing. Start one process per GPU (torchrun --nproc-per-node=8 train.py, or "
    "accelerate launch train.py), or show the process one GPU (CUDA_VISIBLE_DEVICES=0 in its environment)"
)

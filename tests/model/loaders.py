"""Every way to load a saved adapter: from a folder with the base model and, in 'adapter', the adapter."""

from pathlib import Path

from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from graphmoe_model import GraphMoEConfig
from tests.model.tiny_models import tiny_model

LOADERS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_model(), folder / "adapter"),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(
        tiny_model(), folder / "adapter", low_cpu_mem_usage=True
    ),
    "trainable": lambda folder: PeftModel.from_pretrained(tiny_model(), folder / "adapter", is_trainable=True),
    "no autocast": lambda folder: PeftModel.from_pretrained(
        tiny_model(), folder / "adapter", autocast_adapter_dtype=False
    ),
    "another name": lambda folder: PeftModel.from_pretrained(tiny_model(), folder / "adapter", adapter_name="other"),
    "config": lambda folder: PeftModel.from_pretrained(
        tiny_model(), folder / "adapter", config=GraphMoEConfig.from_pretrained(str(folder / "adapter"))
    ),
    "AutoPeftModel": lambda folder: AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"),
    "AutoModel": lambda folder: AutoModelForCausalLM.from_pretrained(folder / "adapter"),
    "AutoModel.load_adapter": lambda folder: _with_loaded_adapter(folder),
}


def _with_loaded_adapter(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_adapter(str(folder / "adapter"), adapter_name="other")
    return model

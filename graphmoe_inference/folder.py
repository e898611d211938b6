"""What an exported model's folder holds, and its description as it is read back.

``base/`` is the base model as Transformers saves it, with its tokenizer. Beside it, in the folder itself:

- ``config.json``: of the model type ``graphmoe``, which Transformers does not know, so that nothing loads the base
  alone in the belief that it is the whole model. Under ``graphmoe`` it has what `ExportedModel` holds.
- ``graphmoe.safetensors``: the adapter's tensors, by module and name, as ``model.layers.0.mlp.router.weight``.
- the tokenizer and ``generation_config.json`` once more, as servers read them from a model's own folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
BASE, CONFIG, WEIGHTS = "base", "config.json", "graphmoe.safetensors"
MODEL_TYPE, ARCHITECTURE = "graphmoe", "GraphMoEForCausalLM"


class MLPExport(NamedTuple):
    """An MLP with experts.

    Attributes:
        gate, up, down: names of its linears; gate and up are one where one linear holds both, the gate first.
        activation: its name in `graphmoe_kernels.ACTIVATIONS`.
        num_experts: n.
        scale: s of s B A.
    """

    gate: str
    up: str
    down: str
    activation: str
    num_experts: int
    scale: float


class LinearExport(NamedTuple):
    """A linear with LoRA, or with experts of its own.

    Attributes:
        scale: s of s B A.
        num_experts: n; None where it is plain LoRA.
    """

    scale: float
    num_experts: int | None = None


@dataclass(frozen=True)
class ExportedModel:
    """An adapter as it is exported: its settings, and which modules it is on.

    Attributes:
        title: what it is called, ``"GraphMoE(MixLoRA)"``.
        routers: ``"layer"`` where one router chooses whole MLPs, ``"linear"`` where each linear mixes its experts, None
            where there is one expert.
        dense: whether every token has all experts.
        use_dora: whether experts have magnitudes.
        rounds, top_k, norm_topk_prob, candidate_input, candidate_activation, fold, backend: as in `GraphMoEConfig`.
        mlps, linears: module name -> what is on it.
        weights: SHA-256 of `WEIGHTS`.
        made_by: versions of the packages that wrote it.
    """

    title: str
    routers: str | None
    dense: bool
    use_dora: bool
    rounds: int
    top_k: int
    norm_topk_prob: bool
    candidate_input: str
    candidate_activation: str
    fold: str
    backend: str
    mlps: dict[str, MLPExport]
    linears: dict[str, LinearExport]
    weights: str
    made_by: dict[str, str]

    def as_config(self, base: dict[str, Any]) -> dict[str, Any]:
        """Return `CONFIG` as JSON takes it; ``base`` is the base model's configuration."""
        own = asdict(self)
        own["mlps"] = {name: each._asdict() for name, each in self.mlps.items()}
        own["linears"] = {name: each._asdict() for name, each in self.linears.items()}
        graphmoe = {"format": FORMAT, **own}
        return {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "graphmoe": graphmoe, "base_config": base}


def read_export(folder: str | Path) -> ExportedModel:
    """Read the description of an exported model.

    Raises:
        ValueError: there is no such folder, it is no exported model (an adapter is named as one), it is of a newer
            format, or its weights are others than were exported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name one that graphmoe export wrote")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter; graphmoe export makes a folder for inference of it and its base")
    if folder.name == BASE and (folder.parent / WEIGHTS).is_file():
        raise ValueError(f"{folder} is the base model inside of an export; name {folder.parent}")
    try:
        own = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["graphmoe"]
        found = own.pop("format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no model that graphmoe export wrote ({CONFIG}: {error})") from error
    if found != FORMAT:
        raise ValueError(f"{folder} is of format {found}, and this version of graphmoe reads {FORMAT}; update graphmoe")
    try:
        own["mlps"] = {name: MLPExport(**each) for name, each in own["mlps"].items()}
        own["linears"] = {name: LinearExport(**each) for name, each in own["linears"].items()}
        exported = ExportedModel(**own)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}; export the model again") from error
    weights = folder / WEIGHTS
    if not weights.is_file() or digest(weights) != exported.weights:
        raise ValueError(f"{weights} is not the file that {CONFIG} describes; export the model again, or copy it whole")
    return exported


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Another process: it keeps folds of its own, loads exported graphs and says how far each is from what it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from graphmoe_kernels import FoldCache, RethinkingSpec, rethink
from graphmoe_kernels.testing import make_layer, relative_error


def main(folder: Path) -> None:
    """Print the errors by file name as JSON."""
    layers = [make_layer(hidden=48, intermediate=80, num_experts=4, rank=5, gru_width=14, seed=1) for _ in range(8)]
    caches = [FoldCache(lambda weights=weights: weights) for weights in layers]  # of the exported layers' sizes
    with torch.no_grad():
        for weights, cache in zip(layers, caches, strict=True):
            rethink(torch.randn(3, 48).double(), weights, RethinkingSpec(rounds=2, top_k=2, scale=1.4), cache=cache)
        errors = {}
        for file in sorted(folder.glob("*.pt2")):
            case = torch.load(file.with_suffix(".case"), weights_only=True)
            run = torch.export.load(file).module()
            errors[file.stem] = max(relative_error(run(x), y) for x, y in zip(case["x"], case["y"], strict=True))
        for file in sorted(folder.glob("*.jit")):
            case = torch.load(file.with_suffix(".case"), weights_only=True)
            run = torch.jit.load(file)
            errors[file.stem] = max(relative_error(run(x), y) for x, y in zip(case["x"], case["y"], strict=True))
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

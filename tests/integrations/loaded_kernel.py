"""Calls of a kernel's operators, and a script that loads kernels where no graphmoe_kernels can be imported.

python loaded_kernel.py RESULTS VARIANT [VARIANT ...] loads build variants, calls each, and saves what they gave.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

N, n, K, R, F, G = 9, 4, 2, 2, 24, 8


def backends():
    """Which run on a CPU: Triton where it is interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    return ["torch", "triton"] if interpreted else ["torch"]


def results(kernel, backend):
    """Outputs of three operators, and their gradients; of one draw, whichever kernel it is."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    logits = draw(N, n)
    routing = kernel.topk_softmax_routing(logits, K, backend=backend)
    leaves = [draw(N, F), draw(N, F), draw(N, 2 * n * R), draw(n, F, R), draw(n, F, R), draw(n, R, F)]
    gate, up, low, gate_B, up_B, down_A = leaves
    pairs = kernel.GateUp(gate, up), kernel.GateUp(gate_B, up_B)
    operands = kernel.ExpertOperands(pairs[0], low, pairs[1], down_A, routing.routing_weights, routing.expert_ids)
    hidden, low_down = kernel.expert_swiglu(operands, scale=2.0, backend=backend)
    gru = [draw(N, 3 * G), draw(N, 2 * G), draw(N, G), draw(N, G), draw(G, G), draw(G)]
    states = kernel.gru_step(*gru, backend=backend)
    loss = hidden.square().sum() + low_down.square().sum() + states.square().sum()
    gradients = torch.autograd.grad(loss, [logits, *leaves, *gru])
    found = [routing.routing_weights, routing.expert_ids, hidden, low_down, states, *gradients]
    return [tensor.detach() for tensor in found]


def load(variant, name):
    """A variant as a package of any name."""
    spec = importlib.util.spec_from_file_location(name, Path(variant) / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path, *variants):
    sys.modules["graphmoe_kernels"] = None  # what an import of it sees where it is not installed
    torch.set_num_threads(1)
    loaded = [load(variant, f"another_name_{number}") for number, variant in enumerate(variants)]
    namespaces = [module._ops.ops.name for module in loaded]
    operators = [str(getattr(torch.ops, namespace).expert_swiglu.default) for namespace in namespaces]
    called = [{backend: results(module, backend) for backend in backends()} for module in loaded]
    torch.save({"called": called, "namespaces": namespaces, "operators": operators}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

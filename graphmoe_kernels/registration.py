"""When a call goes through an operator that is registered with torch, and when its implementation is called as it is.

The registered operator costs 5 to 20 us of host time per call. It is there for whoever looks at a call from outside:
autograd, a compiler or exporter, a mode that sees every operation, a tensor of a class of its own or without data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def seen_from_outside(*tensors: Tensor | None) -> bool:
    """Tell whether a call on ``tensors`` has to go through the registered operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._len_torch_function_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    with_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_meta or (with_gradients and tensor.requires_grad):
            return True
    return False


def unseen(x: Tensor) -> bool:
    """Tell of a whole call, by its input, that nobody looks at what it does: then its operators need not ask each."""
    return not torch.is_grad_enabled() and not seen_from_outside(x)

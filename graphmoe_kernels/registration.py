"""When a call goes through an operator that is registered with torch, and when its implementation is called as it is.

The registered operator costs 5 to 20 us of host time per call. It is there for whoever looks at a call from outside:
autograd, a compiler or exporter, a transformation of torch.func, a mode that sees every operation, a tensor of a class
of its own or without data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
_followed = False


@contextmanager
def followed_inside() -> Iterator[None]:
    """Have calls without gradients run as they do unseen, below a mode that sees what an implementation starts."""
    global _followed
    before, _followed = _followed, True
    try:
        yield
    finally:
        _followed = before


def seen_from_outside(*tensors: Tensor | None) -> bool:
    """Tell whether a call on ``tensors`` has to go through the registered operator.

    Raises:
        NotImplementedError: a tensor carries a forward-mode derivative, which the operator would lose.
    """
    if _followed and not torch.is_grad_enabled():
        return False
    if forward_ad._current_level >= 0:
        _check_no_tangent(tensors)
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


def _check_no_tangent(tensors: Iterable[Tensor | None]) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "graphmoe's operators have no forward-mode derivatives (torch.autograd.forward_ad, torch.func.jvp); use "
            "backward derivatives, as torch.autograd.grad gives them"
        )


def unseen(x: Tensor) -> bool:
    """Tell of a whole call, by its input, that nobody looks at what it does: then its operators need not ask each."""
    return not torch.is_grad_enabled() and not seen_from_outside(x)

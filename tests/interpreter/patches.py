"""Where the repairs and the checks are put into Triton's interpreter.

The only module that replaces methods of the interpreter, apart from `bfloat16`, which is arithmetic alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter

from tests.interpreter import bfloat16, bounds, memory, order, poison, races
from tests.interpreter.settings import ACTIVE

CHECK_ERRORS = (bounds.BoundsError, races.RaceError)


@dataclasses.dataclass
class _Launch:
    """The launch that runs now: what its programs may touch, and what they did."""

    regions: list[memory.Region] = dataclasses.field(default_factory=list)
    races: races.Races | None = None
    patched: set[int] = dataclasses.field(default_factory=set)  # modules of nested kernels, by their globals' id


_launch = _Launch()


@functools.cache
def install() -> None:
    """All repairs and checks, once in a process."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("triton was imported without TRITON_INTERPRET=1: there is no interpreter to repair")
    bfloat16.repair()
    _watch_launches()
    _watch_programs()
    _watch_memory()
    _watch_atomics()
    _repair_index()
    _patch_once_for_nested_kernels()


def _watch_launches() -> None:
    executor = interpreter.GridExecutor
    init_args, call = executor._init_args_hst, executor.__call__

    def _init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        result = init_args(self, args, kwargs)
        bound = inspect.signature(self.fn).bind_partial(*result[0], **result[1])
        _launch.regions = memory.regions(bound.arguments)
        _launch.races = races.Races(_launch.regions) if ACTIVE.races else None
        return result

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:  # which wraps what a kernel raised, once for each nested call
            cause: BaseException | None = error
            while isinstance(cause, interpreter.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, CHECK_ERRORS):
                raise cause from None
            raise
        finally:
            _launch.regions, _launch.races = [], None
            _launch.patched.clear()

    executor._init_args_hst, executor.__call__ = _init_args_hst, __call__


def _watch_programs() -> None:
    builder = interpreter.InterpreterBuilder
    set_grid_idx, create_barrier = builder.set_grid_idx, builder.create_barrier

    def ordered_set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, *order.reordered((x, y, z), self.grid_dim))
        if _launch.races is not None:
            _launch.races.begin_program(self.grid_idx)

    def watched_barrier(self: Any) -> None:
        create_barrier(self)
        if _launch.races is not None:
            _launch.races.barrier()

    builder.set_grid_idx, builder.create_barrier = ordered_set_grid_idx, watched_barrier


def _watch_memory() -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        addresses = _checked("load", self, pointers, mask)
        if _launch.races is not None and addresses.size:
            _launch.races.load(addresses, memory.element_bytes(pointers))
        if other is None and ACTIVE.poison:
            dtype = pointers.get_element_ty()
            stored_as = interpreter._get_np_dtype(dtype)
            value = poison.poison_value(stored_as, dtype == triton.language.bfloat16)
            other = interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype=stored_as), dtype)
        return load(self, pointers, mask, other, *rest, **options)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        addresses = _checked("store", self, pointers, mask)
        if _launch.races is not None and addresses.size:
            values = memory.active_lanes(np.broadcast_to(value.data, pointers.data.shape), mask)
            _launch.races.store(addresses, values, memory.element_bytes(pointers))
        return store(self, pointers, value, mask, *rest, **options)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


def _watch_atomics() -> None:
    builder = interpreter.InterpreterBuilder
    update, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        _observe_atomic(self, pointers, mask, sem, scope)
        return update(self, op, pointers, value, mask, sem, scope)

    def create_atomic_cas(self: Any, pointers: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        _observe_atomic(self, pointers, None, sem, scope)
        return exchange(self, pointers, expected, value, sem, scope)

    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


def _observe_atomic(builder: Any, pointers: Any, mask: Any, sem: Any, scope: Any) -> None:
    addresses = _checked("update", builder, pointers, mask)
    if _launch.races is None or scope == interpreter._ir.MEM_SYNC_SCOPE.CTA:
        return
    kinds = interpreter._ir.MEM_SEMANTIC
    acquires, releases = (sem in (kind, kinds.ACQUIRE_RELEASE) for kind in (kinds.ACQUIRE, kinds.RELEASE))
    _launch.races.atomic(addresses, acquires, releases)


def _checked(access: str, builder: Any, pointers: Any, mask: Any) -> np.ndarray:
    """The active addresses of an access, inside the launch's tensors."""
    addresses = memory.active_lanes(pointers.data, mask)
    if ACTIVE.bounds and addresses.size:
        bounds.check(access, addresses, memory.element_bytes(pointers), _launch.regions, builder.grid_idx)
    return addresses


def _repair_index() -> None:
    """Triton 3.6 turns a scalar into an index by ``int(array)``, which NumPy refuses for arrays from version 2.4 on."""
    patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


def _patch_once_for_nested_kernels() -> None:
    """A kernel that calls another replaces the functions of ``tl`` anew at every call; here once a launch and module.

    Measured on a kernel of 20 nested calls and little else: 11 ms a launch instead of 30.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in _launch.patched:
            _launch.patched.add(module)
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = __call__

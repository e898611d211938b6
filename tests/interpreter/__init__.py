"""Triton's CPU interpreter, repaired and made strict: what the kernel tests run in where there is no GPU.

The stock interpreter (TRITON_INTERPRET=1) runs a kernel's programs one after another in NumPy. It computes bfloat16
wrongly (`bfloat16`), and it forgives what a GPU does not: masked lanes that hold rubbish (`poison`), addresses outside
every tensor (`bounds`), programs that touch each other's memory (`races`) and a result that depends on the order of the
programs (`order`). `install` puts the repairs and the checks into the interpreter of this process, once; every kernel
test then runs under them.
"""

from graphmoe_kernels import backend
from tests.interpreter.bounds import BoundsError as BoundsError
from tests.interpreter.order import grid_order as grid_order
from tests.interpreter.races import RaceError as RaceError
from tests.interpreter.settings import checks as checks


def install() -> None:
    """Repair this process's interpreter and switch the checks on. Needs TRITON_INTERPRET=1 before triton's import."""
    from tests.interpreter import patches

    patches.install()
    backend.interpreter_repaired = True

"""What torchrun runs in every process for `tests.distributed.launch.launch`."""

from __future__ import annotations

import faulthandler
import importlib
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record


@record  # torchrun then shows the traceback of the rank that failed first
def main(name: str, folder: str, timeout: float) -> None:
    """Run the function called ``module:function`` in a gloo group and save what it returns as ``<rank>.pt``."""
    faulthandler.dump_traceback_later(timeout, exit=True)
    torch.set_num_threads(1)
    module, _, function = name.partition(":")
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    torch.manual_seed(0)
    result = getattr(importlib.import_module(module), function)(*arguments)
    torch.save(result, Path(folder) / f"{distributed.get_rank()}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))

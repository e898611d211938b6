"""Settings of the tests that run Transformers and PEFT: no hub, no progress bars."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, which comes later

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Layers this small are slower on two threads, and on a busy machine fifty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars():
    """Loading and saving tiny models draws more bars than tests print lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()

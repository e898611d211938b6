"""The device that the tests run on."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """Give the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

"""Marks and device of the tests of Triton kernels: on a machine with a CUDA device `pytest -m gpu` runs them there."""

import pytest
import torch

MARKS = [pytest.mark.kernels, *([pytest.mark.gpu] if torch.cuda.is_available() else [])]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

"""The settings of the other tests that run Transformers and PEFT."""

from tests.model.conftest import _no_progress_bars, _one_thread  # noqa: F401

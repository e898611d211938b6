"""The settings of the other tests that run Transformers and PEFT, and a CPU that bitsandbytes packs no weights for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model.conftest import _no_progress_bars, _one_thread  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _no_packing() -> Iterator[None]:
    """On CPUs with AVX512-BF16 bitsandbytes packs the weights of linears that are evaluated, which fails where a row is
    not of whole blocks, as the sizes here have it. The tests of packing turn it on."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "has_avx512bf16", lambda: False)
        yield

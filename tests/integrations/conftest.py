"""Settings of the tests of integrations: no hub, no telemetry, no progress bars."""

import importlib
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, which comes later
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # read when axolotl is imported

import pytest

from tests.integrations import stand_in
from tests.integrations.configurations import FOLDER, REAL, checked


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars():
    """Loading and saving tiny models draws more bars than tests print lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def package():
    """The plugin's package, over the real Axolotl or the stand-in; neither is left behind."""
    before = dict(sys.modules)
    if not REAL:
        sys.modules.update(stand_in.modules())
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("graphmoe_axolotl")
    sys.path.remove(str(FOLDER))
    for name in [n for n in sys.modules if n.split(".")[0] in ("axolotl", "graphmoe_axolotl") and n not in before]:
        if name.startswith("graphmoe_axolotl") or not REAL:
            del sys.modules[name]


@pytest.fixture
def plugin(package):
    return package.GraphMoEPlugin()


@pytest.fixture
def manager(package):
    """Axolotl's plugin manager, which is one for the whole process, with this plugin alone."""
    manager = importlib.import_module("axolotl.integrations.base").PluginManager.get_instance()
    kept = dict(manager.plugins)
    manager.plugins.clear()
    manager.register("graphmoe_axolotl.GraphMoEPlugin")
    yield manager
    manager.plugins.clear()
    manager.plugins.update(kept)


@pytest.fixture
def check(package, request):
    if REAL:
        request.getfixturevalue("manager")
    return lambda **changes: checked(package, **changes)

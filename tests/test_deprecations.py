"""The check that finds deprecated names in our own code finds them however they are reached, and finds no others'."""

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from typing_extensions import deprecated

from tests import deprecations


def library(name: str, source: str, **names: Any) -> ModuleType:
    """A module of another package, whose frames bear its name."""
    module = ModuleType(name)
    vars(module).update(names)
    exec(source, vars(module))
    return module


OLD = library(
    "library.part",
    """
import warnings

def old(stacklevel=1, category=FutureWarning):
    warnings.warn("old is deprecated, use new", category, stacklevel=stacklevel)
    return "result"

def through_another_function(**options):
    return old(**options)

class Settings:
    def __init__(self, old=None):
        warnings.warn("old is deprecated, use new", FutureWarning)
""",
)
DEPENDENCY = library("dependency", "def call(): return library.old()", library=OLD)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("stacklevel", [1, 2, 3])
@pytest.mark.parametrize("call", [OLD.old, OLD.through_another_function], ids=["called", "through the library"])
def test_a_deprecated_name_that_we_use_is_an_error(call, stacklevel, category):
    """Whatever module the library's stacklevel names; the message says where the name is used."""
    with pytest.raises(category, match=r"test_deprecations.py:\d+ uses what is going away: old is deprecated, use new"):
        call(stacklevel=stacklevel, category=category)


def test_it_is_an_error_through_a_module_and_a_class_and_a_decorator():
    """nn.Module calls a model's forward, and typing_extensions warns in the library's stead."""

    class Model(torch.nn.Module):
        forward = staticmethod(OLD.old)

    @deprecated("old is deprecated, use new")
    def decorated() -> None:
        """Gone soon."""

    with pytest.raises(FutureWarning, match=r"uses what is going away"):
        Model()()
    with pytest.raises(FutureWarning, match=r"uses what is going away"):
        OLD.Settings(old=1)
    with pytest.raises(DeprecationWarning, match=r"uses what is going away"):
        decorated()


def test_what_the_dependencies_do_among_themselves_stays_a_warning():
    with warnings.catch_warnings(record=True) as seen, deprecations.refused():
        assert DEPENDENCY.call() == "result"
    assert [str(warning.message) for warning in seen] == ["old is deprecated, use new"]


def test_a_dependency_that_was_first_hides_nothing():
    """Python shows a warning once per place, and a library's deprecation is often met by its other users first."""
    DEPENDENCY.call()
    with pytest.raises(FutureWarning, match=r"uses what is going away"):
        OLD.old()


def test_other_warnings_are_no_errors():
    with warnings.catch_warnings(record=True) as seen, deprecations.refused():
        warnings.warn("look here", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["look here"]


def test_a_warning_that_pytest_passes_on_is_not_its_test_s():
    """`pytest.warns` issues again what it did not expect: by then the stack says nothing about who called."""

    def both() -> None:
        DEPENDENCY.call()
        warnings.warn("look here", UserWarning, stacklevel=1)

    with (
        warnings.catch_warnings(record=True) as seen,
        deprecations.refused(),
        pytest.warns(UserWarning, match="look here"),
    ):
        both()
    assert [str(warning.message) for warning in seen] == ["old is deprecated, use new"]

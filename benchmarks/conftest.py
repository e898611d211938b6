"""`pytest benchmarks`: every contender of every case is a test; what was found stands in tables at the end.

A contender that is wrong fails. Nothing here fails for being slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from _pytest.terminal import TerminalReporter

from benchmarks.options import Chosen, add_options, choose
from benchmarks.session import Session
from benchmarks.summary import summary

CHOSEN = pytest.StashKey[Chosen]()
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The tables at the end have the same times, and ratios; `-v` shows those of pytest-benchmark too.
    config.option.benchmark_quiet = True
    config.stash[CHOSEN] = choose(config)
    config.stash[SESSION] = Session(config.stash[CHOSEN])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.stash[CHOSEN]
    if "profiled" in metafunc.fixturenames:
        metafunc.parametrize("profiled", chosen.profiled, ids=[model.name for model in chosen.profiled])
    if "contender" in metafunc.fixturenames:
        cases = chosen.cases
        found = [(case, contender) for case in cases for contender in case.contenders]
        ids = [identifier(f"{case.name} {contender.label}") for case, contender in found]
        metafunc.parametrize("case, contender", found, ids=ids)


def identifier(name: str) -> str:
    """A name as `-k` takes it: "T=3, 16 tokens" is T3-16-tokens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("=", "")).strip("-")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without cases, or without models to profile, there is no test of them to skip."""
    chosen = config.stash[CHOSEN]
    empty = {name for name, found in (("test_contender", chosen.cases), ("test_profile", chosen.profiled)) if not found}
    items[:] = [item for item in items if getattr(item, "originalname", "") not in empty]


def pytest_collection_finish(session: pytest.Session) -> None:
    """A case is measured with those of its contenders that `-k` left."""
    left = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    contenders = [(params["case"], params["contender"]) for params in left if "contender" in params]
    session.config.stash[SESSION].select(contenders)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Iterator[Session]:
    """What the run measures; its document is written at its end if that was asked for."""
    yield pytestconfig.stash[SESSION]
    if pytestconfig.getoption("save_results"):
        pytestconfig.stash[SESSION].save()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.content["steps"]:
        terminalreporter.section("GraphMoE")
        terminalreporter.write_line(summary(session.content, config.stash[CHOSEN].left_out))
        if session.path is not None:
            terminalreporter.write_line(f"written to {session.path}")

"""`pytest benchmarks`: every contender of every case is a test; what was found stands in tables at the end.

A contender that is wrong fails. Nothing here fails for being slow.
"""

from __future__ import annotations

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
    # The tables at the end have ratios; those of pytest-benchmark need not be wide.
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "rounds"]
    config.stash[CHOSEN] = choose(config)
    config.stash[SESSION] = Session(config.stash[CHOSEN])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.stash[CHOSEN]
    if "profiled" in metafunc.fixturenames:
        metafunc.parametrize("profiled", chosen.profiled, ids=[model.name for model in chosen.profiled])
    if "contender" in metafunc.fixturenames:
        cases = chosen.cases
        found = [(case, contender) for case in cases for contender in case.contenders]
        ids = [f"{case.name}: {contender.label}".replace(", ", "-").replace(": ", "-") for case, contender in found]
        metafunc.parametrize("case, contender", found, ids=ids)


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
    if session.content["rows"] or session.content["profiles"]:
        terminalreporter.section("GraphMoE")
        terminalreporter.write_line(summary(session.content, config.stash[CHOSEN].left_out))
        if session.path is not None:
            terminalreporter.write_line(f"written to {session.path}")

"""`pytest benchmarks`: every contender of every case is a test; what was found stands in tables at the end.

A contender that is wrong fails. Nothing here fails for being slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from _pytest.terminal import TerminalReporter

from benchmarks.conditions import file_name
from benchmarks.document import RESULTS, Document, ResultError
from benchmarks.options import add_options, choose
from benchmarks.page import summary
from benchmarks.session import Session

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The tables at the end have the same times, and ratios; a comparison is pytest-benchmark's own.
    config.option.benchmark_quiet = not config.option.benchmark_compare
    try:
        config.stash[SESSION] = Session(choose(config), Document(config.getoption("result")))
    except ResultError as error:
        raise pytest.UsageError(f"--result: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        cases = metafunc.config.stash[SESSION].chosen.cases
        found = [(case, contender) for case in cases for contender in case.contenders]
        ids = [identifier(f"{case.name} {contender.label}") for case, contender in found]
        metafunc.parametrize("case, contender", found, ids=ids)


def identifier(name: str) -> str:
    """A name as `-k` takes it: "T=3, 16 tokens" is T3-16-tokens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("=", "")).strip("-")


def pytest_collection_finish(session: pytest.Session) -> None:
    """A case is measured with those of its contenders that `-k` left."""
    left = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    contenders = [(params["case"], params["contender"]) for params in left if "contender" in params]
    session.config.stash[SESSION].select(contenders)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Iterator[Session]:
    """What the run measures; its document is written at its end if that was asked for."""
    session = pytestconfig.stash[SESSION]
    yield session
    document = session.document
    if pytestconfig.getoption("save_results") and document.path is None and document.measured:
        document.path = RESULTS / file_name(document.content["conditions"])
        document.save()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.document.measured:
        terminalreporter.section("GraphMoE")
        terminalreporter.write_line(summary(session.content))
        if session.document.path is not None:
            terminalreporter.write_line(f"written to {session.document.path}")

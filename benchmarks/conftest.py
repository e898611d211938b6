"""Options of the benchmarks, and the tables that a run ends with.

`pytest benchmarks` collects this folder alone; `pytest tests` never does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.groups import Group
from benchmarks.providers import PROVIDERS

RESULTS = Path(__file__).resolve().parent / "results"
Report = Callable[[str, list[Group], list[results.Target]], None]
REPORTS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GraphMoE benchmarks")
    group.addoption(
        "--providers",
        default="folded,literal,peer_mixlora",
        help=f"what is timed, of {', '.join(PROVIDERS)} (default: %(default)s)",
    )
    group.addoption("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    group.addoption(
        "--seconds", type=float, default=15.0, help="how long a case is timed, at least 5 turns (default: %(default)s)"
    )
    group.addoption("--save-results", action="store_true", help="also write benchmarks/results/<device>-*.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORTS] = []
    unknown = set(chosen_providers(config)) - PROVIDERS.keys()
    if unknown:
        raise pytest.UsageError(f"--providers: unknown {', '.join(sorted(unknown))}; there are {', '.join(PROVIDERS)}")
    if config.getoption("threads") < 1:
        raise pytest.UsageError(f"--threads must be at least 1, got {config.getoption('threads')}")


def chosen_providers(config: pytest.Config) -> list[str]:
    return config.getoption("providers").split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", chosen_providers(metafunc.config))


@pytest.fixture(scope="session")
def provider_names(pytestconfig: pytest.Config) -> list[str]:
    """The providers of ``--providers``."""
    return chosen_providers(pytestconfig)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Takes a device's groups and targets: shows them at the end of the run, and saves them if asked to."""
    load = results.load_average()

    def take(device: str, groups: list[Group], targets: list[results.Target]) -> None:
        found, measured = results.conditions(device, load), results.ratios(groups, targets)
        text = results.describe(found, groups, measured)
        if pytestconfig.getoption("save_results"):
            path = results.save(RESULTS, found, groups, measured)
            text += f"\n  written to {path}"
        pytestconfig.stash[REPORTS].append(text)

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for text in config.stash[REPORTS]:
        terminalreporter.section("GraphMoE")
        terminalreporter.write_line(text)

"""What is tested as the oldest set is what pyproject.toml allows, and the pinned set lies within it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

ROOT = Path(__file__).resolve().parent.parent


def pins(name: str) -> dict[str, Version]:
    """Package and version of a file of constraints, without the lines for other Pythons and systems."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: Version(str(r.specifier).removeprefix("==")) for r in found}


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """The package's requirements, or an extra's, by name; without the extras that an extra includes."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: r for r in found if r.name != project["name"]}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
    return bound


def test_the_citation_is_of_this_version():
    """What people cite is what they installed."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(cited["version"]) == project["version"]
    assert cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_the_changelog_and_the_integrations_are_of_this_version():
    """The newest section is what is installed, and a plugin says which version it was written for."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == version
    plugins = sorted((ROOT / "integrations").glob("*/pyproject.toml"))
    assert [path.parent.name for path in plugins] == ["axolotl", "vllm"]
    assert {tomllib.loads(path.read_text())["project"]["version"] for path in plugins} == {version}
    assert f"version {version}." in (ROOT / "README.md").read_text()


def test_one_list_of_pythons_is_tested_and_named():
    """What the package index shows, what the README says was tested, and what CI runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" :: ")[2] for line in project["classifiers"] if re.search(r":: Python :: 3\.\d", line)]
    (tested,) = re.findall(r"^\| Python \|.*\| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github/workflows/cpu.yml").read_text())
    assert named == tested.split(", ") == workflow["jobs"]["check-and-test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={named[0]}"


def test_the_oldest_set_is_the_lower_bounds():
    """A bound that no run has used is a guess."""
    imported = {**requirements(), **requirements("train"), **requirements("eval")}
    assert pins("constraints-oldest.txt") == {name: lower_bound(r) for name, r in imported.items()}


@pytest.mark.parametrize("extra", [None, "train", "demo", "eval", "bench", "distributed", "quant", "dev"])
def test_the_pinned_set_is_allowed(extra):
    """`make env` would find no solution, or one that nobody asked for."""
    pinned = pins("constraints.txt")
    for name, requirement in requirements(extra).items():
        if name in pinned:  # Triton has no line off Linux
            assert requirement.specifier.contains(pinned[name]), f"{requirement}, but {name}=={pinned[name]}"


def test_the_bench_extra_brings_what_pytest_is_configured_with(tmp_path):
    """`pytest benchmarks` reads the configuration that is written for the tests: where an option's or a marker's plugin
    came with `dev` alone, it ended before it began."""
    plugins = [
        entry.name
        for name in requirements("bench")
        for entry in metadata.distribution(name).entry_points
        if entry.group == "pytest11"
    ]
    assert "benchmark" in plugins
    chosen = [part for plugin in plugins for part in ("-p", plugin)]
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.timeout(60)\ndef test_it(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, "-c", str(ROOT / "pyproject.toml"), "-q", str(tmp_path)],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_transformers_takes_the_peft_that_is_installed():
    """Where it asks for another, its `from_pretrained(adapter_dir)`, `set_adapter` and `delete_adapter` raise."""
    assert Version(MIN_PEFT_VERSION) <= Version(metadata.version("peft"))

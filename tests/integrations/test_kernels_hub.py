"""graphmoe_kernels as a kernel of the kernels hub: what is assembled has the hub's form, and runs without the package.

Loaded by the `kernels` package where that is installed, and always as a package of another name.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import graphmoe_kernels
from integrations.kernels_hub import make_kernel
from tests.integrations import loaded_kernel

HERE = Path(__file__).parent
SOURCES = Path(graphmoe_kernels.__file__).parent
REPOSITORY = "my-org/graphmoe-kernels"
UPSTREAM = "https://example.org/graphmoe.git"
VARIANTS = ("torch-cpu", "torch-cuda", "torch-rocm")
# What a kernel leaves out: tools of this repository.
TOOLS = ("aot", "cost", "testing.py", "layer_cases.py", "meta_layer.py", "gru/compile_cases.py", "py.typed", "_ops.py")
MARK = "pytest.mark.kernels_ci"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The repository, assembled once."""
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    make_kernel.assemble(folder, REPOSITORY, upstream=UPSTREAM)
    return folder


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A repository of other sources."""
    folder = tmp_path_factory.mktemp("hub")
    package = folder / "graphmoe_kernels"
    shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "ranges.py").open("a") as file:
        file.write("\n# another version\n")
    make_kernel.assemble(folder / "kernel", REPOSITORY, version=1, package=package)
    return folder / "kernel"


@pytest.fixture(scope="module")
def elsewhere(kernel, changed, tmp_path_factory):
    """What both gave in one process that has no graphmoe_kernels."""
    path = tmp_path_factory.mktemp("hub") / "results.pt"
    variants = [str(each / "build" / "torch-cpu") for each in (kernel, changed)]
    run([sys.executable, str(HERE / "loaded_kernel.py"), str(path), *variants], path.parent)
    return torch.load(path)


def run(command, folder, **environment):
    found = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def with_kernels(kernel):
    """The environment for a process that imports `kernels`: the package, or what stands for it."""
    real = importlib.util.find_spec("kernels") is not None
    path = os.pathsep.join(filter(None, ["" if real else str(HERE / "kernels_stand_in"), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "LOCAL_KERNELS": f"{REPOSITORY}={kernel}", "HF_HUB_OFFLINE": "1"}


def metadata(kernel, variant):
    return json.loads((kernel / "build" / variant / "metadata.json").read_text())


def names(folder):
    """Of all files, by their paths; but for what an import leaves."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix() for path in files}


def modules(kernel):
    folders = [kernel / "torch-ext" / "graphmoe_kernels", *(kernel / "build" / variant for variant in VARIANTS)]
    return [(path, ast.parse(path.read_text())) for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_it_computes_the_same_without_graphmoe_kernels(elsewhere):
    """Bit for bit: outputs and gradients of routing, experts and GRU, and Triton's too where it is interpreted."""
    for backend, found in elsewhere["called"][0].items():
        expected = loaded_kernel.results(graphmoe_kernels, backend)
        assert len(found) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected, found, strict=True)), backend
    assert list(elsewhere["called"][0]) == loaded_kernel.backends()


def test_two_versions_are_loaded_side_by_side(elsewhere, kernel, changed):
    """Each finds its own operators, though both are registered in one process."""
    namespaces = elsewhere["namespaces"]
    assert namespaces == [metadata(each, "torch-cpu")["id"] for each in (kernel, changed)]
    assert len(set(namespaces)) == 2
    assert elsewhere["operators"] == [f"{namespace}.expert_swiglu.default" for namespace in namespaces]
    first, second = elsewhere["called"]
    assert all(map(torch.equal, first["torch"], second["torch"]))


def test_the_kernels_package_loads_it(kernel, changed):
    kernels = pytest.importorskip("kernels")
    loaded = [kernels.get_local_kernel(each, backend="cpu") for each in (kernel, changed)]
    assert [module.__name__ for module in loaded] == [metadata(each, "torch-cpu")["id"] for each in (kernel, changed)]
    expected = loaded_kernel.results(graphmoe_kernels, "torch")
    for module in loaded:
        assert all(map(torch.equal, expected, loaded_kernel.results(module, "torch")))


def test_the_kernels_package_reads_its_settings(kernel):
    """By the parsers and the digest that it shares with kernel-builder."""
    pytest.importorskip("kernels")
    from kernels._rust import Build, Digest, Metadata

    assert len(Build.open(kernel).general.backends) == len(VARIANTS)
    for variant in VARIANTS:
        folder = kernel / "build" / variant
        found = Metadata.read_from_file(folder / "metadata.json")
        assert (str(found.name), found.version, found.upstream) == ("graphmoe-kernels", 0, UPSTREAM)
        found.digest.validate(Digest.hash_variant(found.digest.algorithm, folder))


def test_kernels_info_describes_it(kernel):
    """The one command of the kernels package that describes what is not on the hub; `check` has left it."""
    pytest.importorskip("kernels.cli")
    code = "import sys; from kernels.cli import main; sys.argv[0] = 'kernels'; main()"
    out = json.loads(run([sys.executable, "-c", code, "info", str(kernel), "--json"], kernel, **with_kernels(kernel)))
    assert out["name"] == "graphmoe-kernels"
    assert out["backends"] == ["cpu", "cuda", "rocm"]


def test_nothing_imports_the_package_by_its_name(kernel):
    found = {}
    for path, tree in modules(kernel):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found.setdefault(path, []).extend(each.name for each in node.names)
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.setdefault(path, []).append(node.module)
    roots = {name.partition(".")[0] for names in found.values() for name in names}
    assert {"torch", "triton"} <= roots
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_operators_are_registered_in_the_namespace_of_the_build(kernel):
    """The builder refuses a decorator that names another; here calls that are no decorators too."""
    calls = [node for _, tree in modules(kernel) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    registered = [call for call in calls if ast.unparse(call.func).endswith("custom_op")]
    assert len(registered) == 8 * (1 + len(VARIANTS))
    assert {ast.unparse(call.args[0]).partition("(")[0] for call in registered} == {"add_op_namespace_prefix"}


def test_one_module_names_the_namespace():
    named = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if "graphmoe::" in path.read_text() or "ops.graphmoe" in path.read_text()
    }
    assert named == {"_ops.py", "ranges.py"}  # ranges: of a profiler's trace, which are no operators


def test_sources_are_what_the_package_reaches_and_its_configurations(kernel):
    sources = kernel / "torch-ext" / "graphmoe_kernels"
    files = names(sources)
    expected = {path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.json")}
    assert len(expected) == 16
    assert {name for name in files if name.endswith(".json")} == expected
    assert not {name for name in files if name.startswith(TOOLS)}
    for variant in VARIANTS:
        assert names(kernel / "build" / variant) == files | {"_ops.py", "metadata.json"}


def test_build_toml_has_the_fields_of_edition_5(kernel):
    found = tomllib.loads((kernel / "build.toml").read_text())
    general = found.pop("general")
    assert general == {
        "name": "graphmoe-kernels",
        "version": 0,
        "edition": 5,
        "license": "apache-2.0",
        "upstream": UPSTREAM,
        "backends": [variant.removeprefix("torch-") for variant in VARIANTS],
        "hub": {"repo-id": REPOSITORY},
    }
    noarch = {"pyext": ["py", "json"], "cuda_capabilities": ["8.0+PTX"], "rocm_archs": ["gfx942"]}
    assert found == {"torch-noarch": noarch}


def test_the_metadata_says_what_the_build_is(kernel):
    ids = [metadata(kernel, variant)["id"] for variant in VARIANTS]
    assert len(set(ids)) == len(VARIANTS)
    assert all(each.isidentifier() and each.startswith("_graphmoe_kernels_") for each in ids)
    assert [metadata(kernel, variant)["backend"] for variant in VARIANTS] == [
        {"type": "cpu"},
        {"type": "cuda", "archs": ["8.0+PTX"]},
        {"type": "rocm", "archs": ["gfx942"]},
    ]


def test_its_own_tests_are_marked_and_pass(kernel):
    """On the CPU, through `kernels.get_kernel`; all of them, and quickly, are what the hub's CI runs."""
    files = sorted((kernel / "tests").glob("test_*.py"))
    functions = [node for path in files for node in ast.parse(path.read_text()).body if hasattr(node, "decorator_list")]
    tests = [node for node in functions if node.name.startswith("test_")]
    assert len(tests) >= 7
    assert [node.name for node in tests if MARK not in map(ast.unparse, node.decorator_list)] == []
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", ".", "-o", "markers=kernels_ci: as the builder declares it"]
    command = [sys.executable, "-m", "pytest", *options, "--strict-markers", "-m", "kernels_ci", "tests"]
    out = run(command, kernel, **with_kernels(kernel))
    assert "passed" in out
    assert "deselected" not in out
    assert "skipped" not in out


def test_its_benchmarks_run_and_agree(kernel):
    """As `kernels benchmark` runs them: a fresh object for each, whose output is compared with the definition's."""
    code = """
        import importlib.util, sys, torch
        from pathlib import Path
        import kernels
        from kernels.benchmark import Benchmark
        sys.path.insert(0, "benchmarks")
        import benchmark
        classes = [c for c in vars(benchmark).values() if isinstance(c, type) and c.__module__ == "benchmark"]
        kernel = kernels.get_local_kernel(Path("."))
        for each in classes:
            assert issubclass(each, Benchmark)
            for name in [name for name in dir(each) if name.startswith("benchmark_")]:
                run = each()
                run.kernel, run.device = kernel, "cpu"
                run.setup()
                getattr(run, name)()
                assert torch.allclose(run.out, getattr(run, name.replace("benchmark", "verify", 1))(), atol=1e-2), name
                print(name)
    """
    lines = [line.removeprefix("        ") for line in code.splitlines()]
    out = run([sys.executable, "-c", "\n".join(lines)], kernel, **with_kernels(kernel))
    assert out.split() == ["benchmark_experts", "benchmark_gru_step", "benchmark_routing"]


def test_the_card_says_what_the_hub_asks_for(kernel):
    card = (kernel / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n")
    headings = [line.removeprefix("## ") for line in card.splitlines() if line.startswith("## ")]
    expected = ["How to use", "Available functions", "Available types", "Available layers", "Benchmarks", "Source"]
    assert headings == expected
    assert f'get_kernel("{REPOSITORY}", version=0, trust_remote_code=True)' in card
    listed = re.findall(r"^- `(\w+)`$", card, re.MULTILINE)
    page = (HERE.parents[1] / "docs" / "api" / "kernels.md").read_text()
    operators = {name for name in re.findall(r"^::: graphmoe_kernels\.(\w+)$", page, re.MULTILINE) if name.islower()}
    assert {name for name in listed if name.islower()} == operators, "the card and the site's page offer the same"
    assert set(listed) - operators == {n for n in graphmoe_kernels.__all__ if not n.isupper() and not n.islower()}
    assert UPSTREAM in card
    assert "{{" not in card, "the builder fills the card as a template: it must find nothing to fill"
    assert "{%" not in card
    assert (kernel / "build" / "CARD.md").read_text() == card
    assert (kernel / "LICENSE").read_text() == (HERE.parents[1] / "LICENSE").read_text()

"""The shape of the code that a reader relies on, checked on the source: sizes, arguments, loops without kinds."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("graphmoe_tables", "graphmoe_kernels", "graphmoe_model", "graphmoe_cli"),
    *("benchmarks", "experiments", "integrations", "tests"),
)
FILE_LINES, KERNEL_LINES = 320, 90  # about 300 and about 80
OPERATOR_ARGUMENTS, KERNEL_ARGUMENTS = 8, 22
OPERATORS = ("expert_swiglu", "swiglu", "route_tokens", "topk_softmax_routing", "gru_step", "rethink")
# Types and words by which the loops would tell kinds of experts apart.
KINDS = {"ChosenExperts", "SingleExpert", "MixedExperts", "isinstance", "magnitudes", "scales", "linear_routers"}


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def kernels() -> dict[str, ast.FunctionDef]:
    """What is launched: the jitted functions in a ``triton`` folder that are called as their operator's kernels are."""
    found = [f for path in (ROOT / "graphmoe_kernels").rglob("triton/*.py") for f in functions(path)]
    prefixes = ("experts_", "swiglu_", "routing_", "gru_")
    jitted = (f for f in found if any("triton.jit" in ast.unparse(own) for own in f.decorator_list))
    return {f.name: f for f in jitted if f.name.startswith(prefixes)}


def arguments(function: ast.FunctionDef) -> int:
    return sum(map(len, (function.args.posonlyargs, function.args.args, function.args.kwonlyargs)))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_is_read_in_one_go(package):
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / package).rglob("*.py")}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > FILE_LINES} == {}


def test_a_kernel_is_seen_at_once_and_takes_its_tensors_in_groups():
    found = kernels()
    assert len(found) >= 14
    lines = {name: f.end_lineno - f.lineno + 1 for name, f in found.items()}
    assert {name: size for name, size in lines.items() if size > KERNEL_LINES} == {}
    assert {name: arguments(f) for name, f in found.items() if arguments(f) > KERNEL_ARGUMENTS} == {}


def test_operators_take_few_arguments():
    paths = [*(ROOT / "graphmoe_kernels").rglob("api.py"), ROOT / "graphmoe_kernels" / "rethinking" / "__init__.py"]
    found = {f.name: arguments(f) for path in paths for f in functions(path) if f.name in OPERATORS}
    assert set(found) == set(OPERATORS)
    assert max(found.values()) <= OPERATOR_ARGUMENTS


@pytest.mark.parametrize("loop", ["literal", "folded"])
def test_the_loops_do_not_know_the_kind_of_experts(loop):
    """They say what a round does; what experts are, their types say."""
    tree = ast.parse((ROOT / "graphmoe_kernels" / "rethinking" / f"{loop}.py").read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert names & KINDS == set()

"""The compile inspector finds what it is there for, and the operators' kernels pass it.

It runs in a process of its own: this one may interpret kernels, and then it can compile none.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from graphmoe_kernels.aot import __main__ as command_line
from graphmoe_kernels.aot import listing
from graphmoe_kernels.aot.case import specialization
from graphmoe_kernels.aot.catalogue import MODULES, cases
from graphmoe_kernels.aot.cycles import pass_cycles
from graphmoe_kernels.aot.limits import faults, resident_blocks
from graphmoe_kernels.aot.listing import Loop
from graphmoe_kernels.aot.reading import Reading
from graphmoe_kernels.launching import DEVICE_CLASSES, config_table

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
MADE_FOR_THIS = "tests.kernels.aot_kernels"


def run_inspector(*arguments):
    """`python -m graphmoe_kernels.aot`, in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "graphmoe_kernels.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made_for_this(tmp_path_factory):
    """The inspector's run over this test's own kernels on sm_90, and the readings by their names."""
    path = tmp_path_factory.mktemp("aot") / "readings.json"
    result = run_inspector("--cases", MADE_FOR_THIS, "--target", "sm_90", "--json", str(path))
    assert path.exists(), result.stderr
    return result, {reading["name"]: reading for reading in json.loads(path.read_text())}


def test_faults_are_named_and_fail_the_run(made_for_this):
    result, readings = made_for_this
    assert result.returncode == 1
    assert "7 cases, 5 with faults" in result.stdout
    for name, fault in {
        "matmul faulty: no hgmma": "a matrix kernel without HGMMA instructions",
        "too_many_live_values faulty: spill": "spills",
        "matmul faulty: shared": "bytes of shared memory; the limit is 232448",
        "does_not_compile faulty: size": "does not compile",
        "crash faulty: crash": "the compiler crashed",
    }.items():
        assert len(readings[name]["faults"]) == 1
        assert fault in readings[name]["faults"][0]
        assert f"{name} for sm_90: " in result.stdout


def test_clean_kernels_have_no_fault(made_for_this):
    _, readings = made_for_this
    matmul = readings["matmul clean"]
    assert readings["copy clean"]["faults"] == matmul["faults"] == []
    assert matmul["hgmma"] > 0
    assert matmul["registers"] > 32
    assert matmul["shared_bytes"] > 0
    assert matmul["spill_bytes"] == matmul["local_loads"] == matmul["local_stores"] == 0


def read_with_spills(outside: int, run: int, main: int) -> Reading:
    """A kernel of a loop in a loop, with so many instructions of spills in neither, in the outer and in the inner."""
    loops = [Loop(0, 2, 90, 90, 3, outside, 0, 300, ()), Loop(1, 1, 40, 40, 2, run, 0, 90, ())]
    loops.append(Loop(2, 0, 500, 500, 9, main, 0, 900, ()))
    spilled = outside + run + main
    return Reading("k", "sm_90", "", "", "", spill_bytes=4 * spilled, local_loads=spilled, loops=tuple(loops))


def test_a_spill_is_a_fault_where_every_pass_pays_it():
    """Not outside the innermost loops; of a kernel without loops anywhere."""
    case = SimpleNamespace(name="k", matrix=False)
    assert faults(case, read_with_spills(outside=6, run=3, main=0)) == []
    assert "spills 8 bytes, 2 of 2 LDL" in faults(case, read_with_spills(outside=0, run=0, main=2))[0]
    assert faults(case, read_with_spills(0, 0, 2)._replace(target="sm_100")) == []
    straight = read_with_spills(2, 0, 0)
    assert "spills 8 bytes" in faults(case, straight._replace(loops=straight.loops[:1]))[0]


def test_readings_of_other_targets(tmp_path):
    """Each target's matrix instructions are counted in its own column, and a clean run succeeds."""
    path, targets = tmp_path / "readings.json", {"sm_80": "hmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    arguments = [word for target in targets for word in ("--target", target)]
    result = run_inspector("--cases", MADE_FOR_THIS, "--kernel", "matmul clean", *arguments, "--json", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    for reading in json.loads(path.read_text()):
        counts = {name: reading[name] for name in ("hgmma", "hmma", "tcgen05", "mfma")}
        assert [name for name, count in counts.items() if count] == [targets[reading["target"]]]


def test_blocks_of_a_multiprocessor():
    """What runs out first: registers, shared memory, warps, or places for blocks."""
    assert resident_blocks("sm_90", registers=255, shared_bytes=0, num_warps=4) == 2
    assert resident_blocks("sm_90", registers=64, shared_bytes=100 * 1024, num_warps=4) == 2
    assert resident_blocks("sm_80", registers=64, shared_bytes=100 * 1024, num_warps=4) == 1
    assert resident_blocks("sm_90", registers=16, shared_bytes=0, num_warps=8) == 8
    assert resident_blocks("sm_90", registers=16, shared_bytes=0, num_warps=1) == 32


@pytest.mark.parametrize(
    "interpreted, arguments, message",
    [
        (True, [], "TRITON_INTERPRET is set"),
        (False, ["--cases", MADE_FOR_THIS, "--kernel", "no such"], "no case's name contains 'no such'"),
    ],
)
def test_a_run_that_would_compile_nothing_is_refused(interpreted, arguments, message, monkeypatch, capsys):
    """A run that compiled nothing must not look like a success."""
    monkeypatch.setattr(command_line, "interpreting", lambda: interpreted)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_one_kernel_of_each_operator():
    """The operators' cases are found, with the shipped configurations, and compile."""
    names = [cases((module,), "sm_90")[0].name for module in MODULES]
    result = run_inspector("--target", "sm_90", *(word for name in names for word in ("--kernel", name)))
    assert result.returncode == 0, result.stdout + result.stderr


def test_cases_are_what_a_layer_launches():
    """The catalogue comes from the operators' own host code: no kernel of theirs, and no configuration, is left out."""
    for target in DEVICE_CLASSES:
        found = cases(MODULES[1:], target)  # which take a moment, where those of layers take many
        for operator in ("routing", "gru", "experts"):
            for name, sizes in config_table(target, operator).items():
                kernel = name.removesuffix("_wide_rank").removesuffix("_unaligned")
                own = [case.launch for case in found if case.launch.name == kernel]
                for by_dtype in sizes.values():
                    for config in by_dtype.values():
                        assert any(has(launch, config, operator) for launch in own), (target, name, config)


def has(launch, config, operator):
    """Whether a launch runs a configuration. Routing bounds its blocks by n; two experts' kernels share a BLOCK_M."""
    given = launch.constants | launch.options
    bounded = ("BLOCK_M", "BLOCK_D", "num_warps") if operator == "routing" else ()
    return all(given[name] == value for name, value in config.items() if name not in bounded)


def test_a_case_is_specialised_as_its_launch_is():
    """What a layer passes decides: None is compiled without, what is divisible by 16 with that knowledge, a batch's
    size is left free.
    """
    found = {case.name: dict(specialization(case.launch)[1:]) for case in cases(MODULES[2:3], "sm_90")}
    folded = found["gru_forward wide bf16 folded, later round, training"]
    literal = found["gru_forward wide bf16 literal, later round, training"]
    assert folded["width"] == folded["stride_weight"] == (False, True)
    assert literal["width"] == literal["stride_weight"] == (False, False)
    assert folded["state"] == (torch.bfloat16, True)
    first = found["gru_forward wide bf16 folded, first round, training"]
    assert first["state"] is first["total"] is first["candidate"] is None


PRESENT = """
import json
from graphmoe_kernels.aot.case import configuration, fingerprint
from graphmoe_kernels.aot.catalogue import MODULES, cases

print(json.dumps({
    target: sorted([case.name, configuration(case), fingerprint(case.launch)] for case in cases(MODULES, target))
    for target in ("sm_90", "sm_80")
}))
"""


def test_committed_readings_are_of_the_present_kernels():
    """Predictions are made from them: readings of other cases or configurations would be of other kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-c", PRESENT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    for target, present in json.loads(printed.stdout).items():
        path = f"benchmarks/aot_{target}.json"
        readings = json.loads((ROOT / path).read_text())
        read = sorted([each["name"], each["configuration"], each["fingerprint"]] for each in readings)
        assert read == present, (
            f"{path} is of other kernels; make it again: python -m graphmoe_kernels.aot --target {target} --json {path}"
        )


LAYER = """
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from graphmoe_kernels.aot.case import fingerprint
from graphmoe_kernels.aot.catalogue import MODULES, cases
from graphmoe_kernels.aot.trace import traced
from graphmoe_kernels.launching import Launch
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

known = {fingerprint(case.launch) for case in cases(MODULES, "sm_90")}
mlp = LlamaMLP(LlamaConfig(hidden_size=4096, intermediate_size=64, num_attention_heads=1)).bfloat16()
with traced("sm_90") as steps:  # on the CPU: the layer refuses weights without data
    layer = FusedGraphMoEFFN(mlp, GraphMoEConfig(r=16, rounds=3, lora_dropout=0.0, backend="triton", fold="always"))
    for tokens in (64, 512):
        layer.train()(torch.zeros(1, tokens, 4096, dtype=torch.bfloat16)).sum().backward()
launches = [step for step in steps if isinstance(step, Launch)]
assert len(launches) > 40, len(launches)
print([launch.name for launch in launches if fingerprint(launch) not in known])
"""


def test_the_catalogue_has_what_the_layer_of_a_model_launches():
    """`FusedGraphMoEFFN` itself, forward and backward: strides, alignment, absent operands and all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run([sys.executable, "-c", LAYER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip() == "[]"


# A loop of two loads that are waited for one after the other, and one whose copy is waited for a pass later. In the
# upper half of an encoding: a cycle each, scoreboard 0 of the loads' results, and who waits for it.
ISSUED, PLAIN, WAITING = (
    f"{bits << 41:016x}" for bits in (1 | 7 << 8, 1 | 7 << 5 | 7 << 8, 1 | 7 << 5 | 7 << 8 | 1 << 11)
)


def sass(*lines):
    """A listing of (label or instruction, upper half)."""
    found = []
    for number, (text, upper) in enumerate(lines):
        if upper is None:
            found.append(f".L_x_{text}:")
        else:
            found += [f"        /*{16 * number:04x}*/  {text} ; /* 0x0000000000000000 */", f"   /* 0x{upper} */"]
    return "\n".join(found)


def test_waits_are_read_from_a_listing():
    chain = sass(
        ("0", None), ("LDG.E R2, R4", ISSUED), ("IADD3 R4, R2", WAITING), ("LDG.E R6, R4", ISSUED),
        ("FADD R8, R6", WAITING), ("@P0 BRA `(.L_x_0)", PLAIN), ("EXIT", PLAIN),
    )  # fmt: skip
    loop = listing.main_loop(listing.loops(*listing.parse(chain)))
    assert (loop.loads, loop.between, loop.instructions) == (2, 1, 5)
    assert pass_cycles(loop, 500) == loop.cycles + 2 * 499  # an instruction's cycle passes meanwhile
    ahead = sass(
        ("0", None), ("DEPBAR.LE SB0, 0x0", PLAIN), ("FADD R8, R6", PLAIN), ("LDGSTS [R2], [R4]", PLAIN),
        ("LDGSTS [R2], [R6]", PLAIN), ("LDGDEPBAR", PLAIN), *[("FADD R8, R6", PLAIN)] * 90,
        ("@P0 BRA `(.L_x_0)", PLAIN), ("EXIT", PLAIN),
    )  # fmt: skip
    loop = listing.main_loop(listing.loops(*listing.parse(ahead)))
    assert (loop.loads, loop.between, loop.cycles) == (2, 0, 96)
    assert pass_cycles(loop, 50) == 96  # the copies of a pass arrive during the rest of it
    assert pass_cycles(loop, 500) == 500 + 3  # from the last copy to the wait, and from there to the last copy


@pytest.mark.slow
def test_every_kernel_on_every_target():
    """What `make aot` does."""
    result = run_inspector()
    assert result.returncode == 0, result.stdout + result.stderr

"""What must work where nothing but the wheel and its dependencies is installed; run by `make dist`, not by pytest.

python -P tests/installed/check.py README.md dist/graphmoe-VERSION.tar.gz
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOWNLOADED = "HuggingFaceTB/SmolLM2-135M"
# What the source distribution has beside the packages: written by people, and by the build.
WRITTEN = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml"}
BUILT = {"PKG-INFO", "setup.cfg", "graphmoe.egg-info"}


def main(readme: Path, archive: Path) -> None:
    """Run the command, the operators alone, package data, and README's fine-tuning on a small model made here; look
    what the source distribution has."""
    with tarfile.open(archive) as files:
        tops = {Path(name).parts[1] for name in files.getnames() if "/" in name}
    packages = {path.parent.name for path in readme.resolve().parent.glob("graphmoe_*/__init__.py")}
    assert tops == WRITTEN | BUILT | packages, f"{archive}: {sorted(tops ^ (WRITTEN | BUILT | packages))}"
    blocks = BLOCK.findall(readme.read_text(encoding="utf-8"))
    repository = str(readme.resolve().parent)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shown = run("graphmoe", "--version")
        assert shown == f"graphmoe {metadata.version('graphmoe')}", shown
        assert "Usage" in run("graphmoe", "--help")
        assert "graphmoe-mixlora" in run("graphmoe", "params", "--model", "tiny", "--preset", "graphmoe-mixlora")
        loaded = json.loads(run(sys.executable, "-P", "-c", OPERATORS_ALONE))
        assert loaded == [], f"import graphmoe_kernels loads {loaded}"
        import graphmoe_kernels
        from graphmoe_model.demo.base import make_base, make_tokenizer

        assert not graphmoe_kernels.__file__.startswith(f"{repository}/graphmoe"), "this is the repository, no wheel"
        configurations = list((Path(graphmoe_kernels.__file__).parent / "configs").rglob("*.json"))
        assert configurations, "the kernels' configurations are missing from the wheel"
        tokenizer = make_tokenizer(seed=0)
        make_base(tokenizer).save_pretrained("base")
        tokenizer.save_pretrained("base")
        names: dict[str, object] = {"__name__": "__main__"}
        for block in blocks:
            exec(compile(block.replace(DOWNLOADED, "base"), "README.md", "exec"), names)
        assert Path("my-adapter/adapter_model.safetensors").is_file()
    print(f"graphmoe {metadata.version('graphmoe')}: installed and used, {len(configurations)} configurations in it")


# Without Triton and without a GPU the operators are imported, and none of their users is.
OPERATORS_ALONE = """
import json, sys
sys.modules["triton"] = None
import graphmoe_kernels
print(json.dumps([n for n in ("transformers", "peft", "graphmoe_model") if n in sys.modules]))
"""


def run(*command: str) -> str:
    """Return what a command prints; its end with another status than 0 is an error with all that it said."""
    if command[0] == "graphmoe":
        command = (str(Path(sys.executable).parent / "graphmoe"), *command[1:])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

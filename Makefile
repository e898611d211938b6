# Everything a developer runs. `make help` lists the targets; ARGS goes to what is run: make test ARGS="-k routing -x".

PYTHON ?= python3
ARGS   ?=
TRITON ?=

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.graphmoe-installed

.DEFAULT_GOAL := help
.PHONY: env demo study test test-all test-distributed test-integrations test-newest test-oldest aot bench report gpu-report tune docs notebook dist check clean help

env: $(STAMP)  ## build .venv, or bring it up to date (instant when nothing changed)

# The stamp is newer than both files exactly when the environment holds what they ask for.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

$(PY) .venv-distributed/bin/python .venv-newest/bin/python .venv-oldest/bin/python .venv-docs/bin/python .venv-notebook/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11 or newer, or name one: make env PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: $$($(PYTHON) --version) is too old: GraphMoE needs Python 3.11 or newer. Name one: make env PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); \
	    echo "make: $(PYTHON) -m venv failed. On Debian and Ubuntu the module is in a package of its own: apt install python3-venv" >&2; exit 1; }

demo: env  ## train and compare on a made-up task on the CPU, in 4 to 10 minutes; writes demo_report/ (ARGS=--no-comparison: half of it)
	$(PY) -m graphmoe_model.demo $(ARGS)

study: env  ## the study of docs/study.md, where it stopped: hours (ARGS="--part depth --budget 1h", "--dry-run", "report")
	$(PY) -m experiments.study $(ARGS)

# On as many cores as there are, up to four; a file's tests stay together, as they share what is costly to make.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: env  ## the tests, without the long sweeps
	$(PY) -m pytest tests $(PARALLEL) $(ARGS)

test-all: env  ## the tests with the long sweeps
	$(PY) -m pytest tests $(PARALLEL) -m "not distributed and not quant" $(ARGS)

# Two processes a test, each on one core, so tests run one after the other. What only they need lies in an environment of
# its own, which sees the packages of .venv: those are neither installed twice nor loaded by the other tests.
OVERLAY := .venv-distributed

test-distributed: $(OVERLAY)/.graphmoe-installed  ## two processes, DeepSpeed and quantised bases, on a CPU, in under 20 minutes
	$(OVERLAY)/bin/python -m pytest tests -m "distributed or quant" $(ARGS)

# DS_BUILD_OPS=0: DeepSpeed's own kernels are neither compiled nor needed.
$(OVERLAY)/.graphmoe-installed: $(STAMP) | $(OVERLAY)/bin/python
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(OVERLAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	DS_BUILD_OPS=0 $(OVERLAY)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,distributed,quant]' \
	    -c constraints.txt
	@touch $@

# The real packages beside .venv's, each in a folder of its own before .venv's on the path, as their requirements exclude
# each other's. The imports come first: where one fails, the tests of the real package would only be skipped.
INTEGRATIONS := $(CURDIR)/.venv-integrations

test-integrations: $(patsubst %,$(INTEGRATIONS)/%/.installed,axolotl kernels_hub vllm)  ## with the real Axolotl, kernels, vLLM and TensorBoard, on a CPU (a download of 900 MB)
	PYTHONPATH=$(INTEGRATIONS)/axolotl $(PY) -c "import axolotl.loaders.adapter, axolotl.core.builders"
	PYTHONPATH=$(INTEGRATIONS)/axolotl $(PY) -m pytest tests/integrations tests/model/test_training_tensorboard.py -k "axolotl or tensorboard" \
	    -m "slow or not slow" $(ARGS)
	PYTHONPATH=$(INTEGRATIONS)/kernels_hub $(PY) -c "import kernels.cli"
	PYTHONPATH=$(INTEGRATIONS)/kernels_hub $(PY) -m pytest tests/integrations -k kernels_hub $(ARGS)
	PYTHONPATH=$(INTEGRATIONS)/vllm VLLM_TARGET_DEVICE=cpu $(PY) -c "import vllm.model_executor.models.llama"
	PYTHONPATH=$(INTEGRATIONS)/vllm $(PY) -m pytest tests/integrations -k vllm $(ARGS)

$(INTEGRATIONS)/%/.installed: integrations/%/requirements-tests.txt | env
	rm -rf $(@D)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(@D) -r $<
	@touch $@

# Both ends of what pyproject.toml allows, each in an environment of its own: .venv stays as it is. HOLD names what keeps the
# version of constraints.txt at the newest end: another torch is gigabytes of CUDA libraries. HOLD= lets everything move.
HOLD ?= torch triton

test-newest: .venv-newest/bin/python  ## the tests with the newest that pyproject.toml allows (HOLD=: the newest torch and triton too)
	@for name in $(HOLD); do grep "^$$name==" constraints.txt || { \
	    echo "make: HOLD names $$name, which has no line in constraints.txt" >&2; exit 1; }; done > .venv-newest/held.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	    -e '.[dev]' -c .venv-newest/held.txt
	.venv-newest/bin/python -m pytest tests $(PARALLEL) $(ARGS)

test-oldest: .venv-oldest/bin/python  ## the tests with the oldest that it allows: constraints-oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints-oldest.txt
	.venv-oldest/bin/python -m pytest tests $(PARALLEL) $(ARGS)

# Another Triton lies in a folder of its own, before .venv's on the path: .venv stays as it is.
OTHER_TRITON := $(if $(TRITON),.venv-triton-$(TRITON))

aot: env $(OTHER_TRITON:%=%/.installed)  ## compile every kernel for every device class, without a GPU (TRITON=3.6.0: by that Triton)
	$(if $(TRITON),PYTHONPATH=$(OTHER_TRITON)) $(PY) -m graphmoe_kernels.aot $(ARGS)

.venv-triton-%/.installed: | env
	rm -rf $(@D)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

bench: env  ## the benchmarks on this machine, in 5 minutes on an idle 2-core CPU: latency of each round, against others
	$(PY) -m pytest benchmarks -q $(ARGS)

report: env  ## results as targets, a page and plots; ARGS="--compare A.json B.json": do two runs agree; "A.json --write PAGE.md"
	$(PY) -m benchmarks.report $(ARGS)

gpu-report: env  ## make bench on a GPU in 8.5 minutes, the most important first; writes benchmarks/results/
	$(PY) -m benchmarks.gpu_report $(ARGS)

tune: env  ## try configurations of the kernels on this GPU and write the fastest right ones to graphmoe_kernels/configs/
	$(PY) -m benchmarks.gpu_report --minutes 9 --groups tune $(ARGS)

# The site is made from sources and docstrings as text, so its environment has nothing of the project's.
docs: .venv-docs/.installed  ## the documentation as a site in site/, every link checked; without a network once installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS)

.venv-docs/.installed: docs/requirements.txt | .venv-docs/bin/python
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

# The wheel is built from the source distribution, so that both are whole; tried in an environment that has nothing else.
dist: env  ## build wheel and source distribution, install the wheel into an empty environment, and use it there
	rm -rf build dist .venv-dist
	$(PY) -m build --quiet --outdir dist .
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[train]" -c constraints.txt
	.venv-dist/bin/python -P tests/installed/check.py README.md dist/*.tar.gz

# From the wheel, in an environment of its own that sees what else .venv has, and in a folder that is not this one.
notebook: .venv-notebook/.installed  ## run the notebook from a wheel, outside of the repository (ARGS=docs/notebooks/first-steps.ipynb: keep its outputs)
	rm -rf build dist && $(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	.venv-notebook/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	.venv-notebook/bin/python -P docs/notebooks/run.py docs/notebooks/first-steps.ipynb $(ARGS)

.venv-notebook/.installed: docs/notebooks/requirements.txt $(STAMP) | .venv-notebook/bin/python
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$(.venv-notebook/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	.venv-notebook/bin/python -m pip install --quiet --disable-pip-version-check -r docs/notebooks/requirements.txt -c constraints.txt
	@touch $@

check: env  ## lint, format, types, import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

clean:  ## remove build products, caches and the environment's stamp (not the environments .venv*, not demo_report/)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(STAMP)
	find . -path './$(VENV)*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Environments are built from pinned sets, and rebuilt when those change; the native library when its source does.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
FRAMEWORKS := .venv-frameworks
NEXT := .venv-next
WHEEL := .venv-wheel
RUN := $(VENV)/bin/python
NATIVE := setup.py $(wildcard gptoss_opt/kernels/native/c/*)
# Two processes; one that has nothing left takes tests from the other.
PYTEST := pytest -n 2 --dist worksteal
# What touches transformers, accelerate, peft or trl. Kernels, layouts, plans and exchanges between ranks know none of
# them: they are the same computations on the oldest and the newest, and run on the newest alone. So do stacks whose
# wrappers have other names ("against the alphabet"), which tell nothing of transformers, and tracing each wrapper
# for torch.compile, which takes long. CI on GitHub runs all of it.
TESTS_OF_OLDEST := tests/wrappers tests/serve tests/train tests/finetune tests/monitoring tests/verification \
	$(addprefix tests/stacks/test_,new_parameters.py state.py refusals.py) \
	$(addprefix tests/unit/test_,checkpoint.py load.py memory_map.py package.py) \
	$(addprefix tests/distributed/test_,trainer.py lora_training.py serving.py foreign.py) \
	-k "not alphabet and not test_compiles"
TORCH = $(shell sed -n 's/^torch==//p' requirements/dev.txt)
TESTS_OF_WHEELS := tests/installed tests/kernels/test_mxfp4.py tests/wrappers/test_oracle.py
# Tiny models run many times faster on one thread each than on threads that wait for each other.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test check lint types docs docs-serve test-oldest test-newest test-next test-frameworks wheel try-wheel \
	bench clean

demo: $(VENV)/.built
	$(RUN) -m gptoss_opt demo

test: $(VENV)/.built
	$(TEST) $(RUN) -m $(PYTEST)

check: lint types test

lint: $(VENV)/.built
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.built
	$(RUN) -m mypy

# Strict and offline, as in `make test`: a dead link is an error, and nothing is fetched.
docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs --quiet build --strict

docs-serve: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

# All of it: make test-oldest TESTS_OF_OLDEST=tests
test-oldest: $(OLDEST)/.built
	$(TEST) $(OLDEST)/bin/python -m $(PYTEST) $(TESTS_OF_OLDEST)

# By hand: torch's newest build comes with CUDA, 5.5 GB of it.
test-newest: $(NEWEST)/.built
	$(TEST) $(NEWEST)/bin/python -m $(PYTEST)

# By hand, before a new release of anything is supported: on whatever is the newest now, but for torch, which is pinned.
test-next:
	$(PYTHON) -m venv --clear $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --upgrade --editable ".[dev,train]" peft trl "torch==$(TORCH)"
	$(NEXT)/bin/python -m pip freeze
	$(TEST) $(NEXT)/bin/python -m $(PYTEST)

# Builds the source distribution, from it the wheel for this machine, checks both, and tries the wheel.
wheel: $(WHEEL)/.ready
	rm -rf build dist
	$(WHEEL)/bin/python -m build --outdir build/raw
ifeq ($(shell uname),Linux)
	PATH="$(CURDIR)/$(WHEEL)/bin:$$PATH" auditwheel repair --wheel-dir dist build/raw/*.whl
else
	mkdir dist && cp build/raw/*.whl dist
endif
	cp build/raw/*.tar.gz dist
	$(WHEEL)/bin/python scripts/check_dist.py dist
	$(MAKE) try-wheel

# Installs it as a user would, without a compiler, and tests it away from the tree: make try-wheel PYTHON=python3.13.
try-wheel:
	rm -rf build/tried && mkdir -p build/tried && cp -R tests pyproject.toml build/tried
	$(PYTHON) -m venv build/tried/venv
	CC=false build/tried/venv/bin/python -m pip install --quiet --only-binary :all: \
		--constraint requirements/dev.txt dist/*.whl pytest
	cd build/tried && $(TEST) venv/bin/python -m pytest $(TESTS_OF_WHEELS)

# With packages of others that are too heavy for every machine: DeepSpeed, Ray, Lightning, the lm-evaluation-harness.
test-frameworks: $(FRAMEWORKS)/.built
	PATH="$(CURDIR)/$(FRAMEWORKS)/bin:$$PATH" $(TEST) $(FRAMEWORKS)/bin/python -m pytest tests/evaluation tests/frameworks

bench: $(VENV)/.built
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(NEXT) $(FRAMEWORKS) $(WHEEL) build dist site

$(VENV)/.ready: requirements/dev.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/dev.txt
	touch $@

$(OLDEST)/.ready: requirements/oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --requirement requirements/oldest.txt
	touch $@

$(WHEEL)/.ready: requirements/wheel.txt
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --requirement requirements/wheel.txt
	touch $@

$(NEWEST)/.ready: requirements/dev.txt requirements/newest.txt
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --requirement requirements/dev.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --requirement requirements/newest.txt
	touch $@

# DeepSpeed is built from source, and asks the torch of the environment how.
$(FRAMEWORKS)/.ready: requirements/dev.txt requirements/frameworks.txt
	$(PYTHON) -m venv --clear $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet setuptools wheel --requirement requirements/dev.txt
	DS_BUILD_OPS=0 $(FRAMEWORKS)/bin/python -m pip install --quiet --no-deps --no-build-isolation \
		--requirement requirements/frameworks.txt
	touch $@

%/.built: %/.ready pyproject.toml $(NATIVE)
	$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

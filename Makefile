# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Environments are built from pinned sets, and rebuilt when those change; the native library when its source does.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
FRAMEWORKS := .venv-frameworks
RUN := $(VENV)/bin/python
NATIVE := setup.py $(wildcard gptoss_opt/kernels/native/c/*)
# Tiny models run many times faster on one thread each than on threads that wait for each other.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test check lint types test-oldest test-newest test-frameworks bench clean

demo: $(VENV)/.built
	$(RUN) -m gptoss_opt demo

test: $(VENV)/.built
	$(TEST) $(RUN) -m pytest -n 2

check: lint types test

lint: $(VENV)/.built
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.built
	$(RUN) -m mypy

test-oldest: $(OLDEST)/.built
	$(TEST) $(OLDEST)/bin/python -m pytest -n 2

# By hand: torch's newest build comes with CUDA, 5.5 GB of it.
test-newest: $(NEWEST)/.built
	$(TEST) $(NEWEST)/bin/python -m pytest -n 2

# DeepSpeed, Ray, Lightning and other packages that are too heavy for every machine.
test-frameworks: $(FRAMEWORKS)/.built
	PATH="$(CURDIR)/$(FRAMEWORKS)/bin:$$PATH" $(TEST) $(FRAMEWORKS)/bin/python -m pytest $(wildcard tests/frameworks tests/evaluation)

bench: $(VENV)/.built
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(FRAMEWORKS)

$(VENV)/.ready: requirements/dev.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/dev.txt
	touch $@

$(OLDEST)/.ready: requirements/oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --requirement requirements/oldest.txt
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
	DS_BUILD_OPS=0 $(FRAMEWORKS)/bin/python -m pip install --quiet --no-build-isolation --requirement requirements/frameworks.txt
	touch $@

%/.built: %/.ready pyproject.toml $(NATIVE)
	$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

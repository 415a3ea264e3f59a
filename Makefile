# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Environments are built from pinned sets, and rebuilt when those change.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
# Tiny models run many times faster on one thread each than on threads that wait for each other.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test check lint types test-oldest bench clean

demo: $(VENV)/.ready
	$(RUN) -m gptoss_opt demo

test: $(VENV)/.ready
	$(TEST) $(RUN) -m pytest -n 2

check: lint types test

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.ready
	$(RUN) -m mypy

test-oldest: $(OLDEST)/.ready
	$(TEST) $(OLDEST)/bin/python -m pytest -n 2

bench: $(VENV)/.ready
	$(RUN) -m benchmarks.attention

clean:
	rm -rf $(VENV) $(OLDEST)

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/dev.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(OLDEST)/.ready: requirements/oldest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --requirement requirements/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Everything runs in .venv, which is made once and remade when pyproject.toml changes.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test test-fast test-all lint clean

.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@echo "Installing torch, lightning, hydra ... into .venv (once; several GB, a few minutes)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/.ready ## the whole pipeline on the embedded digits, then the report
	$(RUN) slim.py experiment=demo

lint: .venv/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Two workers, each with one torch thread (tests/conftest.py); one that is done takes tests from the other.
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal

test: lint ## lint and the suite, with a seeded sample of the sets below
	$(PYTEST) -m 'not complete'

test-fast: lint ## without the tests marked slow
	$(PYTEST) -m 'not slow and not complete'

test-all: test ## the complete sets of faults too, and results/reliability.md from what they gave
	$(RUN) benchmarks/reliability.py

clean:
	rm -rf .venv runs

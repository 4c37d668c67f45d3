.PHONY: demo test docs bench style quality clean
.DEFAULT_GOAL := test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready

# Everything below starts from a machine with nothing but Python 3.11 or newer. torch is installed first and pinned, so that
# pip does not draw the CUDA packages of a newer release through another package's dependencies.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest

# The tables of docs/benchmarks are committed; `python docs/make_benchmarks.py` makes them again from new rows.
docs: $(DOCS_READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(READY)
	$(BIN)/python examples/benchmarks/structure_mnist.py --net bn
	$(BIN)/python examples/benchmarks/structure_mnist.py --net lenet
	$(BIN)/python examples/benchmarks/structure_mnist.py --net lenet --recipe paper
	$(BIN)/python examples/benchmarks/structure_mnist.py --table
	$(BIN)/python examples/benchmarks/structure_cifar10.py --width 16 --classes 2 --rows 2000 --epochs 6 --tune 3 --seeds 1 \
		--set batch=32 lasso=0.004
	$(BIN)/python examples/benchmarks/tickets_mnist.py --net lenet
	$(BIN)/python examples/benchmarks/tickets_mnist.py --net wide
	$(BIN)/python examples/benchmarks/growth_mnist.py
	$(BIN)/python examples/benchmarks/optimizer_step.py
	$(BIN)/python examples/benchmarks/train_overhead.py
	$(BIN)/python examples/benchmarks/slim_latency.py
	$(BIN)/python examples/benchmarks/selection_digits.py
	$(BIN)/python examples/benchmarks/selection_digits.py --few --cells digits-200 large tail mnist mnist-tail
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python examples/benchmarks/selection_banking77.py
	$(BIN)/python examples/benchmarks/sampling_scale.py
	$(BIN)/python examples/benchmarks/vicl_pets.py
	$(BIN)/python examples/benchmarks/vicl_digits.py
	$(BIN)/python examples/benchmarks/pool_scale.py
	$(BIN)/python examples/benchmarks/selection_speed.py

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/reference/generated

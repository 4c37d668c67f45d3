.PHONY: demo test test-all test-lowest test-package test-browser docs bench style quality clean
.DEFAULT_GOAL := test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
SPACE := .venv-space
SPACE_READY := $(SPACE)/.ready

# Tests start many processes; each would compile the package and rewrite the tests' assertions again.
export PYTHONDONTWRITEBYTECODE :=

# Everything below starts from a machine with nothing but Python 3.11 or newer. torch is installed first and pinned, so that
# pip does not draw the CUDA packages of a newer release through another package's dependencies.
$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV), about 2 GB: some minutes, and silent meanwhile"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# A folder of its own, since Gradio refuses the Pillow that everything else is tested with.
$(SPACE_READY): pyproject.toml constraints.txt
	@echo "installing into $(SPACE), about 2 GB: some minutes, and silent meanwhile"
	test -x $(SPACE)/bin/python || $(PYTHON) -m venv $(SPACE)
	grep -v '^pillow==' constraints.txt > $(SPACE)/constraints.txt
	$(SPACE)/bin/python -m pip install -q --disable-pip-version-check -c $(SPACE)/constraints.txt torch
	$(SPACE)/bin/python -m pip install -q --disable-pip-version-check -c $(SPACE)/constraints.txt -e ".[browser]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/quickstart.py

# One file a worker at a time, as its tests share what they have made; what measures time comes last, alone.
test: $(READY)
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m "not slow and not alone"
	$(BIN)/python -m pytest $$(grep -l "mark.alone" tests/test_*.py) -m "alone and not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest tests -m alone

LOWEST := .venv-lowest

# The quick tests on the lower bounds of pyproject.toml; torch from an index comes with CUDA, about 6 GB.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check $$($(PYTHON) .github/versions.py lowest) -e ".[test]"
	$(LOWEST)/bin/python -m pip check
	$(LOWEST)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m "not slow and not alone"

# Builds the wheel and the source distribution, and tries both in an empty environment that is lent the dependencies.
test-package: $(READY)
	$(BIN)/python -m pytest tests/test_distribution.py tests/test_installing.py tests/test_interface.py -m "slow or not slow"

# The page of examples/space in a headless browser: the system's chromium, or Debian's, installed where there is none.
test-browser: $(SPACE_READY)
	command -v chromium || command -v google-chrome || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }
	$(SPACE)/bin/python -m pytest tests/test_space.py -m "browser or not slow"

# The tables of docs/benchmarks are committed; `python docs/make_benchmarks.py` makes them again from new rows.
docs: $(DOCS_READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

BENCHMARK := $(BIN)/python examples/benchmarks

# Hours; rows that are in runs/benchmarks/ already are not made again.
bench: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BENCHMARK)/structure_mnist.py --net bn
	$(BENCHMARK)/structure_mnist.py --net lenet
	$(BENCHMARK)/structure_mnist.py --net lenet --recipe paper
	$(BENCHMARK)/structure_mnist.py --net bn14 --first 6 --budgets 0.25 0.1
	$(BENCHMARK)/structure_mnist.py --table
	$(BENCHMARK)/recipe_mnist.py
	$(BENCHMARK)/recipe_cifar10.py
	$(BENCHMARK)/structure_cifar10.py --width 16 --classes 2 --rows 2000 --epochs 6 --tune 3 --seeds 1 \
		--set batch=32 lasso=0.004
	$(BENCHMARK)/tickets_mnist.py --net lenet
	$(BENCHMARK)/tickets_mnist.py --net wide
	for task in digits MNIST "MNIST, LeNet" CIFAR-10; do $(BENCHMARK)/tickets_settling.py --task "$$task" || exit 1; done
	$(BENCHMARK)/growth_mnist.py
	$(BENCHMARK)/optimizer_step.py
	$(BENCHMARK)/train_overhead.py
	$(BENCHMARK)/slim_latency.py
	$(BENCHMARK)/pretrained_minilm.py
	$(BENCHMARK)/lora_ranks_banking77.py
	$(BENCHMARK)/pretrained_resnet20.py
	$(BENCHMARK)/selection_digits.py
	$(BENCHMARK)/selection_digits.py --few --cells digits-200 large tail mnist mnist-tail
	$(BENCHMARK)/selection_banking77.py
	$(BENCHMARK)/sampling_scale.py
	$(BENCHMARK)/vicl_pets.py
	$(BENCHMARK)/vicl_digits.py
	$(BENCHMARK)/pool_scale.py
	$(BENCHMARK)/selection_speed.py
	$(BENCHMARK)/scaling.py
	$(BENCHMARK)/whole.py

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(LOWEST) $(SPACE) build dist *.egg-info docs/_build docs/notebooks docs/reference/generated

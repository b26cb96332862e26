# Every target works from a fresh clone: it makes its own virtual environment when there is none.
#   make test                      the fast test suite
#   make test PYTHON=python3.12    with another interpreter (needed only once, when .venv is made)
#   make test ARGS="-k skip -x"    with more pytest arguments
#   make test WORKERS=8            with more processes; WORKERS=0 in one, which `--pdb` needs
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRA ?= dev
PIP_OPTIONS ?=
ARGS ?=
WORKERS ?= 2
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PYTEST = $(BIN)/python -m pytest
# Each process takes a run of neighbouring tests, which share their fixtures, and then work from the slower one.
PARALLEL = -n $(WORKERS) --dist worksteal

.PHONY: help demo app smoke test test-newest test-oldest test-slow test-distributed test-faults test-hostile test-first-hour test-start-up test-browser check docs format size wheel ci clean

help:
	@echo "make demo              train Skip Tuning on the bundled models and data; results in outputs/demo"
	@echo "make app               the bundled adapters in the browser: your images, classes and templates"
	@echo "make smoke             a first look at every method (under a minute)"
	@echo "make test              fast tests (about 6 minutes on 2 cores)"
	@echo "make test-newest       fast tests with the newest versions that pyproject.toml allows; test-oldest: the oldest"
	@echo "make docs              the documentation site in build/site; warnings and dead links are errors"
	@echo "make check             lint, format, types, docstrings, spelling"
	@echo "make ci                check, wheel, then all tests that are not slow and need no GPU"
	@echo "make wheel             build the wheel and try it outside the repository"
	@echo "make test-slow         the slow tests; test-distributed, test-faults, -hostile, -first-hour, -start-up: parts"
	@echo "make test-browser      app and site in a real browser; it needs Chromium (apt-get install chromium)"
	@echo "make format            apply the formatter and the safe lint fixes"
	@echo "make size              files, code lines and public names of the package; never fails"
	@echo "make clean             remove .venv*, caches and build results (outputs/ is kept)"

demo: $(STAMP)
	@echo "Training and comparing on 2 cores takes about 7 minutes; results go to outputs/demo"
	@$(BIN)/python examples/train_skip_tuning.py --preset demo $(ARGS)

app: $(STAMP)
	@$(BIN)/peft-vlm app model_cards/skip-tuning-emoji model_cards/* --test examples/assets/emoji \
		--models examples/assets/mllm_idefics3 examples/assets/mllm_paligemma --question "what colour is it?" \
		--examples docs/images/lamplight/*.png $(ARGS)

smoke: $(STAMP)
	@$(PYTEST) -m smoke $(ARGS)

# What starts many processes, each of which imports torch and transformers, is left to its own targets and to `make ci`.
test: $(STAMP)
	@$(PYTEST) $(PARALLEL) $(addprefix --ignore=tests/,distributed faults test_start_up.py hub/test_first_hour.py) $(ARGS)

# Both ends of the ranges in pyproject.toml, each in an environment of its own. The newest torch brings several GB of CUDA
# packages, so torch stays as constraints.txt has it: `make test-newest TORCH=2.14.1` takes another one.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

test-newest:
	@mkdir -p build && echo "torch==$(TORCH)" > build/newest.txt
	@$(MAKE) --no-print-directory test VENV=.venv-newest CONSTRAINTS=build/newest.txt EXTRA=test PIP_OPTIONS="--upgrade --upgrade-strategy eager"

test-oldest:
	@mkdir -p build && $(PYTHON) tests/oldest_versions.py > build/oldest.txt
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=build/oldest.txt EXTRA=test

test-slow: $(STAMP)
	@echo "The slow tests take many minutes"
	@$(PYTEST) -m "slow and not gpu" --timeout=3600 $(ARGS)

test-distributed: $(STAMP)
	@$(PYTEST) tests/distributed $(ARGS)

test-faults: $(STAMP)
	@$(PYTEST) tests/faults $(ARGS)

test-hostile: $(STAMP)
	@echo "All attacks and all mutations of files: about 7 minutes"
	@$(PYTEST) -m "not gpu" tests/hostile --timeout=1800 $(ARGS)

test-start-up: $(STAMP)
	@$(PYTEST) tests/test_start_up.py $(ARGS)

test-first-hour: $(STAMP)
	@$(PYTEST) -m "not gpu" tests/hub/test_first_hour.py $(ARGS)

test-browser: $(STAMP)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		echo "No Chromium was found. Install it: apt-get install chromium"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[browser]"
	@$(PYTEST) -m browser tests/app tests/test_site.py $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "pyright: about a minute" && PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/flake8 peft_vlm
	@$(BIN)/typos

docs: $(STAMP)
	@echo "Building the documentation site: half a minute"
	@$(BIN)/python docs/site/build.py

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

size: $(STAMP)
	@$(BIN)/python -m tests.size

wheel: $(STAMP)
	@echo "Building the wheel and trying it outside the repository: about a minute"
	@$(BIN)/python -m tests.wheel_check

# One pytest run for the fast, distributed and fault tests, and last, so that its summary closes the output.
ci: check docs wheel
	@$(PYTEST) $(PARALLEL) $(ARGS)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("peft_vlm needs Python 3.11 or newer, got " + sys.version.split()[0] + ": call `make PYTHON=/path/to/python3.11 ...`")'
	@echo "Installing into $(VENV) (about 2 GB on disk): 1 to 5 minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c $(CONSTRAINTS) -e ".[$(EXTRA)]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

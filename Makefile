# `make run` and `make test` are all that a newcomer needs; each sets up .venv when it is missing.
.DEFAULT_GOAL := help
.PHONY: help run test test-machines test-peers setup lab sync bench policy lint lock clean

# Values from the command line are handed on through the environment as they were typed: make expands nothing in them,
# and the shell sees them as quoted variables, never as text of a command.
PROFILE ?= quick
SYSTEM_PYTHON ?= python3
GIVEN := CHAPTER PROFILE MODEL PROBLEMS DEVICE ONLY ROUNDS SYSTEM_PYTHON
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
# Where `make -C` was called: relative paths are meant from there.
CALLER := $(value PWD)
export CALLER $(GIVEN)
CHECK_PYTHON = "$$SYSTEM_PYTHON" -c 'import sys; sys.exit("deltah needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set SYSTEM_PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# Benchmarks and the tests of peers run beside other libraries, which stay out of the environment that all else uses.
BENCH_VENV := .venv-bench
BENCH_PYTHON := $(BENCH_VENV)/bin/python
BENCH_READY := $(BENCH_VENV)/.ready
# Bars are for people: in a notebook's outputs they would only differ from run to run. Threads that wait must sleep: two
# processes that spin on the same cores slow each other down tenfold.
QUIET := TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 OMP_WAIT_POLICY=PASSIVE
# Two workers share the cores, as in `make run`; a number of threads that the caller sets wins.
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 1) // 2))')}
# A notebook is one kernel's: its cells stay together and in order. Notebooks come first, as they take longest.
PYTEST := $(PYTHON) -m pytest --nbval --numprocesses 2 --dist loadfile --no-loadscope-reorder

help:
	@echo "make run      execute every chapter into results/PROFILE/; CHAPTER=01 PROFILE=full MODEL=... PROBLEMS=... DEVICE=cuda"
	@echo "make test     unit tests, and every notebook's stored outputs"
	@echo "make test-machines  the tests that print numbers, as on other processors (an hour)"
	@echo "make test-peers  losses against those of TRL and verl, in an environment of its own"
	@echo "make setup    only set up .venv"
	@echo "make lab      open the chapters in JupyterLab"
	@echo "make sync     pair scripts and notebooks; store the outputs of those that changed, or of CHAPTER=01"
	@echo "make bench    times and memory side by side with other libraries, into results/bench/; ONLY=kernel MODEL=... DEVICE=cuda"
	@echo "make policy   generate the problems again and train the shipped policy again"
	@echo "make lint     ruff over everything"
	@echo "make lock     refresh constraints.txt"
	@echo "make clean    remove what was built: .venv, .venv-bench, results, caches"

run: $(READY)
	@$(QUIET) $(PYTHON) notebooks/run.py run --profile="$$PROFILE" $${CHAPTER:+--chapter="$$CHAPTER"} \
		--set $${MODEL:+model="$$MODEL"} $${PROBLEMS:+problems="$$PROBLEMS"} $${DEVICE:+device="$$DEVICE"}

test: $(READY)
	$(QUIET) $(THREADS) $(PYTEST) --doctest-modules

test-machines: $(READY)
	@$(QUIET) $(THREADS) $(PYTHON) tests/machines.py $(PYTEST)

# No conftest.py but that folder's: the others' need what this environment does not have.
test-peers: $(BENCH_READY)
	$(QUIET) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BENCH_PYTHON) -m pytest --confcutdir=tests/peers tests/peers

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "Setting up $(VENV) with the versions of constraints.txt; this takes a few minutes, once."
	@"$$SYSTEM_PYTHON" -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --constraint constraints.txt setuptools
	@$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[notebooks,dev]"
	@touch $(READY)
	@echo "$(VENV) is ready."

lab: $(READY)
	$(PYTHON) -m jupyter lab notebooks

sync: $(READY)
	@$(QUIET) $(PYTHON) notebooks/run.py sync $${CHAPTER:+--chapter="$$CHAPTER"}

# A terminal shows how far it is: `make bench` takes a quarter of an hour.
bench: $(BENCH_READY)
	@set -f; $(filter-out TQDM_DISABLE=1,$(QUIET)) $(BENCH_PYTHON) benchmarks/compare.py $${ONLY:+--only $$ONLY} \
		$${MODEL:+--model="$$MODEL"} $${DEVICE:+--device="$$DEVICE"} $${ROUNDS:+--rounds="$$ROUNDS"}

# --no-deps: the list is complete, and some of its packages ask for a torchvision that they use in examples only, or for
# an older torch or transformers than they run with.
$(BENCH_READY): pyproject.toml constraints.txt benchmarks/requirements.txt
	@$(CHECK_PYTHON)
	@echo "Setting up $(BENCH_VENV), with what deltah is measured and tested against; this takes a few minutes, once."
	@"$$SYSTEM_PYTHON" -m venv $(BENCH_VENV)
	@$(BENCH_PYTHON) -m pip install --quiet --constraint constraints.txt setuptools
	@$(BENCH_PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@$(BENCH_PYTHON) -m pip install --quiet --constraint constraints.txt --no-deps --requirement benchmarks/requirements.txt
	@touch $(BENCH_READY)
	@echo "$(BENCH_VENV) is ready."

policy: $(READY)
	$(PYTHON) data/make_problems.py
	$(PYTHON) data/train_policy.py
	$(PYTHON) data/measure_policy.py

lint: $(READY)
	$(PYTHON) -m ruff check .

# Torch is held: a newer one breaks others. "+cpu" and its like name a build, not a version.
lock:
	@rm -rf .venv-lock
	@"$$SYSTEM_PYTHON" -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet setuptools "$$(grep '^torch==' constraints.txt)"
	@.venv-lock/bin/python -m pip install --quiet --no-build-isolation --editable ".[notebooks,dev]"
	@.venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+[a-z0-9.]*$$//' > constraints.txt.partial
	@mv constraints.txt.partial constraints.txt
	@rm -rf .venv-lock

clean:
	rm -rf $(VENV) $(BENCH_VENV) results .pytest_cache .ruff_cache .hypothesis lib/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

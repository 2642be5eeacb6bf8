# Needs Python 3.11 or newer and make; `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-bench test-floor soak check format clean

# Tests run in as many processes as there are cores, each of which takes 1 to 2 GB: make test WORKERS=1 for a debugger.
# Of the slow ones a file stays together; those that measure time run alone.
WORKERS ?= auto
PARALLEL = -n $(WORKERS) --maxprocesses 8
FAST = $(PARALLEL) --dist worksteal -m "not slow and not soak and not gpu and not bench"
SLOW = $(PARALLEL) --dist loadfile --no-loadscope-reorder -m "slow and not soak and not bench"

# The first candidate that is at least Python 3.11 and can make environments; else the first that is at least 3.11.
find = $(shell for p in $(1); do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
	$$p -c 'import ensurepip' && { echo $$p; exit; }; first=$${first:-$$p}; done 2>/dev/null; echo $$first)
PYTHON ?= $(call find,python3.13 python3.12 python3.11 python3)
FLOOR_PYTHON ?= $(call find,python3.11 python3.12)

verify = $(if $(and $(1),$(shell $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo ok)),,\
	$(error no Python that fits was found: 3.11 or newer (PYTHON=...), for the floor 3.11 or 3.12 (FLOOR_PYTHON=...)))\
	$(if $(shell $(1) -c 'import ensurepip' 2>/dev/null && echo ok),,$(error first `apt install $(shell $(1) -c \
	'import sys; print("python%d.%d-venv" % sys.version_info[:2])')`: $(1) cannot make environments (no ensurepip)))

# $(call install,PYTHON,ENVIRONMENT,REQUIREMENTS): the stamp $@ is written last. An environment without one was
# interrupted and is made anew; one whose stamp is older than its requirements is updated in place, by its own Python.
define install
	$(call verify,$(1))
	@echo "Installing $(3) into $(2) with $(1) (several GB with CUDA on Linux: minutes)"
	@if test -e $@ && $(2)/bin/python -c 'import ssl'; then rm $@; else rm -f $@; $(1) -m venv --clear $(2); fi
	$(2)/bin/python -m pip install --disable-pip-version-check -r $(3)
	$(2)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: .venv/stamp ## the whole method on small data: make demo ARGS="--help"
	.venv/bin/mae demo $(ARGS)

test: .venv/stamp ## the fast tests: make test ARGS="-k NAME -x"
	.venv/bin/python -m pytest $(FAST) $(ARGS)

test-slow: .venv/stamp ## the slow tests: several processes, kills, Slurm, notebooks
	.venv/bin/python -m pytest $(SLOW) $(ARGS)

test-bench: .venv/stamp ## the tests of mae bench, one after the other
	.venv/bin/python -m pytest -m "bench and not soak and not gpu" $(ARGS)

soak: .venv/stamp ## the longest tests; 25 kills, 20 signals to a Slurm job: the same bits; an hour of damaged files
	.venv/bin/python -m pytest -m soak
	.venv/bin/python tests/soak/kill_soak.py --kills 25 $(ARGS)
	.venv/bin/python tests/soak/slurm_soak.py --signals 20
	.venv/bin/python tests/soak/fuzz.py --minutes 60

test-floor: .venv-floor/stamp ## the fast tests with the lowest supported versions
	.venv-floor/bin/python -m pytest $(FAST) $(ARGS)

check: .venv/stamp ## formatting, lint, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/stamp ## format the code and fix what the linter can
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

clean: ## remove environments, build files and caches (not runs/)
	rm -rf .venv .venv-floor build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

.venv/stamp: requirements.lock pyproject.toml
	$(call install,$(PYTHON),.venv,requirements.lock)

.venv-floor/stamp: requirements-floor.txt pyproject.toml
	$(call install,$(FLOOR_PYTHON),.venv-floor,requirements-floor.txt)

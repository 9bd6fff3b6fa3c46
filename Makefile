# `make demo` trains on digits and draws samples; `make test` checks the code, with ALL=1 also whole
# benchmarks and long notebooks; `make mutants` checks the tests. All make .venv first. `make tpu`
# and `make gpu` compile for TPUs and GPUs, which no machine needs to have.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-lowest test-newest tpu gpu mutants clean

demo: $(VENV)/installed
	$(RUN) -m launch.demo --workdir=runs/demo

test: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder $(if $(ALL),,-m "not slow")

mutants: $(VENV)/installed
	$(RUN) tests/mutants.py

# The oldest and the newest versions that setup.py allows, in environments of their own; outcomes go
# to benchmarks/results/environments.json. The newest JAX needs a newer Python than the oldest.
test-lowest:
	MCLR_JAX_ENVIRONMENT=lowest $(MAKE) test VENV=.venv-lowest PIP_CONSTRAINT=requirements-lowest.txt

NEWEST ?= python3.13
test-newest:
	MCLR_JAX_ENVIRONMENT=newest $(MAKE) test VENV=.venv-newest PYTHON=$(NEWEST)

# Compilers of 137 and 600 MB, which look for their chips when JAX is imported: each gets an
# environment of its own.
tpu gpu:
	$(MAKE) .venv-$@/installed VENV=.venv-$@
	.venv-$@/bin/python -m pip install -q -e '.[$@-compile]'
	.venv-$@/bin/python -m pytest -q tests/test_plan.py

$(VENV)/installed: setup.py
	$(PYTHON) -c "import sys; sys.exit('mclr_jax needs Python >= 3.11, not ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --no-compile -e '.[test]' $(if $(PIP_CONSTRAINT),-c $(PIP_CONSTRAINT))
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-tpu .venv-gpu runs

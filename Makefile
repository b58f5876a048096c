# `make demo` and `make test` need nothing but Python 3.11 or later and pip: both set .venv up first.
PYTHON ?= python3.11
BIN := .venv/bin
DATA ?=
MODEL ?=
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONDONTWRITEBYTECODE :=  # where it is set, every process would compile every file anew

# Three at a time on two processors: two of them run the tests that start NVFlare, and wait for it half of their time.
PYTEST := $(BIN)/python -m pytest -q
AT_ONCE := -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-answers models test tests test-all test-oldest test-gpu faults fuzz docs templates lint format clean

demo: .venv/installed  ## a federated fine-tune over four simulated sites; DATA=folder runs it on your own files
	$(BIN)/python -m nvflare_fm.demo $(if $(DATA),--data "$(DATA)")

demo-answers: $(if $(MODEL),.venv/installed,models)  ## four NIH institutes teach a small language model to answer; MODEL=folder takes another model
	$(BIN)/python -m nvflare_fm.demo.answers $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)")

test: .venv/installed  ## all that must hold; minutes
	$(MAKE) --no-print-directory --jobs 2 lint tests

tests: .venv/installed
	$(PYTEST) $(AT_ONCE)

test-all: lint  ## and the slow proofs: planted bugs, every method of the comparison, tutorials, faults; hours
	HYPOTHESIS_PROFILE=thorough $(PYTEST) $(AT_ONCE) -m "slow or not slow"

test-oldest: .venv-oldest/installed  ## as make test, with the oldest versions, in an environment of its own
	.venv-oldest/bin/python -m pytest -q $(AT_ONCE)

models: .venv/installed  ## a small public language model, SmolLM2-135M-Instruct, into runs/models
	$(BIN)/nvflare-fm models get smollm2-135m-instruct

test-gpu: .venv/installed  ## what only a GPU can show; tiny models without one
	$(PYTEST) -m "slow or not slow" tests/gpu

faults: .venv/installed  ## processes of a running system killed at random moments, FAULTS_SEEDS of each; 15 minutes
	$(PYTEST) -m slow tests/deployment/test_kill_matrix.py

fuzz: .venv/installed  ## the fuzz targets, each with FUZZ_EXAMPLES cases (100,000 unless set); hours
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) -n 2 --timeout 0 tests/fuzz

templates: .venv/installed  ## job_templates/NAME from each NAME.toml, and docs/reference, from the fields of the settings
	$(BIN)/python -m nvflare_fm.flare.jobs.render_template
	$(BIN)/python docs/reference/write.py

docs: .venv/docs  ## the documentation as a site, in runs/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet -f .mkdocs.yml

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis runs dist

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[site,demo,dev]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[site,demo,dev]"
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

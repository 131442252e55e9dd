# make demo | test | test-slow | lint | bench | docs. The first use creates .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles a module when it is first imported; compiling all of them takes a third of an installation.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-slow lint bench docs clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Requires Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) -e '.[docs]'
	touch $@

# The sampler that docs/sampling.md recommends from 8 evaluations on: 10 instead of EDM's 35, at an equal distance.
demo: $(VENV)/installed
	$(RUN) main.py --mode=train --config=configs/digits.py --workdir=workdirs/demo \
		--config.sampler.name=ipndm --config.sampler.order=3 --config.sampler.to_zero=False \
		--config.sampler.num_steps=10
	$(RUN) main.py --mode=sample --workdir=workdirs/demo --seeds=0-99 --class_id=all --out=workdirs/demo/grid.png
	@echo "Samples, one row per class: workdirs/demo/grid.png"
	@echo "Metrics: workdirs/demo/metrics.jsonl    TensorBoard: pip install tensorboard; tensorboard --logdir=workdirs/demo"
	@echo "Checkpoints: workdirs/demo/checkpoints  Grids during training: workdirs/demo/samples"

test: $(VENV)/installed-test
	$(RUN) -m pytest -q -n auto --dist loadfile -m "not slow" tests

test-slow: $(VENV)/installed-test
	$(RUN) -m pytest -q -m slow tests

lint: $(VENV)/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/installed
	$(RUN) -m benchmarks.network
	$(RUN) -m benchmarks.augment

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "Pages: site/index.html"

clean:
	rm -rf $(VENV) workdirs site

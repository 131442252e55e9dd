# make demo | test | test-slow | lint | bench. The first use of each creates .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint bench clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(RUN) main.py --mode=train --config=configs/digits.py --workdir=workdirs/demo
	$(RUN) main.py --mode=sample --workdir=workdirs/demo --seeds=0-99 --class_id=all --out=workdirs/demo/grid.png
	@echo "Samples, one row per class: workdirs/demo/grid.png"
	@echo "Metrics: workdirs/demo/metrics.jsonl    TensorBoard: tensorboard --logdir=workdirs/demo"
	@echo "Checkpoints: workdirs/demo/checkpoints  Grids during training: workdirs/demo/samples"

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q -n auto --dist loadfile -m "not slow" tests

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -q -m slow tests

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .

bench: $(VENV)/installed
	$(RUN) -m benchmarks.network
	$(RUN) -m benchmarks.augment

clean:
	rm -rf $(VENV) workdirs

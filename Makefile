# Everything happens in .venv, which is made on first use. torch comes first and by the constraints, so that the
# packages after it find it installed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo demo-mutual test style quality clean

demo: .venv/examples
	rm -rf demo
	$(LAUNCH) examples/run_iekd.py --output_dir demo

demo-mutual: .venv/examples
	rm -rf demo-mutual
	$(LAUNCH) examples/run_mutual.py --output_dir demo-mutual

test: .venv/test
	$(BIN)/python -m pytest

style: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/examples: .venv/torch setup.cfg
	$(PIP) -e ".[examples]"
	touch $@

.venv/test: .venv/torch setup.cfg
	$(PIP) -e ".[test,quality]"
	touch $@ .venv/examples

clean:
	rm -rf .venv demo demo-mutual build *.egg-info

# Everything happens in .venv, which is made on first use. torch comes first and by the constraints, so that the
# packages after it find it installed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
COMPARE := $(BIN)/python examples/benchmarks/compare_methods.py --evaluate_on test --seeds 0 1 2
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

# Images for the second half of `make evidence`: any arguments of run_iekd.py that say where they are.
CIFAR10 ?= --dataset_name uoft-cs/cifar10

.PHONY: demo demo-mutual demo-detection evidence test docs style quality clean

demo: .venv/examples
	rm -rf demo
	$(LAUNCH) examples/run_iekd.py --output_dir demo

demo-mutual: .venv/examples
	rm -rf demo-mutual
	$(LAUNCH) examples/run_mutual.py --output_dir demo-mutual

demo-detection: .venv/examples
	rm -rf demo-detection
	$(LAUNCH) examples/run_iekd_detection.py --output_dir demo-detection

evidence: .venv/examples
	$(COMPARE) --output_dir evidence/digits --networks cifar-resnet-20:cifar-resnet-8 --held_out 300 \
		--student_samples 300 --teacher_epochs 20 --paraphraser_epochs 20 --epochs 40 --batch_size 32
	$(COMPARE) --output_dir evidence/cifar10 --networks cifar-resnet-20:cifar-resnet-8 --held_out 2000 \
		--max_train_samples 12000 --student_samples 2000 --teacher_epochs 15 --paraphraser_epochs 15 --epochs 30 \
		$(CIFAR10)

test: .venv/test
	$(BIN)/python -m pytest

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

.venv/docs: .venv/torch setup.cfg
	$(PIP) -e ".[docs]"
	touch $@

clean:
	rm -rf .venv demo demo-mutual demo-detection evidence build site *.egg-info

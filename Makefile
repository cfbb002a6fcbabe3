# Everything happens in .venv, which is made on first use. torch comes first and by the constraints, so that the
# packages after it find it installed. The targets for other versions make a .venv-... of their own.
PYTHON ?= python3
PYTHON_MINIMUM ?= python3.11
BIN := .venv/bin
# Errors are shown, warnings are not.
PIP_WITH := bin/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check -c
PIP := .venv/$(PIP_WITH) constraints.txt
COMPARE := $(BIN)/python examples/benchmarks/compare_methods.py --evaluate_on test --seeds 0 1 2
# Of what a command says in one line, accelerate would show the traceback of its own.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

# What `make demo-mutual` adds to its command: peers, what they learn from each other, and ten evaluations.
PEERS := --peers cifar-resnet-14 cifar-resnet-8 --mutual_loss ie+kl --per_device_train_batch_size 32 \
	--eval_strategy steps --eval_steps 0.1 --logging_strategy steps --logging_steps 0.1 \
	--save_strategy steps --save_steps 0.5

# Tests run in this many processes of one thread each.
WORKERS ?= 2
PYTEST := python -m pytest --numprocesses $(WORKERS) --dist worksteal

# What `make test-torchvision` tests with, beside timm.
TORCHVISION ?= torch==2.14.1 torchvision==0.29.1

# Images for the second half of `make evidence`: any arguments of run_iekd.py that say where they are.
CIFAR10 ?= --dataset_name uoft-cs/cifar10

.PHONY: help demo demo-mutual demo-detection demo-segmentation evidence test test-fast test-minimum test-torchvision docs style quality clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/examples  ## distil a CIFAR ResNet-8 on handwritten digits, offline
	rm -rf demo
	$(LAUNCH) examples/run_iekd.py --output_dir demo

demo-mutual: .venv/examples  ## let two networks teach each other on 100 of the digits
	rm -rf demo-mutual
	$(LAUNCH) examples/run_mutual.py --output_dir demo-mutual $(PEERS)

demo-detection: .venv/examples  ## distil a small detector on drawn shapes
	rm -rf demo-detection
	$(LAUNCH) examples/run_iekd_detection.py --output_dir demo-detection

demo-segmentation: .venv/examples  ## distil a small segmenter on drawn shapes
	rm -rf demo-segmentation
	$(LAUNCH) examples/run_iekd_segmentation.py --output_dir demo-segmentation

evidence: .venv/examples  ## compare the methods on digits and on CIFAR-10, three seeds each (an hour or two)
	$(COMPARE) --output_dir evidence/digits --networks cifar-resnet-20:cifar-resnet-8 --held_out 300 \
		--train_val_split 0.15 --student_samples 300 --teacher_epochs 20 --paraphraser_epochs 20 --epochs 40 --batch_size 32
	$(COMPARE) --output_dir evidence/cifar10 --networks cifar-resnet-20:cifar-resnet-8 --held_out 2000 \
		--max_train_samples 12000 --student_samples 2000 --teacher_epochs 15 --paraphraser_epochs 15 --epochs 30 \
		$(CIFAR10)

# Tests start many processes, each of which imports torch and transformers: in a third of the time from bytecode.
unexport PYTHONDONTWRITEBYTECODE

test test-fast test-minimum test-torchvision: export OMP_NUM_THREADS = 1
test test-fast test-minimum test-torchvision: export MKL_NUM_THREADS = 1

test: .venv/test  ## run all tests
	$(BIN)/$(PYTEST)

test-fast: .venv/test  ## run the tests that are not marked slow
	$(BIN)/$(PYTEST) -m "not slow"

test-minimum: .venv-minimum/test  ## run the fast tests with the lowest versions that setup.cfg allows
	.venv-minimum/bin/$(PYTEST) -m "not slow"

test-torchvision: .venv-torchvision/test  ## run the fast tests, and torchvision's and timm's, with the newest of each
	.venv-torchvision/bin/python -c "import timm, torchvision"
	.venv-torchvision/bin/$(PYTEST) -m "not slow"

docs: .venv/docs  ## build the documents as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: .venv/test  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/test  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/torch: constraints.txt
	@echo "Installing into .venv (once, about a minute and a download of torch) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@touch $@

.venv/examples: .venv/torch setup.cfg
	@$(PIP) -e ".[cli]"
	@touch $@

.venv/test: .venv/torch setup.cfg
	$(PIP) -e ".[test,quality]"
	touch $@ .venv/examples

.venv/docs: .venv/torch setup.cfg
	$(PIP) -e ".[docs]"
	touch $@

.venv-minimum/test: constraints-minimum.txt setup.cfg
	$(PYTHON_MINIMUM) -m venv .venv-minimum
	.venv-minimum/$(PIP_WITH) constraints-minimum.txt -e ".[test]"
	touch $@

.venv-torchvision/test: constraints.txt setup.cfg
	$(PYTHON) -m venv .venv-torchvision
	grep -v '^torch==' constraints.txt > .venv-torchvision/constraints.txt
	.venv-torchvision/$(PIP_WITH) .venv-torchvision/constraints.txt $(TORCHVISION)
	.venv-torchvision/$(PIP_WITH) .venv-torchvision/constraints.txt timm -e ".[test]"
	touch $@

clean:  ## remove the environments and what the targets made
	rm -rf .venv .venv-minimum .venv-torchvision demo demo-mutual demo-detection demo-segmentation evidence build site *.egg-info

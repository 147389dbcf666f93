# The two commands: make quickstart, make test. Each sets itself up first.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
EXTRAS ?= dev,deepspeed,onnx,transformers,detection,parquet,decoders,examples

# what FFCV is built with (Debian's names)
FFCV_DEBIAN := g++ pkg-config libturbojpeg0-dev libopencv-dev

# what opens the pages in tests (Debian's names)
BROWSER_DEBIAN := chromium chromium-driver

.PHONY: help setup ffcv browser pictures quickstart test test-slow test-lowest lint clean

help:
	@echo "make quickstart   train, prune, finetune and report a small network on 2 processes"
	@echo "make test         lint, types and the default tests"
	@echo "make test-slow    whole pipelines, worlds of 4 to 16, SLURM, pages in a browser, and what needs an engine"
	@echo "make test-lowest  the quick part with the lowest versions that pyproject.toml allows (part of test-slow)"
	@echo "make setup        only the virtual environment"
	@echo "make pictures     the pictures of pages in docs/images, from small runs"
	@echo "make ffcv         FFCV's loaders, once more (make setup tries, and goes on without them)"

setup: $(READY)

# A Python that fits: 3.11 or 3.12, with venv. Debian's package is installed where that is allowed.
$(READY): pyproject.toml constraints.txt
	@set -e; \
	find_python() { for p in $(PYTHON) python3.11 python3.12 python3; do \
	  if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	  then echo $$p; return; fi; done; }; \
	py=$$(find_python); \
	if [ -z "$$py" ]; then echo "Python 3.11 or 3.12 is needed; name it with PYTHON=/path/to/python3.11"; exit 1; fi; \
	if [ ! -x $(PY) ]; then \
	  $$py -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	      apt-get update -qq && apt-get install -y -qq python3-venv; $$py -m venv $(VENV); \
	    else echo "python3-venv is missing: apt-get install python3-venv"; exit 1; fi; }; \
	fi; \
	echo "installing into $(VENV) (about 5 GB the first time)"; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"; \
	$(MAKE) --no-print-directory ffcv || echo "FFCV is left out; everything else works. Later: make ffcv"; \
	touch $(READY)

# FFCV has no wheels: it is built here, against Debian's libraries, which are installed where that is allowed.
ffcv:
	@set -e; \
	complete() { command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists libturbojpeg opencv4; }; \
	if ! complete; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(FFCV_DEBIAN); \
	  else echo "FFCV needs: sudo apt-get install -y $(FFCV_DEBIAN)"; exit 1; fi; \
	fi; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ffcv]"; \
	$(PY) -c "import ffcv"

# The browser of the marked tests, installed where that is allowed; without it they skip and say so.
browser:
	@if command -v chromedriver >/dev/null && command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER_DEBIAN); \
	else echo "the pages' tests need: sudo apt-get install -y $(BROWSER_DEBIAN)"; exit 1; fi

# The pictures of pages in the README, made from runs of their own.
pictures: $(READY) browser
	OMP_NUM_THREADS=1 $(PY) -m tests.support.pictures

# One process per GPU where there are GPUs, two CPU processes elsewhere.
quickstart: $(READY)
	@gpus=$$($(PY) -c 'import torch; print(torch.cuda.device_count())'); \
	case $$gpus in \
	  0) launch="--config_file launch/cpu_2.yaml"; export OMP_NUM_THREADS=1;; \
	  1) launch="--config_file launch/gpu_1.yaml";; \
	  *) launch="--config_file launch/gpu_8.yaml --num_processes $$gpus";; \
	esac; \
	$(VENV)/bin/accelerate launch $$launch dist_prune/run.py --recipe quickstart

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# Files are dealt over as many processes as there are cores, four at most; each has its own pool of ranks.
TEST_PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$(( n > 4 ? 4 : n )))

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile

# DeepSpeed compiles an operation at its first use on a CPU: here, not inside a test's patience. The tests of
# SLURM wait most of their time, so others run beside them.
test-slow: $(READY)
	$(PY) -m dist_prune.cli.main doctor --build-engine
	@$(MAKE) --no-print-directory browser || echo "no browser: the tests of the pages skip"
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "slow or slurm or deepspeed or browser"
	$(MAKE) --no-print-directory test-lowest

# Lowest versions in an environment of their own; torch, torchvision and the test tools are seen from the first one.
LOWEST := .venv-lowest
QUICK := tests/pruning/graph tests/pruning/hooks tests/pruning/surgery tests/methods tests/config/test_recipes.py tests/config/test_recipe_errors.py tests/config/test_hostile_recipes.py \
  tests/export/test_hostile_bundles.py tests/models/test_backbones.py tests/distributed/test_tensor_files.py

$(LOWEST)/.ready: constraints-lowest.txt $(READY)
	@rm -rf $(LOWEST); $(PY) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-lowest.txt
	@place='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(PY) -c "$$place" > "$$($(LOWEST)/bin/python -c "$$place")/tested.pth"
	@touch $@

test-lowest: $(LOWEST)/.ready
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(QUICK)

clean:
	rm -rf $(VENV) $(LOWEST) .pytest_cache .ruff_cache

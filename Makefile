# `make` lists the targets. Variables go on the command line: make train DATA=path/to/btcusd_1-min_data.csv

VENV ?= .venv
IS_NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
FOUND_PYTHON = $(shell for python in python3 python3.12 python3.13 python3.11; do \
  $$python -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
PYTHON ?= $(firstword $(FOUND_PYTHON) python3)

DATA ?= data/simulated.csv.gz
NAME := $(patsubst %.csv,%,$(patsubst %.zip,%,$(patsubst %.gz,%,$(notdir $(DATA)))))
SET ?= data/$(NAME)
RUN ?= runs/$(NAME)
CONFIG ?= examples/btc_forecast/default.yaml $(if $(HAS_GPU),,examples/btc_forecast/cpu.yaml)
ARGS ?=
PREPARE ?=
# Asked once, when it is needed first: by then torch is installed.
HAS_GPU = $(eval HAS_GPU := $(shell $(BIN)/python -c 'import torch; print("yes" * torch.cuda.is_available())' 2>/dev/null))$(HAS_GPU)

# Images: a host with a GPU of NVIDIA's gets the default variant, any other the CPU's.
VARIANT ?= $(if $(and $(filter x86_64,$(shell uname -m)),$(shell nvidia-smi -L 2>/dev/null)),cu128-py312,cpu-py312)
TAG = $(shell sed -n 's/.*name = "$(VARIANT)", tag = "\(.*\)".*/\1/p' docker/docker-bake.hcl)
WHEEL = $(if $(filter cu%,$(VARIANT)),wheels/$(TAG)/build-info.json)
BAKE = COMMIT=$$(git rev-parse HEAD 2>/dev/null) docker buildx bake -f docker/docker-bake.hcl
COMPOSE = FLASHLAB_VARIANT=$(VARIANT) FLASHLAB_TAG=$(TAG) FLASHLAB_UID=$${FLASHLAB_UID:-$$(id -u)} FLASHLAB_GID=$${FLASHLAB_GID:-$$(id -g)} \
  docker compose -f compose.yaml $(if $(filter cpu-%,$(VARIANT)),-f docker/compose.cpu.yaml)
SERVICE ?= train
SERVICES = $(shell sed -n '/^services:/,/^volumes:/s/^  \([a-z0-9]*\):$$/\1/p' compose.yaml)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FLASHLAB := $(BIN)/flashlab

ifneq ($(or $(word 2,$(DATA)),$(findstring :,$(DATA))),)
  $(error DATA=$(DATA): make cannot take a path with spaces or colons; rename the file or link to it)
endif
ifeq ($(filter data/simulated.csv.gz,$(DATA))$(wildcard $(DATA)),)
  $(error DATA=$(DATA): there is no such file; check the path, or download the public bars with `make $(INSTALLED) && $(FLASHLAB) data fetch`)
endif

.PHONY: help train gpt2 check bench test lint format doctor tensorboard data clean clean-all \
  wheel image dev-image up down attach known FORCE

help:
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'Variables: DATA=bars.csv RUN=folder CONFIG="files.yaml" ARGS="--option value" (of train, gpt2)'
	@echo '  PREPARE="--option value" (of data prepare) PYTHON=python3.12'
	@echo 'of images: VARIANT=cu128-py312, cu130-py312 or cpu-py312; SERVICE=check, bench, evaluate, tensorboard, test ...'

train: $(SET)/manifest.json ## set up, prepare, train, evaluate, report; DATA=bars.csv takes your bars; resumes a run
	$(if $(filter %/cpu.yaml,$(CONFIG)),@echo "Settings for a CPU (cpu.yaml) are added: make doctor says what this machine has and lacks.")
	$(FLASHLAB) train $(CONFIG:%=--config %) --data.path $(SET) --run $(RUN) --resume $(ARGS)
	$(FLASHLAB) evaluate $(RUN)
	$(FLASHLAB) report $(RUN)

gpt2: RUN = runs/gpt2
gpt2: CONFIG = examples/gpt2/embedded.yaml $(if $(HAS_GPU),,examples/gpt2/cpu.yaml)
gpt2: data/gpt2/manifest.json ## train a small GPT-2 on Python's own documentation and library, and print a sample; resumes
	$(if $(filter %/cpu.yaml,$(CONFIG)),@echo "Settings for a CPU (cpu.yaml) are added: make doctor says what this machine has and lacks.")
	$(FLASHLAB) gpt2 train $(CONFIG:%=--config %) --data.path data/gpt2 --run $(RUN) --resume $(ARGS)
	$(FLASHLAB) gpt2 sample $(RUN) --prompt "import " --temperature 0.7

check: $(INSTALLED) ## compare every attention backend that runs here with the reference
	$(FLASHLAB) check $(ARGS)

bench: $(INSTALLED) ## measure the attention backends and draw the report; resumes a sweep
	$(FLASHLAB) bench sweep --config examples/attention_bench/$(if $(HAS_GPU),h200,cpu).yaml --out runs/attention $(ARGS)
	$(FLASHLAB) report runs/attention

test: $(INSTALLED) ## run the tests that need no GPU, no Docker and little time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 -m "not slow and not docker and not gpu" $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## format the code, and fix what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

doctor: $(INSTALLED) ## say what this machine has, what will be used and what is wrong
	$(FLASHLAB) doctor

tensorboard: $(INSTALLED) ## watch the runs at http://127.0.0.1:6006
	$(BIN)/tensorboard --logdir runs --host 127.0.0.1 --port 6006

data: $(SET)/manifest.json ## write the embedded bars, or take DATA, and prepare them

wheel: known $(WHEEL) ## compile flash-attn for VARIANT, unless wheels/ has it
	@$(if $(WHEEL),echo "$(WHEEL:/build-info.json=) has it",echo "make: the CPU has no flash-attn: make wheel VARIANT=cu128-py312" >&2; exit 2)

image: known $(WHEEL) ## build the image of VARIANT; with Docker
	$(if $(WHEEL),WHEELS=wheels )$(BAKE) runtime-$(VARIANT)

dev-image: known $(WHEEL) ## build the image for developers, which the devcontainer takes
	$(if $(WHEEL),WHEELS=wheels )$(BAKE) dev-$(VARIANT)
	docker tag flashlab:$(TAG)-dev flashlab:dev

up: $(if $(filter dev test,$(SERVICE)),dev-image,image) ## build, and run the service SERVICE of compose.yaml on GPU or CPU
	$(COMPOSE) up $(if $(filter dev tensorboard,$(SERVICE)),--detach,--exit-code-from $(SERVICE)) $(SERVICE)

down: ## stop and remove what `make up` started; data and runs stay
	$(COMPOSE) --profile more down

attach: dev-image ## start the service dev and attach VS Code to it
	$(COMPOSE) up --detach dev
	docker/attach

clean: ## remove the environment and every cache; data and runs stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

clean-all: clean ## remove what is in data/, runs/ and wheels/ too
	find data runs -mindepth 1 ! -name .gitignore -delete
	rm -rf wheels

$(SET)/manifest.json: $(DATA) $(SET).source | $(INSTALLED)
	$(FLASHLAB) data prepare $< --out $(@D) $(PREPARE)

data/gpt2/manifest.json: | $(INSTALLED)
	$(FLASHLAB) gpt2 prepare --out $(@D)

# Memory decides how many compilers run at a time. Hours on a laptop; docs/images.md has a table.
$(WHEEL):
	jobs=$${MAX_JOBS:-$$(docker/max-jobs --docker)} && MAX_JOBS=$$jobs $(BAKE) wheel-$(VARIANT)

known:
	@$(if $(TAG),,echo "make: VARIANT=$(VARIANT): there are cu128-py312, cu130-py312 and cpu-py312" >&2; exit 2)
	@$(if $(filter $(SERVICE),$(SERVICES)),,echo "make: SERVICE=$(SERVICE): there are $(SERVICES)" >&2; exit 2)

# Two files of one name in two folders share a prepared set: another path prepares it anew.
$(SET).source: FORCE
	@mkdir -p $(@D) && echo '$(abspath $(DATA))' | cmp -s - $@ || echo '$(abspath $(DATA))' > $@

data/simulated.csv.gz: | $(INSTALLED)
	$(FLASHLAB) data simulate --out $@

# An install that was interrupted leaves .installing behind, and the next one starts afresh. torchvision comes with
# litdata, which needs it for images only; one built for another torch breaks the import of torchmetrics ("operator
# torchvision::nms does not exist"), and nothing here uses it.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c '$(IS_NEW_ENOUGH)' || { \
	  echo "make: Python 3.11 or newer is needed, and $(PYTHON) is not: name one, as in make PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON): a minute on a fast network, longer where torch comes with CUDA (3 GB)."
	@if test -e $(VENV)/.installing; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $@ && touch $(VENV)/.installing
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/pip uninstall -qq --yes torchvision
	@mv $(VENV)/.installing $@

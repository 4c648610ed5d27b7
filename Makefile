# One virtual environment for everything; each target works alone on a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-gpu lint clean

setup: $(VENV)/.installed-dev

# The demo needs less than development does.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "keye-jax needs Python 3.12 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[video]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m keye_jax.demo build/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

# The operations' tests, with the compiled kernels, on a Hopper GPU. PY names a Python with JAX for CUDA.
test-gpu: $(if $(PY),,$(VENV)/.installed-dev)
	$(or $(PY),$(BIN)/python) -m pytest tests/pallas_kernels tests/keye_jax/gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf $(VENV) build *.egg-info

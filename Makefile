# One virtual environment for everything; each target works alone on a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The JAX in it: the oldest that is supported. `make test-jax-next` takes the newest, in an environment of its own.
JAX := 0.11.2
JAX_NEXT := 0.12.*
# A process that dies fails its test. It is not replaced: pytest-xdist 3.8 may then wait for ever (its issue 1378).
# Files are taken in the order of tests/conftest.py, the long ones first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# The TPU compiler, for Linux on x86-64 only. It is kept out of the environment's packages: JAX would load it everywhere.
ifeq ($(shell uname -sm),Linux x86_64)
LIBTPU := $(VENV)/libtpu/.installed
endif
# JAX's plugin for CUDA and each ptxas that a user may have, for Linux. JAX would load the plugin everywhere, too.
ifeq ($(shell uname -s),Linux)
GPU_COMPILERS := $(VENV)/gpu_compilers/.installed
endif

.PHONY: setup demo train-demo test test-all test-jax-next test-gpu test-tpu test-tpu-compile test-gpu-compile lint clean

setup: $(VENV)/.installed-dev

# The demo needs less than development does.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "keye-jax needs Python 3.12 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[video]' 'jax==$(JAX)'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' 'jax==$(JAX)'
	@touch $@

$(VENV)/.installed-train: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train]' 'jax==$(JAX)'
	@touch $@

# The version that belongs to the installed JAX.
$(VENV)/libtpu/.installed: $(VENV)/.installed-dev
	$(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))' \
	| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/libtpu --requirement /dev/stdin
	@touch $@

# The plugin of the installed JAX, the oldest ptxas of its CUDA, and the one that `pip install 'jax[cuda13]'` brings.
$(VENV)/gpu_compilers/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D)/plugin \
	'jax-cuda13-plugin==$(JAX)' 'jax-cuda13-pjrt==$(JAX)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D)/ptxas-13.0 'nvidia-cuda-nvcc==13.0.*'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D)/ptxas-newest 'nvidia-cuda-nvcc==13.*'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m keye_jax.demo build/demo

# Trains a small model on generated clips; its losses fall.
train-demo: $(VENV)/.installed-train
	$(BIN)/keye-jax train --config shapes_cpu --output build/train-demo

# Without the tests that are marked slow.
test: $(VENV)/.installed-dev $(LIBTPU)
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.installed-dev $(LIBTPU) $(GPU_COMPILERS)
	$(PYTEST)

# The tests of `make test` with the newest JAX.
test-jax-next:
	$(MAKE) test VENV=.venv-next JAX='$(JAX_NEXT)'

# The operations' tests, with the compiled kernels, on a Hopper GPU. PY names a Python with JAX for CUDA.
test-gpu: $(if $(PY),,$(VENV)/.installed-dev)
	$(or $(PY),$(BIN)/python) -m pytest tests/pallas_kernels tests/keye_jax/gpu

# The same on a TPU. PY names a Python with JAX for TPUs.
test-tpu: $(if $(PY),,$(VENV)/.installed-dev)
	JAX_DEFAULT_MATMUL_PRECISION=highest $(or $(PY),$(BIN)/python) -m pytest tests/pallas_kernels

# Everything that is for a TPU, through the TPU compiler, without a TPU, and a table of what the compiler says.
test-tpu-compile: $(VENV)/.installed-dev $(LIBTPU)
	@mkdir -p build
	$(BIN)/python -m tests.tpu_compile --json build/tpu_compile.json

# Every Hopper kernel through the compiler for NVIDIA GPUs and each ptxas, without a GPU, with both versions of JAX.
test-gpu-compile: $(VENV)/.installed-dev $(GPU_COMPILERS)
	@mkdir -p build
	$(BIN)/python -m tests.gpu_compile --json build/gpu_compile_jax_$(subst *,x,$(JAX)).json
	@test '$(JAX)' = '$(JAX_NEXT)' || $(MAKE) test-gpu-compile VENV=.venv-next JAX='$(JAX_NEXT)'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-next build dist *.egg-info

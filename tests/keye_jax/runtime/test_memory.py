"""Estimates of a step's workspace, for the released model on one GPU."""

import itertools

import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.runtime.memory import prefill_workspace_bytes
from keye_jax.sharding import MeshRules

FLOAT8 = "float8_e4m3fn"
IMPLEMENTATIONS, CACHES = ("mosaic_gpu", "xla"), (None, FLOAT8)
CHUNKS, CONTEXTS = (1024, 2048, 4096, 8192), (2**12, 2**13, 2**14, 2**15, 2**16, 2**17, 2**18)


@pytest.fixture(scope="module")
def estimate():
    config, rules = KeyeConfig.from_file(presets.RELEASED), MeshRules.single_device()

    def gib(implementation, cache, chunk, context, **how):
        how |= {"implementation": implementation, "cache_dtype": cache}
        return prefill_workspace_bytes(config, rules, chunk, context, **how) / 2**30

    return gib


@pytest.mark.parametrize(
    ("implementation", "cache", "chunk", "context", "compiled"),
    [
        ("mosaic_gpu", None, 1024, 2**15, 0.141),
        ("mosaic_gpu", None, 8192, 2**15, 1.125),
        ("mosaic_gpu", None, 8192, 2**13, 0.407),
        ("mosaic_gpu", None, 8192, 2**14, 0.612),
        ("mosaic_gpu", None, 4096, 2**17, 1.071),
        ("mosaic_gpu", None, 1024, 2**18, 1.021),
        ("mosaic_gpu", None, 8192, 2**18, 1.118),
        ("mosaic_gpu", FLOAT8, 8192, 2**13, 0.421),
        ("mosaic_gpu", FLOAT8, 1024, 2**15, 0.141),
        ("mosaic_gpu", FLOAT8, 2048, 2**15, 0.291),
        ("mosaic_gpu", FLOAT8, 4096, 2**15, 0.589),
        ("mosaic_gpu", FLOAT8, 8192, 2**15, 1.171),
        ("mosaic_gpu", FLOAT8, 2048, 2**17, 1.041),
        ("mosaic_gpu", FLOAT8, 8192, 2**18, 1.125),
        ("xla", None, 512, 2**15, 0.448),
        ("xla", None, 1024, 2**15, 0.567),
        ("xla", FLOAT8, 2048, 2**17, 0.704),
        ("xla", FLOAT8, 4096, 2**12, 0.829),
        ("xla", FLOAT8, 8192, 2**15, 1.177),
        ("xla", FLOAT8, 8192, 2**18, 1.177),
    ],
)
def test_reading_takes_what_the_compiler_says(estimate, implementation, cache, chunk, context, compiled):
    """GiB by `python -m tests.gpu_compile.memory` for H100, JAX 0.11.2."""
    assert estimate(implementation, cache, chunk, context) == pytest.approx(compiled, rel=0.05)


def test_activations_in_float8_are_numbers_in_float32_in_xla(estimate):
    """GiB by the same compiler, experts in fp8."""
    found = [estimate("xla", None, chunk, 2**15, activation_dtype=FLOAT8) for chunk in (1024, 8192)]
    assert found == pytest.approx([0.810, 1.808], rel=0.05)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_larger_chunks_and_float8_caches_take_no_less(estimate, implementation):
    for cache, context in itertools.product(CACHES, CONTEXTS):
        by_chunk = [estimate(implementation, cache, chunk, context) for chunk in CHUNKS]
        assert by_chunk == sorted(by_chunk), (cache, context)
    for chunk, context in itertools.product(CHUNKS, CONTEXTS):
        assert estimate(implementation, FLOAT8, chunk, context) >= estimate(implementation, None, chunk, context)


def test_what_xla_takes_does_not_grow_with_the_context(estimate):
    """Beyond contexts that are as long as a chunk. Kernels take a GiB of scores at most, and what queries take."""
    for cache, chunk in itertools.product(CACHES, CHUNKS):
        assert len({estimate("xla", cache, chunk, context) for context in CONTEXTS[1:]}) == 1
        assert all(estimate("mosaic_gpu", cache, chunk, context) < 1.2 for context in CONTEXTS)


def test_other_implementations_compute_prompts_as_xla_does(estimate):
    """Of NVIDIA's kernels only dense attention is used."""
    assert estimate("cudnn", None, 8192, 2**15) == estimate("xla", None, 8192, 2**15)

"""The engine's promise on Hopper kernels: a request has the same tokens whatever runs beside it.

On one GPU, and on two whose kernels exchange tokens. Prompts are longer than the selection, and end within a small
chunk.
"""

import dataclasses

import jax
import numpy as np
import pytest

from keye_jax import presets
from keye_jax.bench.engine import prompt_of
from keye_jax.bench.inputs import random_model
from keye_jax.config import KeyeConfig
from keye_jax.engine.engine import Engine
from keye_jax.engine.generation_config import GenerationDefaults
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Request
from keye_jax.processor import Processor
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.sharding import MeshRules, ShardingConfig
from keye_jax.testing import write_processor_files

ROWS, TOKENS = 32, 96
LENGTHS = [3000 + 37 * number for number in range(ROWS)]
WATCHED = (0, 5, 11, 17, 20, 31)
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=1.0, top_p=0.95, top_k=0, seed=7),
}


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(KeyeConfig.from_file(presets.RELEASED), num_hidden_layers=4)


@pytest.fixture(scope="module", params=["one_device", "expert"])
def make(config, tmp_path_factory, request):
    """Makes an engine of one random model, on one GPU or on two."""
    devices = jax.devices()[:2] if request.param == "expert" else jax.devices()[:1]
    if request.param == "expert" and len(devices) < 2:
        pytest.skip("needs two GPUs")
    rules = MeshRules.create(ShardingConfig.from_file(presets.sharding_file(request.param)), config, devices)
    runtime = Runtime(random_model(config, rules=rules), config, rules=rules, prefill_chunk=2048)
    assert (runtime.addresses is not None) == (request.param == "expert")
    directory, tiny = tmp_path_factory.mktemp("processor"), KeyeConfig.from_file(presets.TINY)
    write_processor_files(directory, tiny)
    processor = Processor.from_checkpoint(directory, tiny, defaults={"max_pixels": 256 * 784})

    base = EngineOptions(rows=ROWS, cache_tokens=131072, max_context=16384, media_workers=1)

    def call(**options):
        chosen = dataclasses.replace(base, **options)
        engine = Engine(runtime, processor, GenerationDefaults(SamplingParams(), frozenset()), chosen)
        engine.warmup()
        return engine

    return call


@pytest.fixture(scope="module")
def alone(make):
    """The tokens of each watched request that has the engine to itself, twice the same."""
    with make(prefix_cache=False) as engine:
        found = {
            (name, number): tokens(ask(engine, number, sampling))
            for name, sampling in SAMPLINGS.items()
            for number in WATCHED
        }
        for (name, number), expected in found.items():
            assert tokens(ask(engine, number, SAMPLINGS[name])) == expected
    return found


def ask(engine, number, sampling, count=TOKENS):
    plan = prompt_of(engine, np.random.default_rng(number), LENGTHS[number])
    return engine.submit(Request(plan=plan, sampling=sampling, max_tokens=count))


def tokens(handle):
    return handle.result().choices[0].token_ids


def test_among_others_and_with_a_cached_prefix(make, alone):
    with make() as engine:
        for name, sampling in SAMPLINGS.items():
            found = [tokens(handle) for handle in [ask(engine, number, sampling) for number in range(ROWS)]]
            assert {number: found[number] for number in WATCHED} == {n: alone[name, n] for n in WATCHED}
            for number in WATCHED:
                again = ask(engine, number, sampling)
                assert tokens(again) == alone[name, number]
                assert LENGTHS[number] - 1024 < again.result().usage.cached < LENGTHS[number]
        assert engine.stats().compilations == 0


@pytest.mark.parametrize("make", ["one_device"], indirect=True)
def test_prompts_read_together(make):
    """Alone and in steps with others."""
    with make(prompts_together=4, chunks_between=ROWS, prefix_cache=False) as engine:
        for sampling in SAMPLINGS.values():
            found = [tokens(handle) for handle in [ask(engine, number, sampling) for number in range(ROWS)]]
            for number in WATCHED:
                assert tokens(ask(engine, number, sampling)) == found[number]
        assert engine.stats().compilations == 0


def test_preempted(make, alone):
    with make(optimistic=True, cache_tokens=16384, prefix_cache=False) as engine:
        for name, sampling in SAMPLINGS.items():
            found = [tokens(handle) for handle in [ask(engine, number, sampling, 1500) for number in range(12)]]
            for number in (0, 5, 11):
                assert found[number][:TOKENS] == alone[name, number]
        assert engine.stats().scheduler.preemptions > 0

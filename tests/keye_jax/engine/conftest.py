"""A tiny model in float32, whose engine several tests ask, and files to ask about."""

import dataclasses

import pytest

from keye_jax.engine.checkpoint import load
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Request
from keye_jax.runtime.sampling import SamplingParams

OPTIONS = EngineOptions(rows=4, cache_tokens=8192, max_context=2048, small_chunk=64, media_workers=2)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="session")
def loaded(files):
    """The arguments of an `Engine`: large chunks have 128 tokens."""
    return load(files / "checkpoint", dtype="float32", prefill_chunk=128, media={"max_pixels": 100352})


@pytest.fixture(scope="module")
def engine(loaded):
    with Engine(*loaded, options=OPTIONS) as engine:
        engine.warmup()
        yield engine


@pytest.fixture(scope="session")
def make(loaded):
    """Makes an engine of the same model with other options."""

    def call(**options):
        return Engine(*loaded, options=dataclasses.replace(OPTIONS, **options))

    return call


def ask(content, *, tokens=8, sampling=GREEDY, **others):
    """A request of one message."""
    return Request(messages=[{"role": "user", "content": content}], max_tokens=tokens, sampling=sampling, **others)


def words(seed, count=30):
    """A text of its own for each seed."""
    return " ".join(f"{(seed * 7919 + index * 104729) % 9973}" for index in range(count))

"""What is compiled while weights are loaded, an engine does not compile again."""

import jax
import pytest

from convert import abstract_params, convert, load_params
from keye_jax.engine import checkpoint
from keye_jax.engine.checkpoint import load, load_and_compile, read_checkpoint
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions, options_for_one
from keye_jax.engine.request import Request
from keye_jax.errors import UserError
from keye_jax.sharding import MeshRules

SETTINGS = {"dtype": "float32", "prefill_chunk": 128}
AHEAD = {"_decode_and_sample", "begin_row", "prefill_chunk", "encode"}


@pytest.fixture(scope="module")
def checkpoints(files, tmp_path_factory):
    """The same checkpoint as safetensors, and as Orbax, which commits arrays to a device."""
    directory = tmp_path_factory.mktemp("both")
    convert(files / "checkpoint", directory / "orbax")
    return {"safetensors": files / "checkpoint", "orbax": directory / "orbax"}


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_what_arrays_are_is_known_before_they_are_loaded(checkpoints, kind, dtype):
    config, _, _ = read_checkpoint(checkpoints[kind])

    def known(x):
        committed = not isinstance(x, jax.Array) or x.committed
        return x.shape, x.dtype, x.sharding if committed else None

    loaded = load_params(checkpoints[kind], config, dtype=dtype)
    assert jax.tree.map(known, abstract_params(checkpoints[kind], config, dtype=dtype)) == jax.tree.map(known, loaded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_one_prompt(files, checkpoints, compiled, quick_to_compile, kind):
    config, processor, defaults = read_checkpoint(checkpoints[kind])
    picture = {"type": "image_url", "image_url": {"url": str(files / "picture.png")}}
    text = {"type": "text", "text": "What is there? " * 40}
    plan = processor.plan([{"role": "user", "content": [picture, text]}])
    options = options_for_one(MeshRules.single_device(), plan.num_tokens + 8)
    jax.clear_caches()
    runtime = load_and_compile(checkpoints[kind], config, processor, options, prompt=plan, **SETTINGS)
    ahead = {name.removeprefix("jit(").removesuffix(")") for name in compiled}
    with Engine(runtime, processor, defaults, options) as engine:
        del compiled[:]
        engine.submit(Request(plan=plan, max_tokens=8)).result()
    later = {name.removeprefix("jit(").removesuffix(")") for name in compiled}
    assert ahead >= AHEAD and later.isdisjoint(AHEAD), (ahead, later)


def test_a_pool_that_does_not_fit_is_refused_before_weights_are_read(checkpoints, monkeypatch):
    def must_not(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(checkpoint, "load_params", must_not)
    with pytest.raises(UserError, match="cache_tokens is 1,000,000,000,000; at most"):
        load(checkpoints["orbax"], compile_for=EngineOptions(cache_tokens=10**12), **SETTINGS)

"""The page pool is as large as the devices have room for, and no larger than is of use."""

import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.engine import memory
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions, scheduler_config
from keye_jax.errors import UserError
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules, ShardingConfig

GIB = 2**30
H100, H200 = int(0.95 * 79.6 * GIB), int(0.95 * 139.8 * GIB)
"""What XLA's allocator has with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."""

LARGEST_IMAGE = 81920


@pytest.fixture(scope="module")
def make():
    """Makes the released model of shapes alone, by a preset on a number of GPUs."""
    config = KeyeConfig.from_file(presets.RELEASED)

    def call(preset="one_device", devices=1, **options):
        sharding = ShardingConfig.from_file(presets.sharding_file(preset))
        rules = MeshRules.abstract(sharding, config, devices, "gpu")
        return Runtime(Keye.abstract(config), config, rules=rules, options=AttentionOptions(**options))

    return call


@pytest.fixture
def tokens(monkeypatch):
    """Tokens of the pool on devices with so many bytes, of which some are in use."""

    def call(runtime, limit, in_use=0, *, most_patches=LARGEST_IMAGE, **options):
        monkeypatch.setattr(memory, "memory_limit_bytes", lambda: limit)
        monkeypatch.setattr(memory, "memory_in_use_bytes", lambda: in_use)
        config = scheduler_config(runtime, EngineOptions(**{"rows": 32, **options}), most_patches)
        return config.pages_per_shard * config.homes * config.turns * 64

    return call


def test_what_fits_beside_the_weights(make, tokens):
    one = make()
    assert 90_000 < tokens(one, H100) < 150_000 < 600_000 < tokens(one, H200) < 700_000
    assert tokens(one, H100) < tokens(one, H100, most_patches=8192)
    assert tokens(one, H100) < tokens(make(indexer_dtype="float8_e4m3fn"), H100)
    assert 1.8 < tokens(make(cache_dtype="float8_e4m3fn"), H100) / tokens(one, H100) < 1.9
    assert tokens(one, H200, 70 * GIB) < tokens(one, H200) == tokens(one, H200, GIB)
    assert len({tokens(one, H200, 70 * GIB + change) for change in (0, 4096, 8192)}) == 1
    assert tokens(one, H200, rows=512) < tokens(one, H200)


@pytest.mark.parametrize("preset", ["expert", "combined"])
def test_several_devices_hold_more(make, tokens, preset):
    # Each has a part of the weights only.
    assert tokens(make(preset, 4), H100) > 4 * 250_000


def test_no_more_than_the_rows_can_use(make, tokens):
    assert tokens(make(), H200, max_context=4096) == 32 * 4096
    assert tokens(make("expert", 4), H200, max_context=1000) == 32 * 1024


def test_prompts_together_need_one_device(make, tokens):
    """Also where a sharding file says that it is one."""
    assert tokens(make(), H200, prompts_together=2) > 0
    with pytest.raises(UserError, match="prompts_together is 2; it must be 1 on several devices"):
        tokens(make("expert", 4), H200, prompts_together=2)


def test_a_number_that_does_not_fit_is_refused_with_the_one_that_does(make, tokens):
    one = make()
    with pytest.raises(UserError, match=r"cache_tokens is 1,000,000; at most [0-9,]+ tokens fit beside") as error:
        tokens(one, H200, cache_tokens=1_000_000)
    most = int(str(error.value).partition("at most ")[2].partition(" ")[0].replace(",", ""))
    assert tokens(one, H200) < most == tokens(one, H200, cache_tokens=most)
    with pytest.raises(UserError, match=f"cache_tokens is {most + 1:,}"):
        tokens(one, H200, cache_tokens=most + 1)


def test_weights_that_leave_no_room(make, tokens):
    for options in ({}, {"cache_tokens": 64}):
        with pytest.raises(
            UserError, match=r"57\.9\d GiB of weights and .* GiB for the steps; a device has 60\.00 GiB"
        ):
            tokens(make(), 60 * GIB, **options)


def test_an_engine_on_a_cpu(loaded, monkeypatch):
    with Engine(*loaded, options=EngineOptions(rows=4, media_workers=1)) as engine:
        assert engine.cache_tokens == 4 * 4096 == engine.stats().scheduler.pages * 64
    with Engine(*loaded, options=EngineOptions(rows=32, media_workers=1)) as engine:
        assert engine.cache_tokens == memory.CPU_TOKENS
    monkeypatch.setattr("keye_jax.runtime.runtime.Runtime.new_pool", None)  # nothing is allocated
    with pytest.raises(UserError, match="cache_tokens is 100,000,000,000; at most"):
        Engine(*loaded, options=EngineOptions(cache_tokens=10**11))

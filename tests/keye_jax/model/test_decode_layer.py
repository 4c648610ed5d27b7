"""Steps of decode by the operations of few launches are those by single operations, beyond top_k."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import BatchMetadata, Pages
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.context import PagedContext
from keye_jax.model.decode_layer import route_and_mix
from keye_jax.model.keye import Keye
from keye_jax.runtime import lowering
from keye_jax.runtime.runtime import Runtime
from keye_jax.sharding import MeshRules
from keye_jax.sharding.step import StepSharding
from tests.keye_jax.golden_models import CONFIGS, float8, golden_model, random_ids, rules_of, text, traced_decode
from tests.near_ties import assert_leads, selection_leads

LENGTHS, SEEDS = (70, -1, 50, 63), (2, 0, 51, 46)
"""Of texts whose selections are all `LEAD` ahead; the second row is idle. 63 is the last position of a page."""
LEAD, ATOL = 4e-4, 2e-4

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def step_of(options: AttentionOptions, layers: int | None = None) -> tuple[Any, Any, np.ndarray, Runtime]:
    """What a step computes of a token of each text, the pool after it, and the texts' pages."""
    model, config = golden_model("a", layers)
    runtime = Runtime(model, config, options=options)
    pool, tables = runtime.new_cache(len(LENGTHS), 128)
    tokens = np.zeros(len(LENGTHS), np.int32)
    for row, (length, seed) in enumerate(zip(LENGTHS, SEEDS, strict=True)):
        if length >= 0:
            ids = random_ids(length + 1, seed)
            _, pool = runtime.prefill([text(ids, tables[row], end=length)], pool)
            tokens[row] = ids[length]
    trace, pool = traced_decode(runtime, tokens, np.array(LENGTHS), tables, pool)
    return trace, pool, tables, runtime


ACTIVE = [row for row, length in enumerate(LENGTHS) if length >= 0]


def test_a_step_is_the_same():
    """Logits, selections, hidden states and all pages."""
    wanted, before, _, runtime = step_of(AttentionOptions())
    top_k = runtime.config.sa_config.topk
    assert 2 * top_k <= min(LENGTHS[row] for row in ACTIVE)
    assert_leads(selection_leads(wanted.scores[:, ACTIVE], top_k), LEAD)
    got, after, _, _ = step_of(AttentionOptions(decode="xla"))
    np.testing.assert_array_equal(got.selected[:, ACTIVE], wanted.selected[:, ACTIVE])
    for name in ("logits", "scores", "hidden"):
        one, other = getattr(got, name), getattr(wanted, name)
        rows = (slice(None), ACTIVE) if name != "logits" else ACTIVE
        np.testing.assert_allclose(one[rows], other[rows], atol=ATOL)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(one, other, atol=ATOL)


@pytest.mark.parametrize("dtypes", [{"indexer_dtype": "float8_e4m3fn"}, {"cache_dtype": "float8_e4m3fn"}], ids=str)
def test_float8_pages(dtypes: dict[str, Any]):
    """In one layer all tokens select alike, so what the pages get differs by rounding alone."""
    with float8():
        _, wanted, tables, _ = step_of(AttentionOptions(**dtypes), layers=1)
    _, got, _, _ = step_of(AttentionOptions(decode="xla", **dtypes), layers=1)
    for row in ACTIVE:
        page, offset = tables[row][LENGTHS[row] // 64], LENGTHS[row] % 64
        for values, scales in (("kv", "kv_scales"), ("index_pages", "index_scales")):
            rows = []
            for pool in (got, wanted):
                pages = pool.layers[0]
                factor = getattr(pages, scales)
                own = np.asarray(getattr(pages, values)[page, offset], np.float32)
                rows.append(own if factor is None else own * np.asarray(factor[page, offset])[..., None])
            assert np.abs(rows[1]).max() > 0
            # A rounding to float8 may fall the other way.
            assert np.mean(np.abs(rows[0] - rows[1]) < ATOL) > 0.9


def test_dense_attention():
    wanted, got = (step_of(AttentionOptions("dense", decode=decode), layers=1)[0] for decode in (None, "xla"))
    np.testing.assert_allclose(got.logits[ACTIVE], wanted.logits[ACTIVE], atol=ATOL)


def test_routing_in_one_operation():
    """A step of few rows routes as the layer's norm and router do. Experts are well apart."""
    model, config = golden_model("a", 1)
    layer, step = model.decoder.layers[0], StepSharding.decode(MeshRules.single_device())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1, config.hidden_size)), jnp.float32)
    batch = BatchMetadata(jnp.zeros((5, 1), jnp.int32), jnp.zeros(5, jnp.int32), jnp.asarray([1, 1, 0, 1, 1]))
    normed, valid = layer.post_attention_norm(x), batch.valid(1)
    scores = np.asarray(layer.moe.router(normed[:, 0]))
    assert_leads(-np.diff(-np.sort(-scores))[:, : config.num_experts_per_tok], 1e-3)
    wanted, chosen = layer.moe(normed, valid, step, implementation="xla")
    options = AttentionOptions(implementation="xla")
    mixed, given, experts = route_and_mix(layer, x[:, 0], PagedContext(Pages(x, x), batch), options, "xla")
    np.testing.assert_array_equal(experts, chosen[:, 0])
    np.testing.assert_allclose(given, normed[:, 0], rtol=1e-5)
    np.testing.assert_allclose(mixed, wanted[:, 0], atol=1e-5)
    assert not np.asarray(mixed[2]).any() and np.asarray(mixed).any(axis=1).sum() == 4


class TestOtherStepsStay:
    """What the operations do not take has the program that it had."""

    def decode(self, decode: Any, rows: int, mesh: dict[str, int] | None = None, **rules: Any) -> str:
        model, config = golden_model("a", 1)
        over = rules_of(config, mesh, rules) if mesh else None
        runtime = Runtime(model, config, options=AttentionOptions(decode=decode), rules=over)
        return lowering.decode_program(runtime, rows, 128, sample=False).lower().as_text()

    def test_prefill(self):
        model, config = golden_model("a", 1)
        runtimes = [Runtime(model, config, options=AttentionOptions(decode=decode)) for decode in ("xla", None)]
        got, wanted = ([program.lower().as_text() for program in lowering.prefill_programs(r, 128)] for r in runtimes)
        assert got == wanted

    def test_many_rows(self):
        assert self.decode("xla", 65) == self.decode(None, 65)
        assert self.decode("xla", 64) != self.decode(None, 64)

    def test_several_devices(self):
        over: dict[str, Any] = {"mesh": {"x": 2}, "experts": "x", "heads": "x", "kv_heads": "x"}
        assert self.decode("xla", 2, **over) == self.decode(None, 2, **over)


@pytest.mark.parametrize("rows", [1, 64])
def test_kernels_of_the_released_model(rows: int):
    """For a Hopper GPU a layer has eight kernels by Mosaic, or six with single operations beside `route`."""
    config = KeyeConfig.from_file(CONFIGS / "model" / "keye_vl_2_30b_a3b.json")
    config = dataclasses.replace(config, num_hidden_layers=1)
    texts = []
    for decode in ("mosaic_gpu", None):
        options = AttentionOptions(implementation="mosaic_gpu", decode=decode)
        runtime = Runtime(Keye.abstract(config), config, options=options)
        program = lowering.decode_program(runtime, rows, 32_768, sample=False)
        texts.append(program.lower(lowering_platforms=("cuda",)).as_text())
    kernels, scatters = (
        [text.count(name) for text in texts] for name in ("custom_call @mosaic_gpu", '"stablehlo.scatter')
    )
    assert kernels == [8, 6]
    assert scatters[1] == scatters[0] + 2

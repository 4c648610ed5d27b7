"""Steps of decode of few rows are those by single operations, beyond top_k."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.model import decode_layer
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.runtime import lowering
from keye_jax.runtime.runtime import Runtime
from tests.keye_jax.golden_models import CONFIGS, float8, golden_model, random_ids, rules_of, text, traced_decode
from tests.near_ties import assert_leads, selection_leads

LENGTHS, SEEDS = (70, -1, 50, 63), (2, 0, 51, 46)
"""Of texts whose selections are all `LEAD` ahead; the second row is idle. 63 is the last position of a page."""
LEAD, ATOL = 4e-4, 2e-4

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def step_of(
    options: AttentionOptions, layers: int | None = None, mesh: dict[str, int] | None = None, **rules: Any
) -> tuple[Any, Any, np.ndarray, Runtime]:
    """What a step computes of a token of each text, the pool after it, and the texts' pages. A mesh has these rules."""
    model, config = golden_model("a", layers)
    runtime = Runtime(model, config, options=options, rules=rules_of(config, mesh, rules) if mesh else None)
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


@pytest.fixture
def single_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Once it is called, steps of any number of rows run layers by single operations."""

    def change() -> None:
        monkeypatch.setattr(decode_layer, "MOST_ROWS", 0)
        jax.clear_caches()  # Programs do not know the number that they were traced with.

    yield change
    jax.clear_caches()


def test_a_step_is_the_same(single_operations: Callable[[], None]):
    """Logits, selections, hidden states and all pages."""
    got, after, _, runtime = step_of(AttentionOptions())
    single_operations()
    wanted, before, _, _ = step_of(AttentionOptions())
    top_k = runtime.config.sa_config.topk
    assert 2 * top_k <= min(LENGTHS[row] for row in ACTIVE)
    assert_leads(selection_leads(wanted.scores[:, ACTIVE], top_k), LEAD)
    np.testing.assert_array_equal(got.selected[:, ACTIVE], wanted.selected[:, ACTIVE])
    # No expert adds to the idle row.
    np.testing.assert_allclose(got.hidden[:, 1], wanted.hidden[:, 1], atol=ATOL)
    for name in ("logits", "scores", "hidden"):
        one, other = getattr(got, name), getattr(wanted, name)
        rows = (slice(None), ACTIVE) if name != "logits" else ACTIVE
        np.testing.assert_allclose(one[rows], other[rows], atol=ATOL)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(one, other, atol=ATOL)


ON_A_MESH: list[dict[str, Any]] = [
    {"mesh": {"x": 2}, "batch": "x", "experts": "x"},
    {"mesh": {"x": 2}, "query_sequence": "x", "cache_sequence": "x", "experts": "x"},
    {"mesh": {"x": 4}, "batch": "x"},
    {"mesh": {"x": 2, "y": 2}, "batch": ["x", "y"], "experts": ["y", "x"]},
    {"mesh": {"x": 2, "y": 2}, "batch": "x", "heads": "y", "kv_heads": "y", "expert_hidden": ["x"], "experts": "y"},
]
"""Which devices share a sequence, heads and experts: the same ones, others, or none."""


@pytest.mark.parametrize("over", ON_A_MESH, ids=str)
def test_several_devices(over: dict[str, Any]):
    got, wanted = step_of(AttentionOptions(), **over)[0], step_of(AttentionOptions())[0]
    np.testing.assert_array_equal(np.sort(got.selected[:, ACTIVE]), np.sort(wanted.selected[:, ACTIVE]))
    np.testing.assert_array_equal(got.experts[:, ACTIVE], wanted.experts[:, ACTIVE])
    np.testing.assert_allclose(got.logits[ACTIVE], wanted.logits[ACTIVE], atol=ATOL)
    for name in ("scores", "hidden", "moe_input"):
        rows = (slice(None), ACTIVE)
        np.testing.assert_allclose(getattr(got, name)[rows], getattr(wanted, name)[rows], atol=ATOL)


@pytest.mark.parametrize("dtypes", [{"indexer_dtype": "float8_e4m3fn"}, {"cache_dtype": "float8_e4m3fn"}], ids=str)
def test_float8_pages(dtypes: dict[str, Any], single_operations: Callable[[], None]):
    """In one layer all tokens select alike, so what the pages get differs by rounding alone."""
    _, got, _, _ = step_of(AttentionOptions(**dtypes), layers=1)
    single_operations()
    with float8():
        _, wanted, tables, _ = step_of(AttentionOptions(**dtypes), layers=1)
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


def test_dense_attention(single_operations: Callable[[], None]):
    got = step_of(AttentionOptions("dense"), layers=1)[0]
    single_operations()
    wanted = step_of(AttentionOptions("dense"), layers=1)[0]
    np.testing.assert_allclose(got.logits[ACTIVE], wanted.logits[ACTIVE], atol=ATOL)


class TestOtherStepsStay:
    """What the operations do not take has the program that it had."""

    def decode(self, rows: int, mesh: dict[str, int] | None = None, exchange: str = "auto", **rules: Any) -> str:
        model, config = golden_model("a", 1)
        over = rules_of(config, mesh, rules, exchange) if mesh else None
        runtime = Runtime(model, config, options=AttentionOptions(), rules=over)
        return lowering.decode_program(runtime, rows, 128, sample=False).lower().as_text()

    def test_prefill(self, single_operations: Callable[[], None]):
        model, config = golden_model("a", 1)

        def programs() -> list[str]:
            runtime = Runtime(model, config, options=AttentionOptions())
            return [program.lower().as_text() for program in lowering.prefill_programs(runtime, 128)]

        got = programs()
        single_operations()
        assert got == programs()

    def test_many_rows(self, single_operations: Callable[[], None]):
        few, many = self.decode(64), self.decode(65)
        single_operations()
        assert many == self.decode(65)
        assert few != self.decode(64)

    @pytest.mark.parametrize(
        "over",
        [
            {"mesh": {"x": 2, "y": 2}, "batch": ["x", "y"], "experts": "y"},
            {"mesh": {"x": 2}, "batch": "x", "experts": "x", "exchange": "all_to_all"},
        ],
        ids=str,
    )
    def test_tokens_that_go_to_some_devices(self, over: dict[str, Any], single_operations: Callable[[], None]):
        got, of_all = self.decode(4, **over), self.decode(4, **ON_A_MESH[0])
        single_operations()
        assert got == self.decode(4, **over)
        assert of_all != self.decode(4, **ON_A_MESH[0])


@pytest.mark.parametrize(("rows", "mosaic"), [(1, 8), (8, 8), (9, 9), (64, 9)])
def test_kernels_of_the_released_model(rows: int, mosaic: int, single_operations: Callable[[], None]):
    """For a Hopper GPU a layer has eight kernels by Mosaic, of which single operations lack three.

    For more than eight rows one more sorts the rows of experts.
    """
    config = KeyeConfig.from_file(CONFIGS / "model" / "keye_vl_2_30b_a3b.json")
    config = dataclasses.replace(config, num_hidden_layers=1)

    def lowered() -> str:
        options = AttentionOptions(implementation="mosaic_gpu")
        runtime = Runtime(Keye.abstract(config), config, options=options)
        program = lowering.decode_program(runtime, rows, 32_768, sample=False)
        return program.lower(lowering_platforms=("cuda",)).as_text()

    few = lowered()
    single_operations()
    single = lowered()
    kernels, scatters = (
        [text.count(name) for text in (few, single)] for name in ("custom_call @mosaic_gpu", '"stablehlo.scatter')
    )
    assert kernels == [mosaic, 5]
    assert scatters[1] == scatters[0] + 2

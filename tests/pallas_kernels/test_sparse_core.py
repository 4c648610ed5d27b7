"""The SparseCores' selection with the subcores of each TPU generation, on a machine of NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.select_topk import select_topk, sparse_core
from pallas_kernels.topk_attention import mosaic_tpu as kernels
from tests.pallas_kernels.attention_oracle import SCALE, assert_close, attention, random_inputs
from tests.pallas_kernels.paged import to_pages
from tests.pallas_kernels.selection_oracle import selection
from tests.pallas_kernels.subcore_machine import SubcoreInfo, simulated_subcores

GENERATIONS = {
    "v5p": SubcoreInfo(num_cores=4, num_subcores=16, num_lanes=8, vmem_capacity_bytes=2**19),
    "v6e": SubcoreInfo(num_cores=2, num_subcores=16, num_lanes=8, vmem_capacity_bytes=2**18),
    "tpu7x": SubcoreInfo(num_cores=2, num_subcores=16, num_lanes=16, vmem_capacity_bytes=2**19),
}
K = 2048


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_selection_from_128k(rng, generation, rows):
    """Scores of which hundreds equal the threshold, for teams of several sizes."""
    scores = np.round(rng.normal(size=(rows, 131_072)), 2).astype(np.float32)
    lengths = np.array([131_072, 70_001, 2049, 2047, 0], np.int32)[:rows]
    with simulated_subcores(GENERATIONS[generation]):
        got = sparse_core.select_topk(jnp.asarray(scores), jnp.asarray(lengths), K)
    np.testing.assert_array_equal(got, selection(scores, lengths, K))


@pytest.mark.parametrize("size", [1000, 131_072, 262_144])
@pytest.mark.parametrize("rows", [1, 8, 64, 2048])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_teams_cover_all_rows_and_fit(generation, rows, size):
    info = GENERATIONS[generation]
    with simulated_subcores(info):
        teams = sparse_core._teams(rows, size, K)
    assert teams.count * teams.members == info.num_cores * info.num_subcores
    assert teams.count * teams.waves >= rows > teams.count * (teams.waves - 1)
    assert info.num_subcores % teams.members == 0
    assert teams.members * teams.part >= size and teams.slots >= K
    assert 4 * (teams.part + teams.slots) < info.vmem_capacity_bytes


def test_a_row_that_does_not_fit_is_refused():
    with simulated_subcores(GENERATIONS["v6e"]), pytest.raises(NotImplementedError, match="row of 1,048,576 positions"):
        sparse_core.select_topk(jnp.zeros((1, 2**20)), jnp.array([5]), K)


def test_a_tpu_without_sparse_cores_is_refused():
    with pltpu.force_tpu_interpret_mode(), pytest.raises(UnsupportedError, match="v5p, v6e or tpu7x"):
        select_topk(jnp.zeros((1, 300)), jnp.array([5]), 64, implementation="sparse_core")


@pytest.mark.parametrize(
    ("chip", "rows", "chosen"),
    [
        (pltpu.ChipVersion.TPU_V5E, 1, False),
        (pltpu.ChipVersion.TPU_V5P, 8, True),
        (pltpu.ChipVersion.TPU_V5P, 9, False),
        (pltpu.ChipVersion.TPU_V6E, 64, True),
        (pltpu.ChipVersion.TPU_7X, 64, True),
    ],
)
def test_generations_whose_sparse_cores_select_in_decode(monkeypatch, chip, rows, chosen):
    info = pltpu.get_tpu_info_for_chip(chip, 1)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    assert kernels._on_sparse_cores(rows) == chosen


def test_decode_leaves_rows_that_do_not_fit_to_the_tensorcore(monkeypatch):
    monkeypatch.setattr(kernels, "_on_sparse_cores", lambda _: True)
    monkeypatch.setattr(kernels.mosaic_tpu, "select_topk", lambda *_: "the TensorCore's")
    with simulated_subcores(GENERATIONS["v6e"]):
        assert kernels._select(jnp.zeros((1, 1, 2**20)), jnp.array([[5]]), K) == "the TensorCore's"


def test_decode_does_not_pass_over_what_fails_on_sparse_cores(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no rule for this")

    monkeypatch.setattr(kernels, "_on_sparse_cores", lambda _: True)
    monkeypatch.setattr(sparse_core, "select_topk", refuse)
    with simulated_subcores(GENERATIONS["v6e"]), pytest.raises(NotImplementedError, match="no rule for this"):
        kernels._select(jnp.zeros((1, 1, 640)), jnp.array([[5]]), 64)


def test_decode_attends_to_what_sparse_cores_select(rng, monkeypatch):
    monkeypatch.setattr(kernels, "_on_sparse_cores", lambda _: True)
    batch, length, top_k = 2, 640, 64
    q, k, v = random_inputs(rng, (jnp.float32, 128, 1e-5), batch=batch, queries=1, length=length, heads=8, kv_heads=4)
    pages, table = to_pages(rng, np.concatenate([k, v], axis=2), 64)
    scores, lengths = rng.normal(size=(batch, 1, length)).astype(np.float32), np.array([[length], [100]], np.int32)
    visible = np.zeros((batch, 1, length + 1), bool)
    np.put_along_axis(visible, selection(scores, lengths, top_k), True, axis=-1)
    with simulated_subcores(GENERATIONS["v6e"]):
        arrays = [jnp.asarray(x) for x in (q, scores, lengths, pages, table)]
        monkeypatch.setattr(kernels.mosaic_tpu, "select_topk", None)  # The TensorCore does not select.
        with pltpu.force_tpu_interpret_mode():
            got = kernels.topk_attention(*arrays, top_k=top_k, scale=SCALE)
    assert_close(got, attention(q, k, v, visible[..., :-1]), 1e-5)

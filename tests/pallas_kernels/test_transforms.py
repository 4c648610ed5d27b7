"""Gradients, `jax.vmap`, `jax.shard_map` and meshes with Explicit axes, of every operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding

from pallas_kernels import UnsupportedError, dispatch, grouped_matmul, select_topk, sparse_attention
from tests.pallas_kernels.calls import BATCH, CONTEXT, HEADS, KV_HEADS, QUERIES, calls

CALLS = {str(call): call for call in calls()}

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def assert_close(got, expected, tolerance=1e-4):
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def loss(run, *arrays):
    """A number that depends on every finite result."""
    found = jax.tree.leaves(run(*arrays))
    return sum(jnp.sum(jnp.where(jnp.isfinite(x), jnp.sin(x), 0)) for x in found)


class Dense:
    """Every operation as its formula, for arrays in which a sequence's context is in one piece."""

    @staticmethod
    def pages(pool, table):
        return pool[table].reshape(BATCH, CONTEXT, *pool.shape[2:])

    @staticmethod
    def attend(q, k, v, seen):
        k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
        dots = jnp.where(seen[:, :, None], jnp.einsum("btnd,bsnd->btns", q, k) * 0.5, -jnp.inf)
        largest = jnp.max(dots, axis=-1, initial=-1e9, keepdims=True)
        weights = jnp.exp(dots - largest)
        total = jnp.sum(weights, axis=-1)
        safe = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, largest[..., 0] + jnp.log(safe), -jnp.inf)
        return jnp.einsum("btns,bsnd->btnd", weights / safe[..., None], v), lse

    @classmethod
    def indexer_scores(cls, q, weights, keys, page_table, query_start, key_scales):
        dots = jax.nn.relu(jnp.einsum("btnd,bsd->btns", q, cls.pages(keys, page_table)))
        scores = jnp.einsum("btns,btn->bts", dots, weights) * 0.5 * cls.pages(key_scales, page_table)[:, None]
        return jnp.where(cls.causal(query_start), scores, -jnp.inf)

    @staticmethod
    def causal(query_start):
        return jnp.arange(CONTEXT) <= (query_start[:, None] + jnp.arange(QUERIES))[..., None]

    @classmethod
    def sparse_attention(cls, q, kv, indices, page_table):
        seen = (indices[..., None] == jnp.arange(CONTEXT)).any(axis=-2)
        keys, values = jnp.split(cls.pages(kv, page_table), 2, axis=2)
        return cls.attend(q, keys, values, seen)

    @classmethod
    def topk_attention(cls, q, scores, lengths, kv, page_table):
        return cls.sparse_attention(q, kv, select_topk(scores, lengths, 6, implementation="xla"), page_table)

    @classmethod
    def flash_attention(cls, q, k, v, lengths):
        seen = jnp.broadcast_to(jnp.arange(k.shape[1]) < lengths[:, None, None], (*q.shape[:2], k.shape[1]))
        return cls.attend(q, k, v, seen)[0]

    @classmethod
    def paged_flash_attention(cls, q, kv, page_table, query_start):
        keys, values = jnp.split(cls.pages(kv, page_table), 2, axis=2)
        return cls.attend(q, keys, values, cls.causal(query_start))

    @staticmethod
    def grouped_matmul(lhs, rhs, group_sizes):
        ends = jnp.cumsum(group_sizes)
        row = jnp.arange(len(lhs))[:, None]
        group = (row >= ends - group_sizes) & (row < ends)
        return jnp.einsum("mk,ekn,me->mn", lhs, rhs, group.astype(lhs.dtype))

    @classmethod
    def expert_mlp(cls, lhs, gate_up, down, group_sizes):
        gate, up = jnp.split(cls.grouped_matmul(lhs, gate_up, group_sizes), 2, axis=-1)
        return cls.grouped_matmul(jax.nn.silu(gate) * up, down, group_sizes)


class TestGradients:
    @pytest.mark.parametrize(
        ("operation", "rows"), [*((name, None) for name in CALLS if name != "select_topk"), ("grouped_matmul", 10)]
    )
    def test_the_formulas_gradients_in_float64(self, operation, rows):
        """Of grouped products also with few rows, which take another way."""
        call = CALLS[operation]
        arrays = dict(call.arrays)
        if rows:
            arrays |= {"lhs": arrays["lhs"][:rows], "group_sizes": jnp.array([4, 0, 5])}
        arrays = list(arrays.values())
        got = jax.jit(jax.grad(functools.partial(loss, call), argnums=call.differentiable))(*arrays)
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x, np.float64 if x.dtype == jnp.float32 else np.int32)) for x in arrays]
            formula = functools.partial(loss, getattr(Dense, call.operation))
            if call.operation == "topk_attention":
                wide[1] = arrays[1]
            expected = jax.jit(jax.grad(formula, argnums=call.differentiable))(*wide)
        for one, other in zip(got, expected, strict=True):
            largest = np.abs(np.asarray(other)).max()
            assert largest > 0
            np.testing.assert_allclose(one, np.asarray(other), atol=1e-4 * largest)

    def test_a_selection_is_a_constant(self):
        scores, lengths = CALLS["select_topk"].arrays.values()

        def chosen(scores):
            return jnp.sum(jnp.take_along_axis(scores, jnp.maximum(select_topk(scores, lengths, 6), 0), axis=-1))

        d_scores = np.asarray(jax.jit(jax.grad(chosen))(scores))
        assert d_scores.sum() == BATCH * QUERIES * 6


class TestVmap:
    def test_the_portable_implementation(self, call):
        arrays = list(call.arrays.values())
        stacked = [jnp.stack([x, jnp.roll(x, 1, axis=-1)]) for x in arrays]
        got = jax.jit(jax.vmap(call))(*stacked)
        one_by_one = [jax.jit(call)(*(x[i] for x in stacked)) for i in range(2)]
        assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


class TestKernels:
    """Kernels for TPUs, interpreted: `lax.ragged_dot`, which is quick, stands for all, and one Pallas kernel."""

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        monkeypatch.setattr(dispatch, "available", lambda: ("mosaic_tpu", "xla"))
        with pltpu.force_tpu_interpret_mode():
            yield

    def test_vmap_over_some_arguments(self):
        lhs, rhs, sizes = CALLS["grouped_matmul"].arrays.values()
        run = functools.partial(grouped_matmul, implementation="mosaic_tpu")
        got = jax.jit(jax.vmap(run, in_axes=(0, None, 0)))(
            jnp.stack([lhs, 2 * lhs]), rhs, jnp.stack([sizes, sizes[::-1]])
        )
        assert_close(got, jnp.stack([run(lhs, rhs, sizes), run(2 * lhs, rhs, sizes[::-1])]))

    def test_the_best_implementation_has_the_portable_ones_gradient(self):
        call = CALLS["grouped_matmul"]
        got, expected = (
            jax.jit(jax.grad(functools.partial(loss, functools.partial(call, implementation=name)), argnums=(0, 1)))(
                *call.arrays.values()
            )
            for name in (None, "xla")
        )
        assert_close(got, expected, 0)

    def test_a_forced_one_has_none(self):
        call = CALLS["grouped_matmul"]
        run = functools.partial(loss, functools.partial(call, implementation="mosaic_tpu"))
        with pytest.raises(
            UnsupportedError, match="grouped_matmul: the implementation 'mosaic_tpu' has no gradient; le"
        ):
            jax.jit(jax.grad(run))(*call.arrays.values())

    def test_a_pallas_kernel_in_shard_map(self):
        mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
        q, kv, indices, table = CALLS["sparse_attention"].arrays.values()
        arrays, kv = (q[:2, :1], indices[:2, :1], table[:2]), kv[:10]
        placed = [jax.device_put(x, NamedSharding(mesh, jax.P("x"))) for x in arrays]

        def attend(q, indices, table):
            return sparse_attention(q, kv, indices, table, scale=0.5, implementation="mosaic_tpu")

        run = jax.shard_map(attend, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
        assert_close(
            jax.jit(run)(*placed), sparse_attention(arrays[0], kv, *arrays[1:], scale=0.5, implementation="xla")
        )


class TestMeshes:
    """On eight devices; what `jax.make_mesh` makes has Explicit axes."""

    @pytest.fixture(scope="class")
    @classmethod
    def mesh(cls):
        if len(jax.devices()) < 8:
            pytest.skip("needs eight devices")
        mesh = jax.make_mesh((4, 2), ("x", "y"))
        assert mesh.axis_types == (AxisType.Explicit,) * 2
        return mesh

    def test_shard_map_with_gradients(self, call, mesh):
        """Arguments that all devices share get the sum of their gradients."""
        arrays, specs = list(call.arrays.values()), call.specs("x")
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs[0], strict=True)]
        sharded = jax.shard_map(call, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
        if call.operation == "select_topk":
            return assert_close(jax.jit(sharded)(*placed), call(*arrays))

        def both(run, arrays):
            return jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=call.differentiable))(*arrays)

        with jax.set_mesh(mesh):
            found = both(sharded, placed)
        return assert_close(found, both(call, arrays), 1e-3)

    def test_explicit_axes(self, call, mesh):
        """With and without a mesh that is set, under jit and not; results lie as the arguments do."""
        arrays, specs = list(call.arrays.values()), call.specs("x")
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs[0], strict=True)]
        expected = call(*arrays)
        with jax.set_mesh(mesh):
            found = [jax.jit(call)(*placed)]
        found.append(call(*placed))
        for each in found:
            assert_close(each, expected)
            axis = "x" if call.by_batch else None
            assert all(x.sharding.spec[0] == axis for x in jax.tree.leaves(each))

    def test_kernels_do_not_divide_their_work(self, mesh):
        lhs, rhs, sizes = (
            jax.device_put(x, NamedSharding(mesh, jax.P())) for x in CALLS["grouped_matmul"].arrays.values()
        )
        with pytest.raises(UnsupportedError, match="'mosaic_tpu' cannot divide its work among devices; call it inside"):
            grouped_matmul(lhs, rhs, sizes, implementation="mosaic_tpu")

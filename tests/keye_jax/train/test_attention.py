"""Attention and the indexer with their gradients, against the formulas on whole matrices in float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.train import attention
from keye_jax.train.attention import AttentionPlan, IndexerMeasures, KeysAndValues, Queries
from keye_jax.train.forward import fused_attention
from keye_jax.train.selection import mask_by_counting, mask_by_sorting

HEADS, KV_HEADS, DIM, INDEX_HEADS, INDEX_DIM = 4, 2, 8, 3, 4
TOP_K = 24
LENGTHS = (200, 40, 128)
ROW = 64
PLAN = AttentionPlan(
    sparse=True,
    kl=True,
    recall=True,
    top_k=TOP_K,
    scale=DIM**-0.5,
    index_scale=INDEX_DIM**-0.5,
    width=None,
    block_bytes=2**30,
)
CASES = {
    "sparse": PLAN,
    "sparse, no KL": dataclasses.replace(PLAN, kl=False),
    "dense": dataclasses.replace(PLAN, sparse=False),
    "dense, no recall": dataclasses.replace(PLAN, sparse=False, recall=False),
    "dense, no KL": dataclasses.replace(PLAN, sparse=False, kl=False),
}
KERNELS = {"kernels": dataclasses.replace(PLAN, kl=False, kernels="xla")}
"""In float32, which is the widest that the operations take. Ties decide the selection in either, since scores are
small whole numbers."""
attend: Any = attention.attend  # no type checker sees through custom_vjp

SMALL_BLOCKS = 4 * (HEADS + INDEX_HEADS) * 256 * 16
"""Bytes of blocks of at most 16 queries."""

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sample(length: int, seed: int, *, tied: bool = True) -> tuple[Queries, KeysAndValues]:
    """Queries and keys of one sample, without the dimension of rows.

    Args:
      tied: whether the indexer's are small whole numbers, so that many scores are equal, and all are exact.
    """
    rng = np.random.default_rng(seed)

    def of_indexer(*shape: int) -> np.ndarray:
        return rng.integers(-2, 3, shape).astype(np.float64) if tied else rng.normal(size=shape)

    index = [of_indexer(length, *shape) for shape in ((INDEX_HEADS, INDEX_DIM), (INDEX_HEADS,), (INDEX_DIM,))]
    q, k, v = (rng.normal(size=(length, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    arrays: list[Any] = [q, *index[:2], k, v, index[2]]
    return Queries(*arrays[:3]), KeysAndValues(*arrays[3:])


def reference(plan: AttentionPlan, queries: Queries, keys: KeysAndValues) -> tuple[jax.Array, IndexerMeasures]:
    """What a sample gives by the formulas: whole matrices, selection by sorting, gradients by JAX."""
    length = len(queries.q)
    z = jnp.einsum("tnd,sd->tns", queries.index_q, keys.index_keys)
    scores = plan.index_scale * jnp.einsum("tns,tn->ts", jax.nn.relu(z), queries.gates)
    visible = np.tril(np.ones((length, length), bool))
    order = jnp.argsort(-jnp.where(visible, scores, -jnp.inf), axis=-1, stable=True)
    chosen = visible & (jnp.argsort(order, axis=-1) < plan.top_k)
    mask = chosen if plan.sparse else visible
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (keys.k, keys.v))
    dots = jnp.einsum("tnd,snd->nts", queries.q, k) * plan.scale
    attention = jax.nn.softmax(jnp.where(mask, dots, -jnp.inf), axis=-1)
    out = jnp.einsum("nts,snd->tnd", attention, v)
    if not plan.kl:
        return out, IndexerMeasures(*[jnp.zeros(length)] * 3)
    teacher = jax.lax.stop_gradient(attention.reshape(KV_HEADS, -1, length, length).mean(1))
    log_q = jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), 0.0)
    log_p = jnp.where(mask, jnp.log(jnp.maximum(teacher, 1e-300)), 0.0)
    dense = jax.nn.softmax(jnp.where(visible, dots, -jnp.inf), axis=-1)
    recall = jnp.where(chosen, dense, 0).sum(-1).reshape(KV_HEADS, -1, length).mean(1).sum(0) * plan.recall
    measures = IndexerMeasures((teacher * (log_p - log_q)).sum((0, 2)), -(teacher * log_p).sum((0, 2)), recall)
    return out, measures


def weights(length: int, seed: int) -> tuple[Any, Any]:
    """What each output, and each query's KL divergence, counts in the loss that is differentiated."""
    rng = np.random.default_rng(100 + seed)
    return rng.normal(size=(length, HEADS, DIM)), rng.normal(size=length)


def loss_of(out: jax.Array, measures: IndexerMeasures, out_weights: Any, kl_weights: Any) -> jax.Array:
    return jnp.sum(out * out_weights) + jnp.sum(measures.kl * kl_weights)


@functools.cache
def expected(case: str, number: int) -> tuple[Any, Any]:
    """Results and gradients of a sample by the formulas."""

    def run(queries: Queries, keys: KeysAndValues) -> tuple[jax.Array, Any]:
        results = reference((CASES | KERNELS)[case], queries, keys)
        return loss_of(*results, *weights(LENGTHS[number], number)), results

    gradients, results = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(*sample(LENGTHS[number], number))
    return results, gradients


def check(case: str, number: int, results: Any, gradients: Any) -> None:
    for got, wanted in zip(jax.tree.leaves((results, gradients)), jax.tree.leaves(expected(case, number)), strict=True):
        relative, absolute = (1e-4, 1e-4) if case in KERNELS else (1e-8, 1e-10)
        np.testing.assert_allclose(got, wanted, rtol=relative, atol=absolute)


def narrowed(case: str, arrays: Any) -> Any:
    """Arrays in the dtype that a case takes."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays) if case in KERNELS else arrays


@pytest.mark.parametrize(
    ("case", "block_bytes"),
    [*((case, 2**30) for case in CASES | KERNELS), ("sparse", SMALL_BLOCKS), ("kernels", SMALL_BLOCKS)],
)
def test_rows_that_are_samples(case: str, block_bytes: int):
    """Of 256 tokens, behind a sample's own some that count for nothing."""
    plan, length = dataclasses.replace((CASES | KERNELS)[case], block_bytes=block_bytes), 256
    padded = [
        jax.tree.map(lambda x: np.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1)), mode="wrap"), each)
        for each in (sample(LENGTHS[number], number) for number in range(len(LENGTHS)))
    ]
    counted = [
        [np.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1))) for x in weights(LENGTHS[number], number)]
        for number in range(len(LENGTHS))
    ]
    stacked: Any = [jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (padded, counted)]
    (queries, keys), (out_weights, kl_weights) = narrowed(case, stacked)
    nowhere = jnp.zeros(len(LENGTHS), jnp.int32)

    def run(queries: Queries, keys: KeysAndValues) -> tuple[jax.Array, Any]:
        out, measures = attend(plan, queries, keys, nowhere, nowhere)
        return loss_of(out, measures, out_weights, kl_weights), (out, measures)

    gradients, results = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(queries, keys)
    for number, own in enumerate(LENGTHS):
        check(case, number, *jax.tree.map(lambda x, i=number, n=own: x[i, :n], (results, gradients)))


@pytest.mark.parametrize("case", ["sparse", "dense", "dense, no KL", "fused"])
def test_branches_of_a_row_are_samples_that_share_their_beginning(case: str):
    """A beginning of 96 tokens and two branches of 64, against both samples whole; the beginning counts once."""
    begin, length = 96, 64
    whole = [sample(begin + length, number, tied=False) for number in range(2)]
    shared = jax.tree.map(lambda x: x[:begin], whole[0])
    samples: Any = [
        jax.tree.map(lambda one, x: jnp.asarray(np.concatenate([one, x[begin:]]))[None], shared, each) for each in whole
    ]
    joined: Any = jax.tree.map(lambda *x: jnp.concatenate([x[0], x[1][:, begin:]], axis=1), *samples)
    counts = [np.ones(begin + length) for _ in whole]
    counts[1][:begin] = 0
    nowhere, branch = jnp.zeros(1, jnp.int32), jnp.asarray(np.repeat([0, 1, 2], [begin, length, length]))[None]

    def run(queries: Queries, keys: KeysAndValues, branch: jax.Array | None) -> Any:
        if case == "fused":
            return fused_attention(queries.q, keys.k, keys.v, branch, DIM**-0.5, "xla"), jnp.zeros(queries.q.shape[:2])
        out, measures = attend(CASES[case], queries, keys, nowhere, nowhere, branch)
        return out, measures.kl

    def loss(arguments: Any, branch: jax.Array | None, count: Any) -> jax.Array:
        queries, keys = arguments
        out, kl = run(queries, keys, branch)
        return jnp.sum(jnp.sin(out) * count[:, None, None]) + jnp.sum(kl * count)

    def plain(arguments: Any, count: Any) -> jax.Array:
        if case != "fused":
            return loss(arguments, None, count)
        queries, keys = arguments
        out, _ = attend(CASES["dense, no KL"], queries, keys, nowhere, nowhere)
        return jnp.sum(jnp.sin(out) * count[:, None, None])

    gradients = jax.jit(jax.grad(loss))(joined, branch, np.ones(begin + 2 * length))
    of_samples = [jax.jit(jax.grad(plain))(each, count) for each, count in zip(samples, counts, strict=True)]
    expected = jax.tree.map(
        lambda one, two: jnp.concatenate([one[:, :begin] + two[:, :begin], one[:, begin:], two[:, begin:]], axis=1),
        *of_samples,
    )
    for found, wanted in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        # The library's attention sums in float32.
        np.testing.assert_allclose(found, wanted, atol=1e-4 if case == "fused" else 1e-10)


@pytest.mark.parametrize("case", CASES | KERNELS)
def test_samples_of_several_rows(case: str):
    """Rows of 64 tokens; between the samples lies what counts for nothing, behind them an idle row."""
    plan = dataclasses.replace((CASES | KERNELS)[case], width=256, block_bytes=SMALL_BLOCKS)
    parts, counted, start, first, begins, rows = [], [], [], [], [], 0
    for number, length in enumerate(LENGTHS):
        count = -(-length // ROW)
        begins.append(rows * ROW)
        start += [row * ROW for row in range(count)]
        first += [rows * ROW] * count
        rows += count
        for into, values in ((parts, sample(length, number)), (counted, weights(length, number))):
            into.append(
                jax.tree.map(lambda x, n=count * ROW: np.pad(x, ((0, n - len(x)), *((0, 0),) * (x.ndim - 1))), values)
            )
    queries, keys = jax.tree.map(lambda *x: np.pad(np.concatenate(x), ((0, ROW), *((0, 0),) * (x[0].ndim - 1))), *parts)
    counted = jax.tree.map(lambda *x: np.pad(np.concatenate(x), ((0, ROW), *((0, 0),) * (x[0].ndim - 1))), *counted)
    by_row = [
        jax.tree.map(lambda x: jnp.asarray(x.reshape(rows + 1, ROW, *x.shape[1:])), x) for x in (queries, counted)
    ]
    keys = jax.tree.map(lambda x: jnp.asarray(x)[None], keys)
    keys, by_row = narrowed(case, (keys, by_row))

    def run(queries: Queries, keys: KeysAndValues) -> tuple[jax.Array, Any]:
        results: Any = attend(plan, queries, keys, jnp.asarray([*start, 0]), jnp.asarray([*first, 0]))
        return loss_of(*results, *by_row[1]), results

    (of_queries, of_keys), results = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(by_row[0], keys)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (results, of_queries, of_keys))
    for number, (begin, length) in enumerate(zip(begins, LENGTHS, strict=True)):
        own, of_queries, of_keys = jax.tree.map(lambda x, i=begin, n=length: x[i : i + n], flat)
        check(case, number, own, (of_queries, of_keys))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_differences(case: str):
    """Along random directions of each argument, in steps that change no selection."""
    arguments = jax.tree.map(lambda x: jnp.asarray(x)[None], sample(LENGTHS[2], 2, tied=False))
    nowhere, counts = jnp.zeros(1, jnp.int32), weights(LENGTHS[2], 2)

    @jax.jit
    def loss(arguments: Any, teachers: Any) -> jax.Array:
        """The teacher is no variable: of `arguments` the KL divergence takes those of the indexer alone."""
        out, _ = attend(CASES[case], *arguments, nowhere, nowhere)
        queries = arguments[0]._replace(q=teachers[0].q)
        keys = teachers[1]._replace(index_keys=arguments[1].index_keys)
        return loss_of(out, attend(CASES[case], queries, keys, nowhere, nowhere)[1], *counts)

    def whole(arguments: Any) -> jax.Array:
        out, measures = attend(CASES[case], *arguments, nowhere, nowhere)
        return loss_of(out, measures, *counts)

    gradients = jax.jit(jax.grad(whole))(arguments)
    rng, size = np.random.default_rng(1), 1e-6
    leaves, tree = jax.tree.flatten(arguments)
    for index, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = rng.normal(size=leaves[index].shape)
        ends = [[*leaves[:index], leaves[index] + by * direction, *leaves[index + 1 :]] for by in (size, -size)]
        above, below = (loss(jax.tree.unflatten(tree, end), arguments) for end in ends)
        np.testing.assert_allclose(np.sum(gradient * direction), (above - below) / (2 * size), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 31])
def test_selection_by_counting_is_that_by_sorting(k: int):
    """Of normal scores, of few values, and of rows that see less than k."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=(7, 70)), rng.integers(-2, 3, (9, 70))])
    scores = jnp.asarray(np.where(np.arange(70) < rng.integers(1, 71, 16)[:, None], scores, -np.inf), jnp.float32)
    found = [jax.jit(way, static_argnums=1)(scores, k) for way in (mask_by_counting, mask_by_sorting)]
    seen = scores > -jnp.inf
    np.testing.assert_array_equal(found[0] & seen, found[1] & seen)
    np.testing.assert_array_equal((found[0] & seen).sum(-1), np.minimum(k, seen.sum(-1)))

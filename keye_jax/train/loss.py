"""Cross-entropy over a vocabulary whose logits are never all there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.sharding.collectives import without
from keye_jax.sharding.step import StepSharding
from keye_jax.train.blocks import equal_blocks, scan, wide


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, step: StepSharding, chunk_bytes: int
) -> tuple[jax.Array, jax.Array]:
    """The sum of the negative log-likelihoods of targets, and how many of them have the largest logit.

    Memory: the logits of a chunk of tokens, and the log-sum-exps of all. Sums are float32, and so is that of the
    chunks' gradients of `head`.

    Args:
      hidden: `[rows, t, embed]`, after the final norm.
      head: `[vocab, embed]`.
      targets: int32 `[rows, t]`, -1 for tokens without one.
      chunk_bytes: most bytes of a chunk's float32 logits on a device; a chunk has at least one token of each row.

    Returns:
      float32 `[]` and int32 `[]`.
    """
    return _forward(hidden, head, targets, step, chunk_bytes)[0]


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, step: StepSharding, chunk_bytes: int
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    def run(sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]) -> Any:
        hidden, targets = chunk
        logits = _logits(hidden, head, step)
        lse = jax.nn.logsumexp(logits, axis=-1)
        wanted = targets[..., None] == jnp.arange(head.shape[0])
        target = jnp.sum(jnp.where(wanted, logits, 0), axis=-1)
        valid = targets >= 0
        loss = jnp.sum(jnp.where(valid, lse - target, 0))
        correct = jnp.sum(valid & (jnp.argmax(logits, axis=-1) == targets), dtype=jnp.int32)
        return (sums[0] + loss, sums[1] + correct), lse

    chunks = _chunks(hidden, head, step, chunk_bytes)
    zero = (jnp.zeros((), wide(hidden)), jnp.int32(0))
    sums, lse = scan(run, zero, (_split(hidden, chunks), _split(targets, chunks)))
    return sums, (hidden, head, targets, lse)


def _backward(step: StepSharding, chunk_bytes: int, saved: Any, cotangents: tuple[jax.Array, Any]) -> tuple:
    hidden, head, targets, lse = saved
    d_loss = cotangents[0]

    def run(d_head: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, lse = chunk
        probabilities = jnp.exp(_logits(hidden, head, step) - lse[..., None])
        wanted = targets[..., None] == jnp.arange(head.shape[0])
        d_logits = jnp.where((targets >= 0)[..., None], (probabilities - wanted) * d_loss, 0).astype(hidden.dtype)
        d_hidden = jnp.einsum("rtv,ve->rte", d_logits, head, preferred_element_type=wide(hidden))
        d_head += jnp.einsum("rtv,rte->ve", d_logits, hidden, preferred_element_type=wide(hidden))
        return d_head, step.constrain(d_hidden.astype(hidden.dtype), step.rows)

    chunks = _chunks(hidden, head, step, chunk_bytes)
    items = (_split(hidden, chunks), _split(targets, chunks), lse)
    d_head, d_hidden = scan(run, jnp.zeros(head.shape, wide(hidden)), items)
    return jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape), d_head.astype(head.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, head: jax.Array, step: StepSharding) -> jax.Array:
    """float32 `[rows, t, vocab]`."""
    logits = jnp.einsum("rte,ve->rtv", hidden, head, preferred_element_type=wide(hidden))
    return step.constrain(logits, step.rows, (), without(step.vocab, step.rows))


def _chunks(hidden: jax.Array, head: jax.Array, step: StepSharding, chunk_bytes: int) -> int:
    """Into how many equal chunks each row is split."""
    rows, tokens = hidden.shape[0] // step.size(step.rows), hidden.shape[1]
    return equal_blocks(tokens, chunk_bytes // (4 * rows * head.shape[0]))


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """`[rows, t, ...]` to `[chunks, rows, t / chunks, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

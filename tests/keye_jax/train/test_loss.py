"""Cross-entropy in chunks against that of all logits, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.loss import cross_entropy

ROWS, TOKENS, EMBED, VOCAB = 2, 12, 5, 30
STEP = StepSharding.prefill(MeshRules.single_device())


@pytest.mark.parametrize("chunk", [TOKENS, 4, 1])
def test_chunks(chunk: int):
    """Of all tokens, of some, and of one of each row."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        hidden, head = jnp.asarray(rng.normal(size=(ROWS, TOKENS, EMBED))), jnp.asarray(rng.normal(size=(VOCAB, EMBED)))
        targets = np.where(rng.random((ROWS, TOKENS)) < 0.5, rng.integers(0, VOCAB, (ROWS, TOKENS)), -1)

        def whole(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_p = jax.nn.log_softmax(hidden @ head.T, axis=-1)
            wanted = jnp.take_along_axis(log_p, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
            return -jnp.sum(jnp.where(targets >= 0, wanted, 0)), jnp.sum(log_p.argmax(-1) == targets)

        def chunked(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            targets32 = jnp.asarray(targets, jnp.int32)
            return cross_entropy(hidden, head, targets32, STEP, 4 * ROWS * VOCAB * chunk)

        got, wanted = (
            jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(hidden, head) for run in (chunked, whole)
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
        size, direction = 1e-6, rng.normal(size=(VOCAB, EMBED))
        difference = (whole(hidden, head + size * direction)[0] - whole(hidden, head - size * direction)[0]) / size / 2
        np.testing.assert_allclose(jnp.sum(got[1][1] * direction), difference, rtol=1e-6)

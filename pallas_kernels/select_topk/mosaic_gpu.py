"""Exact selection on Hopper GPUs (Pallas Mosaic GPU): the positions of the highest scores of each row."""

import jax
import jax.numpy as jnp

from pallas_kernels.select_topk.thresholds import check_scores, select_threshold
from pallas_kernels.select_topk.unions import union_body, union_cluster
from pallas_kernels.simt import launch


def select_topk(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """Positions of the `k` highest scores among the first `lengths` of each row; all of them when there are fewer.

    Exact and deterministic: of equal scores (0.0 equals -0.0) the lower position wins.

    Args:
      scores: float32 `[..., s]`.
      lengths: int32 `[...]`, from 0 to s.
      k: how many to select.

    Returns:
      int32 `[..., k]` positions in ascending order, then -1 where a row has fewer than k.
    """
    check_scores(scores)
    size = scores.shape[-1]
    rows, flat = scores.reshape(-1, size), lengths.reshape(-1)
    threshold, last_tie = select_threshold(rows, flat, k)
    threads = 512
    cluster, words = union_cluster(len(rows), 1, size, None, threads)

    def body(machine, scores, thresholds, last_ties, lengths, positions, index, rank):
        union_body(
            machine,
            scores,
            thresholds,
            last_ties,
            lengths,
            positions,
            None,
            None,
            index,
            rank,
            rows=len(rows),
            size=size,
            group=1,
            limit=k,
        )

    out_type = jax.ShapeDtypeStruct((len(rows), k), jnp.int32)
    positions = launch(body, out_type, len(rows), cluster, threads, words)(rows, threshold, last_tie, flat)
    return positions.reshape(*lengths.shape, k)

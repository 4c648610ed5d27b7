"""Time of a chunk of prefill on a TPU, from the TPU compiler's estimates of its kernels.

The figures are those of the tables in docs/tpu.md, which say how they were made. No TPU has confirmed them.
"""

from __future__ import annotations

import dataclasses

from keye_jax.config import KeyeConfig
from pallas_kernels.shapes import KEYE_VL_2

UNION = 2**15
"""Positions that 256 neighbouring queries are assumed to select together at most.

Measured in 16 layers of random weights: 18,643 at 32K and 41,215 at 128K, in the mean (docs/tpu.md).
"""

_QUERIES, _POSITIONS, _ENTRIES = 2048, 2**17, 2**14


@dataclasses.dataclass(frozen=True)
class KernelTimes:
    """Milliseconds of one device, for 2,048 queries of one layer.

    Attributes:
      scores: `indexer_scores` of 128K positions, bfloat16.
      unions: `select_unions` of 128K positions.
      attention: `union_attention` to unions of 16K.
      pages: `union_attention` to whole pages of 128K positions.
    """

    scores: float
    unions: float
    attention: float
    pages: float


KERNELS = {
    "v5e": KernelTimes(6.58, 4.30, 3.42, 26.1),
    "v5p": KernelTimes(2.64, 1.93, 1.43, 11.1),
    "v6e": KernelTimes(3.00, 3.86, 1.65, 11.7),
    "tpu7x": KernelTimes(2.27, 2.88, 1.31, 9.29),
}


def kernels_were_estimated(config: KeyeConfig) -> bool:
    """Whether attention and its indexer have the sizes that were estimated, those of the released model."""
    sa, model = config.sa_config, KEYE_VL_2
    attention = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    indexer = sa.indexer_num_heads, sa.indexer_head_dim, sa.topk
    return (*attention, *indexer) == (
        *(model.heads, model.kv_heads, model.head_dim),
        *(model.index_heads, model.index_dim, model.top_k),
    )


def kernel_seconds(generation: str, queries: float, context: int) -> float:
    """Seconds of one layer's scores, selection and attention on one device.

    Args:
      generation: a key of `KERNELS`.
      queries: of the device, the last ones of the context.
      context: positions.
    """
    times = KERNELS[generation]
    # A block of queries reads whole pages where its union is more than seven eighths of them.
    few = min(context, UNION) * 8 <= context * 7
    attention = times.attention * UNION / _ENTRIES if few else times.pages * context / _POSITIONS
    return ((times.scores + times.unions) * context / _POSITIONS + attention) * queries / _QUERIES * 1e-3

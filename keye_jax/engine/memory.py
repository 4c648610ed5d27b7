"""How many tokens the page pool of an engine can hold."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils

from keye_jax.errors import UserError
from keye_jax.page_allocator import PAGE_SIZE, pages_for
from keye_jax.runtime.decode import idle_row
from keye_jax.runtime.device import memory_in_use_bytes, memory_limit_bytes
from keye_jax.runtime.encode import ENCODE_PATCHES
from keye_jax.runtime.memory import (
    decode_workspace_bytes,
    encode_workspace_bytes,
    prefill_workspace_bytes,
    shard_bytes,
    weight_bytes,
)
from keye_jax.runtime.runtime import PAGES_AT_ONCE, Runtime

MARGIN = 0.03
"""Share of a device's memory that is left free beside what is computed, which has estimates in it."""

CPU_TOKENS, _CPU_SHARE = 65536, 0.25
"""Most tokens on a CPU, and the share of its memory for them: the machine has other things to do."""

_GRAIN = 64
"""A pool that is chosen has a multiple of so many pages on each shard: a byte more or less makes no other programs."""

_MIB = 1 << 20


def pages_per_shard(
    runtime: Runtime,
    cache_tokens: int | None,
    *,
    rows: int,
    max_context: int,
    large: int,
    most_patches: int,
    optimistic: bool,
    heat: bool = False,
) -> int:
    """Pages on each shard of the page pool.

    Without `cache_tokens` they are as many as fit beside the weights and what the steps need (the estimates of
    `keye_jax.runtime.memory`), with `MARGIN` of the device's memory left free; at most those of `rows` sequences of
    `max_context` tokens, and on a CPU `CPU_TOKENS`. All processes of a job have the same number: that of the device
    with the least room.

    Args:
      cache_tokens: wanted tokens of all sequences together, or None.
      rows: sequences that are decoded together.
      max_context: most tokens of a sequence.
      large: tokens of a large chunk, on all devices together.
      most_patches: of the largest image.
      optimistic: whether pages are moved to host memory and back.
      heat: whether rows count what they select.

    Raises:
      UserError: so many tokens, or the weights, leave no room. Nothing is allocated before.
    """
    rules = runtime.rules
    shards = rules.size("batch") * runtime.page_multiple
    config = dataclasses.replace(runtime.config, dtype=np.dtype(runtime.dtype).name)
    dtypes = {"indexer_dtype": runtime.options.indexer_dtype, "cache_dtype": runtime.options.cache_dtype}
    page = shard_bytes(config, 1, rules, dtype=runtime.dtype, **dtypes)
    width = pages_for(max_context)
    row = idle_row(width, config.vocab_size, width * PAGE_SIZE if heat else 0)
    devices = runtime.prefill_step.size(runtime.prefill_step.query_sequence)
    steps = rows * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(row)) + max(
        prefill_workspace_bytes(
            *(config, rules, large // devices, max_context),
            implementation=runtime.options.kernels,
            activation_dtype=runtime.options.activation_dtype,
            **dtypes,
        ),
        decode_workspace_bytes(config, rules, rows, max_context),
        encode_workspace_bytes(config, max(most_patches, ENCODE_PATCHES)),
        # What is on its way to the host or back is there twice.
        2 * PAGES_AT_ONCE * page if optimistic else 0,
    )
    limit, weights = memory_limit_bytes(), max(weight_bytes(config, rules), memory_in_use_bytes())
    here = (limit - weights - steps) // _MIB
    # A model without a mesh is this process's own, whatever others run.
    everywhere = here if rules.sharding() is None else multihost_utils.process_allgather(np.asarray(here, np.int32))
    room = int(np.min(everywhere)) * _MIB
    taken = f"{weights / 2**30:.2f} GiB of weights and {steps / 2**30:.2f} GiB for the steps; a device has "
    taken += f"{limit / 2**30:.2f} GiB"
    if cache_tokens is not None:
        wanted = -(-pages_for(cache_tokens) // shards)
        if wanted * page > room:
            most = max(0, room // page) * shards * PAGE_SIZE
            raise UserError(f"cache_tokens is {cache_tokens:,}; at most {most:,} tokens fit beside {taken}")
        return wanted
    most = rows * pages_for(max_context)
    spare = room - MARGIN * limit
    if rules.platform == "cpu":
        most, spare = min(most, pages_for(CPU_TOKENS)), min(spare, _CPU_SHARE * limit)
    fitting = int(spare // page) // _GRAIN * _GRAIN
    if fitting < 1:
        raise UserError(f"the model leaves no room for its cache: {taken}")
    return min(-(-most // shards), fitting)

"""Whether a context fits, known before a weight is loaded."""

from __future__ import annotations

from keye_jax.config import KeyeConfig
from keye_jax.engine.request import DEFAULT_NEW_TOKENS
from keye_jax.errors import UserError
from keye_jax.runtime.memory import pool_bytes, weight_bytes
from keye_jax.sharding import MeshRules


def new_token_limit(
    config: KeyeConfig,
    prompt_tokens: int,
    asked: int | None,
    *,
    dtype: str,
    indexer_dtype: str | None = None,
    cache_dtype: str | None = None,
    memory_limit: int,
    rules: MeshRules,
) -> int:
    """How many tokens may be generated; refuses a context that does not fit.

    Args:
      prompt_tokens: length of the prompt.
      asked: wanted limit, or None for up to `DEFAULT_NEW_TOKENS`.
      dtype: of the parameters and the cache.
      indexer_dtype: of the cache's index keys, if not `dtype`.
      cache_dtype: of its keys and values, if not `dtype`.
      memory_limit: bytes the device has, or each of several.
      rules: how the model lies over devices.

    Raises:
      UserError: the context exceeds the model's positions or the device's memory; the message has the numbers.
    """
    if asked is not None and asked < 1:
        raise UserError(f"max_new_tokens is {asked}; it must be at least 1")
    limit = config.max_position_embeddings
    wanted = asked or max(1, min(DEFAULT_NEW_TOKENS, limit - prompt_tokens))
    if prompt_tokens + wanted > limit:
        raise UserError(
            f"the context does not fit: {prompt_tokens:,} prompt tokens and {wanted:,} new ones are "
            f"{prompt_tokens + wanted:,}; this model takes at most {limit:,}"
        )
    weights = weight_bytes(config, rules, dtype=dtype)
    dtypes = {"dtype": dtype, "indexer_dtype": indexer_dtype, "cache_dtype": cache_dtype}
    cache = pool_bytes(config, 1, prompt_tokens + wanted, rules, **dtypes)
    if weights + cache > memory_limit:
        gib, each = 2**30, f" on each of {rules.devices} devices" if rules.devices > 1 else ""
        raise UserError(
            f"the context does not fit: {weights / gib:.2f} GiB of weights and {cache / gib:.2f} GiB of cache{each} "
            f"for {prompt_tokens + wanted:,} tokens; the device has {memory_limit / gib:.2f} GiB"
        )
    return wanted

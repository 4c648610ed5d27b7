"""What the kernels for TPUs share: sizes, masks and what attention kernels refuse."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Elements of a vector register's last axis."""

MASKED = -1e30
"""Added to the logits of masked keys. It is finite because -inf would give NaN in rows that see no key."""

_INTERPRETED_VMEM_BYTES = 64 * 2**20


def result_like(x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """A kernel's result that varies over the mesh axes over which x varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may take: three quarters of a core's.

    The core is that of the current mesh's device, else that of the default device. The compiler needs the last quarter
    for what XLA keeps there. Without a TPU the kernel is interpreted, and the number has no effect.
    """
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = _INTERPRETED_VMEM_BYTES
    return capacity * 3 // 4


def check_attention(q: jax.Array, kv: jax.Array) -> None:
    """Refuses what no attention kernel for TPUs takes.

    Args:
      q: `[..., d]` queries.
      kv: `[p, page_size, 2 * k, d]` pages of keys and values.

    Raises:
      NotImplementedError: dtypes or sizes that the kernels do not take.
    """
    if q.dtype != kv.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries {q.dtype} and keys {kv.dtype}: both must be bfloat16 or both float32")
    if jax.default_backend() == "tpu" and (q.shape[-1] % LANES or kv.shape[1] % 8):
        raise NotImplementedError(
            f"keys and values {kv.shape[1:]} of a page: a TPU copies a multiple of 8 rows of a multiple of 128 elements"
        )


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of a kernel's matrix products: float32 stays float32; products of bfloat16 are exact anyway."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT

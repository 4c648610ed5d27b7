"""What the kernels for TPUs ask of their target."""

from jax.experimental.pallas import tpu as pltpu

_INTERPRETED_VMEM_BYTES = 64 * 2**20


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may take: three quarters of a core's, of the mesh's device or else the default one.

    The compiler needs the rest for what XLA keeps there. Where there is no TPU the kernel is interpreted, and any
    number will do.
    """
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = _INTERPRETED_VMEM_BYTES
    return capacity * 3 // 4

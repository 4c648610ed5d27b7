"""Where portable implementations differ between platforms.

A GPU waits for the host before every turn of a loop whose end the device decides, and is idle with little work a turn.
So on GPUs loops have a known number of turns and a large workspace, even if some turns then compute nothing that
anybody reads. Other platforms stop early, and keep a small workspace in their caches.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.meshes import vary_like


def on_gpus(gpu: Callable[..., Any], elsewhere: Callable[..., Any], *arrays: Any) -> Any:
    """`gpu(*arrays)` in a program for GPUs of any maker, `elsewhere(*arrays)` in others.

    Args:
      gpu, elsewhere: functions of the arrays, with results of the same shapes and dtypes.
      arrays: trees of arrays; all vary over the same mesh axes.
    """
    return _by_platform({"cuda": gpu, "rocm": gpu}, elsewhere, arrays)


def on_tpus(tpu: Callable[..., Any], elsewhere: Callable[..., Any], *arrays: Any) -> Any:
    """`tpu(*arrays)` in a program for TPUs, `elsewhere(*arrays)` in others; as `on_gpus`."""
    return _by_platform({"tpu": tpu}, elsewhere, arrays)


def _by_platform(functions: dict[str, Callable[..., Any]], elsewhere: Callable[..., Any], arrays: Any) -> Any:
    leaves = jax.tree.leaves(arrays)

    def varying(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: vary_like(function(*arrays), *leaves)

    branches = {platform: varying(function) for platform, function in functions.items()}
    return jax.lax.platform_dependent(*arrays, **branches, default=varying(elsewhere))

"""What fewer bits cost, on a checkpoint with recorded arrays: `python -m keye_jax.eval.quantization CHECKPOINT...`.

Each checkpoint directory has `golden.npz` beside it, as docs/correctness.md describes. Prints a table of how far the
model agrees with the arrays: with all bits in float32 and in bfloat16, and in float32 with each format of the experts,
and of attention too. Weights of fewer bits are replaced by the numbers they stand for, so one program serves all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import load_params, mapping
from convert.detect import read_config
from keye_jax.config import KeyeConfig
from keye_jax.eval.parity import Agreement, agreement
from keye_jax.model.keye import Keye
from keye_jax.quantization.quantize import quantize
from keye_jax.quantization.schemes import FORMATS, Quantization, standard
from keye_jax.runtime.compilation_cache import enable_compilation_cache
from keye_jax.runtime.runtime import Runtime

SCHEMES: Mapping[str, Quantization] = {
    "all bits": Quantization(),
    **{f"experts {each}": Quantization(standard(each)) for each in FORMATS},
    "experts and attention fp8": Quantization(standard("fp8"), standard("fp8")),
    "experts and attention int8": Quantization(standard("int8"), standard("int8")),
    "experts int4, attention int8": Quantization(standard("int4"), standard("int8")),
}


def measure(checkpoint: Path, quantization: Quantization, dtype: str = "float32") -> Agreement:
    """How far a checkpoint agrees with its arrays, computed in `dtype` with weights of fewer bits.

    Raises:
      UserError: the checkpoint is not whole.
    """
    with np.load(checkpoint / "golden.npz", allow_pickle=False) as file:
        golden = dict(file)
    config = read_config(checkpoint)
    params = load_params(checkpoint, config, dtype=dtype)
    replace_weights(params, config, quantization)
    # Without this, accelerators multiply float32 matrices in lower precision.
    with jax.default_matmul_precision("highest"):
        return agreement(Runtime(Keye.from_params(config, params), config), golden)


def replace_weights(params: dict[str, Any], config: KeyeConfig, quantization: Quantization) -> None:
    """Replaces weights in nested `params` by what stands for them in fewer bits, in their dtype."""
    for tensor in mapping.rows(config):
        scheme = quantization.of(tensor.path)
        if scheme is None:
            continue
        owner = params
        for key in tensor.path[:-1]:
            owner = owner[key]
        values = np.asarray(owner[tensor.path[-1]])
        is_expert = tensor.part == "experts"
        # Inputs first, as experts have them.
        matrices = values if is_expert else values.reshape(tensor.checkpoint_shape).T[None]
        made = [quantize(each, scheme, parts=mapping.parts_of(tensor)).numbers(values.dtype) for each in matrices]
        owner[tensor.path[-1]] = jnp.asarray(np.stack(made) if is_expert else made[0].T.reshape(values.shape))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What fewer bits cost, on checkpoints with recorded arrays.")
    parser.add_argument("checkpoints", nargs="+", type=Path, help="directories with golden.npz beside the weights")
    arguments = parser.parse_args()
    enable_compilation_cache()
    print("| checkpoint | weights | logits' error | greedy | experts | selected |")
    print("|---|---|---|---|---|---|")
    for checkpoint in arguments.checkpoints:
        cases = [("bfloat16", Quantization(), "bfloat16"), *((name, each, "float32") for name, each in SCHEMES.items())]
        for name, quantization, dtype in cases:
            found = measure(checkpoint, quantization, dtype)
            shares = " | ".join(f"{share:.1%}" for share in (found.greedy, found.experts, found.selected))
            print(f"| {checkpoint.name} | {name} | {found.logits:.4f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()

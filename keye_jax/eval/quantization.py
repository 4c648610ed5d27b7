"""What fewer bits cost, on a checkpoint with recorded arrays: `python -m keye_jax.eval.quantization CHECKPOINT...`.

Each checkpoint directory has `golden.npz` beside it, as docs/correctness.md describes. Prints a table of how far the
model agrees with the arrays: with all bits in float32 and in bfloat16, and in float32 with each format of the experts,
of attention too, of the cache, and of what experts multiply. Weights of fewer bits are replaced by the numbers they
stand for, so one program serves all but the last. Behind it is what an fp8 cache alone does to the outputs of
attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import load_params, mapping
from convert.detect import read_config
from convert.quantize import quantize_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.eval.parity import Agreement, agreement
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.keye import Keye
from keye_jax.quantization.quantize import quantize
from keye_jax.quantization.schemes import FORMATS, Quantization, standard
from keye_jax.runtime.compilation_cache import enable_compilation_cache
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.runtime import Runtime
from pallas_kernels.sparse_attention import sparse_attention

SCHEMES: Mapping[str, Quantization] = {
    "all bits": Quantization(),
    **{f"experts {each}": Quantization(standard(each)) for each in FORMATS},
    "experts and attention fp8": Quantization(standard("fp8"), standard("fp8")),
    "experts and attention int8": Quantization(standard("int8"), standard("int8")),
    "experts int4, attention int8": Quantization(standard("int4"), standard("int8")),
}

_ALL_BITS, _EXACT = Quantization(), AttentionOptions()
_FLOAT8_CACHE = AttentionOptions(cache_dtype="float8_e4m3fn")
_FLOAT8_ACTIVATIONS = AttentionOptions(activation_dtype="float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: weights, the dtype of what is computed, and how it is."""

    quantization: Quantization = _ALL_BITS
    dtype: str = "float32"
    options: AttentionOptions = _EXACT


CASES: Mapping[str, Case] = {
    "bfloat16": Case(dtype="bfloat16"),
    **{name: Case(each) for name, each in SCHEMES.items()},
    "cache fp8": Case(options=_FLOAT8_CACHE),
    "experts int4, cache fp8": Case(SCHEMES["experts int4"], options=_FLOAT8_CACHE),
    "experts and activations fp8": Case(SCHEMES["experts fp8"], options=_FLOAT8_ACTIVATIONS),
}


def measure(checkpoint: Path, case: Case) -> Agreement:
    """How far a checkpoint agrees with its arrays.

    Raises:
      UserError: the checkpoint is not whole.
    """
    # Without this, accelerators multiply float32 matrices in lower precision.
    with jax.default_matmul_precision("highest"):
        return agreement(_runtime(checkpoint, case), _arrays(checkpoint))


def attention_error(checkpoint: Path) -> float:
    """What an fp8 cache does to attention: `|difference| / |outputs|`, root mean squares of all layers' outputs.

    Queries, keys, values and selected positions are those of the recorded text, computed in float32 with all bits.
    """
    runtime, ids = _runtime(checkpoint, Case()), _arrays(checkpoint)["text_ids"]
    pool, tables = runtime.new_cache(1, len(ids))
    positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
    found = []
    with jax.default_matmul_precision("highest"):
        chunks = runtime.forward_with_intermediates(Segment(ids, positions, tables[0]), pool)
        for _, pool, layers, _ in chunks:  # noqa: B007 (the last stays)
            found.append([(layer.attention.query, layer.attention.selected) for layer in layers])
        scale, error, norm = runtime.config.head_dim**-0.5, 0.0, 0.0
        for pages, *parts in zip(pool.layers, *found, strict=True):
            q, selected = (jnp.concatenate(each)[None] for each in zip(*parts, strict=True))
            small, table = pages.in_cache_dtype("float8_e4m3fn"), tables[:1]
            exact, rounded = (
                sparse_attention(q, each.kv, selected, table, scale=scale, kv_scales=each.kv_scales)[0]
                for each in (pages, small)
            )
            error += float(jnp.sum(jnp.square(rounded - exact)))
            norm += float(jnp.sum(jnp.square(exact)))
    return (error / norm) ** 0.5


def _arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    with np.load(checkpoint / "golden.npz", allow_pickle=False) as file:
        return dict(file)


def _runtime(checkpoint: Path, case: Case) -> Runtime:
    if case.options.activation_dtype is not None:
        # Only weights that are stored in fewer bits multiply such activations.
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "small"
            quantize_checkpoint(checkpoint, small, case.quantization)
            config = read_config(small)
            params = load_params(small, config, dtype=case.dtype)
    else:
        config = read_config(checkpoint)
        params = load_params(checkpoint, config, dtype=case.dtype)
        replace_weights(params, config, case.quantization)
    return Runtime(Keye.from_params(config, params), config, options=case.options)


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
    print("| checkpoint | weights, cache, activations | logits' error | greedy | experts | selected |")
    print("|---|---|---|---|---|---|")
    for checkpoint in arguments.checkpoints:
        for name, case in CASES.items():
            found = measure(checkpoint, case)
            shares = " | ".join(f"{share:.1%}" for share in (found.greedy, found.experts, found.selected))
            print(f"| {checkpoint.name} | {name} | {found.logits:.4f} | {shares} |", flush=True)
    for checkpoint in arguments.checkpoints:
        print(f"{checkpoint.name}: an fp8 cache changes the outputs of attention by {attention_error(checkpoint):.4f}")


if __name__ == "__main__":
    main()

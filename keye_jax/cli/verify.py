"""`keye-jax verify`: hold a checkpoint to recorded reference arrays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Annotated

import typer

from keye_jax.cli import options
from keye_jax.errors import UserError
from keye_jax.runtime import distributed


def verify(
    checkpoint: options.Checkpoint,
    golden: Annotated[Path, typer.Option(help="File of reference arrays, .npz.")],
    atol: Annotated[float, typer.Option(help="Largest absolute error allowed.")] = 5e-4,
    attention: options.Attention = "sparse",
    implementation: options.Implementation = None,
    indexer_dtype: options.IndexerDtype = None,
    cache_dtype: options.CacheDtype = None,
    activation_dtype: options.ActivationDtype = None,
    prefill_chunk: options.PrefillChunk = None,
    dtype: options.Dtype = "float32",
    verify_checksums: options.VerifyChecksums = False,
    sharding: options.Sharding = None,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process_id: options.ProcessId = None,
    startup_timeout: options.StartupTimeout = distributed.START_S,
) -> int:
    """Run a checkpoint on recorded prompts and compare everything it computes.

    Of a checkpoint with weights of fewer bits, or with a cache of fewer bits, it compares how far the model agrees.
    Prints the largest absolute error of each array and whether the selected sets and experts are identical. Exits
    with 1 if anything is beyond the tolerance.
    """
    chosen = options.attention_options(attention, implementation, indexer_dtype, cache_dtype, activation_dtype)
    chunk = options.prefill_chunk_size(prefill_chunk)
    cast = options.parameter_dtype(dtype)
    if not atol >= 0:
        raise UserError(f"--atol is {atol}; it must be 0 or more")
    arrays = _read_arrays(golden)
    distributed.start(coordinator, processes, process_id, timeout=startup_timeout)

    import jax
    import rich
    from rich.table import Table

    from convert import buckets, kind_of, load_params
    from convert.detect import read_config
    from keye_jax.eval.parity import AGREEMENT, EXACT, OVERLAP, skipped
    from keye_jax.eval.parity import verify as compare_all
    from keye_jax.model.keye import Keye
    from keye_jax.model.params import parameter_shardings
    from keye_jax.runtime.compilation_cache import enable_compilation_cache
    from keye_jax.runtime.runtime import Runtime

    enable_compilation_cache()
    directory = buckets.local(checkpoint)
    kind = kind_of(directory)
    config = read_config(directory)
    chosen.check(config)
    rules = options.mesh_rules(sharding, config)
    shardings = parameter_shardings(config, rules)
    params = load_params(directory, config, dtype=cast, shardings=shardings, verify_checksums=verify_checksums)
    model = Keye.from_params(config, params)
    runtime = Runtime(model, config, options=chosen, prefill_chunk=chunk, rules=rules)

    how = f"{attention} attention" + (f" and a {indexer_dtype} indexer" if indexer_dtype else "")
    how += f" and a {cache_dtype} cache" if cache_dtype else ""
    how += " and weights of fewer bits" if config.quantization else ""
    how += f" and activations in {activation_dtype}" if activation_dtype else ""
    where = f" on {rules.devices} devices" if rules.devices > 1 else ""
    table = Table(
        "array", "compared", "result", "", title=f"{buckets.shown(directory)} ({kind}, {runtime.dtype}, {how}{where})"
    )
    passed = []
    # Without this, accelerators multiply float32 matrices in lower precision.
    with jax.default_matmul_precision("highest"):
        for comparison in compare_all(runtime, arrays, atol=atol):
            passed.append(comparison.passed)
            if comparison.kind == EXACT:
                result = "identical" if comparison.passed else f"{int(comparison.error):,} entries differ"
            elif comparison.kind == OVERLAP:
                result = f"{1 - comparison.error:.1%} of the positions in common"
            elif comparison.kind == AGREEMENT:
                error = comparison.name == "logits"
                result = f"relative error {comparison.error:.4f}" if error else f"{comparison.error:.1%} the same"
            else:
                result = f"largest error {comparison.error:.2e}"
            table.add_row(comparison.name, comparison.kind, result, "ok" if comparison.passed else "FAILED")
    rich.print(table)
    absent, other = skipped(arrays, chosen, config.quantization)
    if absent:
        print(f"not in the file, skipped: {', '.join(absent)}")
    if other:
        print(f"not compared with {how}: {', '.join(other)}")
    if not passed:
        raise UserError(f"{golden} holds no array that can be compared with {how}")
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed (tolerance {atol:g})")
    return 0 if all(passed) else 1


def _read_arrays(path: Path) -> dict:
    import numpy as np

    if not path.is_file():
        raise UserError(f"--golden is {str(path)!r}; there is no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise UserError(f"--golden is {str(path)!r}; it must be an .npz file of arrays ({error})") from error

"""`keye-jax bench`: how fast the whole model is on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keye_jax import presets
from keye_jax.cli import options
from keye_jax.errors import UserError
from keye_jax.runtime import distributed

if TYPE_CHECKING:
    from keye_jax.bench.timing import Timing
    from keye_jax.config import KeyeConfig
    from keye_jax.model.attention import AttentionOptions
    from keye_jax.runtime.runtime import Runtime
    from keye_jax.sharding import MeshRules

_DENSE, _SPARSE, _FP8 = "dense", "sparse", "sparse, fp8 indexer"


def bench(
    config: Annotated[
        Path, typer.Option(help="Configuration of the model, a config.json, or a checkpoint.")
    ] = presets.RELEASED,
    layers: Annotated[int | None, typer.Option(help="Decoder layers to use, the first ones, for a quick run.")] = None,
    prefill: Annotated[str, typer.Option(help="Prompt lengths to read, in tokens; '' for none.")] = (
        "8K,32K,128K,256K"
    ),
    decode: Annotated[
        str, typer.Option(help="Sequences x context to write tokens to, in tokens; '' for none.")
    ] = "1x32K,4x32K,16x32K,1x128K,4x128K",
    answer: Annotated[
        int, typer.Option(help="Also read each prompt but for this number of tokens, and write these; 0 for not.")
    ] = 0,
    packed: Annotated[
        str, typer.Option(help="Prompts that are read together, prompts x tokens; '' for none.")
    ] = "64x500",
    repeats: Annotated[int, typer.Option(help="Times that each prompt is read; the median counts.")] = 3,
    unrelated: Annotated[
        str, typer.Option(help="Prompt lengths to read also with tokens that have nothing to do with each other.")
    ] = "128K",
    dense: Annotated[bool, typer.Option(help="Also measure dense attention, for comparison.")] = True,
    fp8: Annotated[bool, typer.Option(help="Also measure with an indexer in float8.")] = True,
    unions: Annotated[bool, typer.Option(help="Also count the keys that neighbouring queries select together.")] = True,
    breakdown: Annotated[
        bool,
        typer.Option("--breakdown", help="Instead, show where the GPU's time goes, at the first length of each list."),
    ] = False,
    experts: options.Experts = None,
    cache_dtype: options.CacheDtype = None,
    activation_dtype: options.ActivationDtype = None,
    dense_below: options.DenseBelow = 0,
    implementation: options.Implementation = None,
    prefill_chunk: options.PrefillChunk = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write all figures there.")] = None,
    time_limit: Annotated[int | None, typer.Option(help="Seconds after which it ends, whatever is under way.")] = None,
    sharding: options.Sharding = None,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process_id: options.ProcessId = None,
    startup_timeout: options.StartupTimeout = distributed.START_S,
) -> int:
    """Measures the model with random weights: prompts read and tokens written, sparse and dense.

    The sequences of a timed step of decode draw their tokens in different ways.

    Prompts are made-up video, whose embeddings drift from token to token, so that neighbouring queries select much the
    same keys. What does not fit the device is refused before it is tried.
    """
    lengths = [options.tokens("--prefill", text) for text in _items(prefill)]
    no_video = [options.tokens("--unrelated", text) for text in _items(unrelated)]
    batches = [_pair("--decode", text) for text in _items(decode)]
    together = [_pair("--packed", text) for text in _items(packed)]
    quantization = options.quantization(experts)
    chunk, below = options.prefill_chunk_size(prefill_chunk), options.dense_limit(dense_below)
    for prompts, tokens in together:
        if prompts < 2:
            raise UserError(f"--packed has {prompts}x{tokens}; it must have at least 2 prompts")
    if answer < 0 or (lengths and answer >= min(lengths)):
        raise UserError(f"--answer is {answer}; it must be at least 0 and below each length of --prefill")
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}; it must be at least 1")
    if time_limit is not None and time_limit < 1:
        raise UserError(f"--time-limit is {time_limit}; it must be at least 1")
    if as_json and as_json.is_dir():
        raise UserError(f"--json is {str(as_json)!r}; it is a directory")
    if as_json and not as_json.parent.is_dir():
        raise UserError(f"--json is {str(as_json)!r}; there is no directory {str(as_json.parent)!r}")
    if breakdown:
        # Kernels in CUDA graphs do not say which part of the model they belong to.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    distributed.start(coordinator, processes, process_id, timeout=startup_timeout)
    if time_limit is not None:
        _end_after(time_limit)

    import jax

    from convert import buckets
    from keye_jax.bench.inputs import random_model
    from keye_jax.bench.timing import SHORTEST_CONTEXT, compile_steps
    from keye_jax.config import KeyeConfig
    from keye_jax.model.params import shard_params
    from keye_jax.runtime.compilation_cache import enable_compilation_cache
    from keye_jax.runtime.runtime import Runtime

    if breakdown and jax.default_backend() != "gpu":
        raise UserError("--breakdown needs an NVIDIA GPU, whose profiler tells kernels apart")
    for batch, context in batches:
        if context < SHORTEST_CONTEXT:
            raise UserError(f"--decode has {batch}x{context}; a context must have at least {SHORTEST_CONTEXT} tokens")
    enable_compilation_cache()
    sizes = options.with_quantization(KeyeConfig.from_file(buckets.local(config)), quantization)
    if layers is not None:
        if not 1 <= layers <= sizes.num_hidden_layers:
            raise UserError(f"--layers is {layers}; it must be from 1 to {sizes.num_hidden_layers}")
        sizes = dataclasses.replace(sizes, num_hidden_layers=layers)
    for tokens in (*lengths, *(each for _, each in batches + together)):
        if tokens > sizes.max_position_embeddings:
            raise UserError(f"{tokens:,} tokens are more than this model takes, {sizes.max_position_embeddings:,}")
    how_computed = implementation, None, cache_dtype, activation_dtype
    chosen = {_DENSE: options.attention_options("dense", *how_computed)} if dense else {}
    chosen[_SPARSE] = options.attention_options("sparse", *how_computed)
    if fp8:
        chosen[_FP8] = dataclasses.replace(chosen[_SPARSE], indexer_dtype="float8_e4m3fn")
    chosen[_SPARSE].check(sizes)
    rules = options.mesh_rules(sharding, sizes)
    _refuse_if_weights_do_not_fit(sizes, rules)
    _print_setting(sizes, rules, chosen[_SPARSE])

    model = shard_params(random_model(sizes, rules=rules), rules)  # once, for all runtimes
    how = {"prefill_chunk": chunk, "dense_below": below, "rules": rules}
    runtimes = {name: Runtime(model, sizes, options=chosen[name], **how) for name in chosen}
    sparse = runtimes[_SPARSE]
    lengths = [
        tokens
        for tokens in lengths[: 1 if breakdown else None]
        if not _refused(sparse, f"prefill {_size(tokens)}", 1, tokens, 2 * tokens * sizes.hidden_size)
    ]
    batches = [
        (batch, context)
        for batch, context in batches[: 1 if breakdown else None]
        if not _refused(sparse, f"decode, {batch} x {_size(context)}", batch, context, 0)
    ]
    compile_steps(
        runtimes.values(),
        lengths,
        [] if breakdown else together,
        [*batches, *((1, tokens) for tokens in lengths if answer and not breakdown)],
        with_intermediates=sparse if unions and not breakdown else None,
    )
    if breakdown:
        found = _parts(runtimes, sizes, lengths, batches)
    else:
        prefills = _prefill_rows(runtimes, sizes, lengths, repeats, no_video, count_unions=unions)
        answers = _answer_rows(runtimes, sizes, lengths if answer else [], answer, repeats)
        packs = _packed_rows(runtimes, sizes, together, repeats)
        found = itertools.chain(prefills, answers, packs, _decode_rows(runtimes, batches))
    rows = []
    for row in found:
        rows.append(row)
        if as_json and distributed.is_main():
            # After each figure, so that those before a time limit are kept.
            as_json.write_text(json.dumps(rows, indent=1) + "\n")
    _print_peak()
    return 0


def _end_after(seconds: int) -> None:
    """Ends the process then, even in the middle of a collective that hangs."""

    def end() -> None:
        print(
            f"keye-jax: the time limit of {seconds} s is over; measurements that are missing were not made", flush=True
        )
        os._exit(124)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _prefill_rows(
    runtimes: dict[str, Runtime],
    config: KeyeConfig,
    lengths: list[int],
    repeats: int,
    no_video: list[int],
    *,
    count_unions: bool,
) -> Iterator[dict[str, Any]]:
    import numpy as np

    from keye_jax.bench.inputs import NOISE, Prompt
    from keye_jax.bench.timing import TAIL, time_prefill, union_sizes

    for tokens in lengths:
        what = f"prefill {_size(tokens)}"
        # Dense attention takes the same time however tokens are related.
        dense = None
        kinds = {"video": NOISE} | ({"unrelated tokens": 1.0} if tokens in no_video else {})
        for kind, noise in kinds.items():
            prompt, unions = Prompt.video(config, tokens, noise=noise, rules=runtimes[_SPARSE].rules), None
            for name, runtime in runtimes.items():
                if noise != NOISE and name != _SPARSE:
                    continue
                timing, pool, pages = time_prefill(runtime, prompt, repeats)
                sizes = {"tokens": tokens, "attention": name, "noise": noise}
                yield _report(f"{what}, {name}, {kind}", timing, sizes, dense)
                dense = timing if name == _DENSE else dense
                if name == _SPARSE and count_unions and tokens - min(TAIL, tokens) >= runtime.dense_below:
                    unions = union_sizes(runtime, prompt, pool, pages)
                del pool
            if unions is None:
                continue
            for group, found in unions.items():
                quartiles = ", ".join(f"{x:,.0f}" for x in np.quantile(found, [0, 0.25, 0.5, 0.75, 1]))
                mean = f"{found.mean():,.0f} in the mean of the layers"
                print(f"    keys that {group} neighbouring queries select: {mean}; quartiles {quartiles}", flush=True)
            sizes = {str(group): found.tolist() for group, found in unions.items()}
            yield {"what": f"unions of {what}, {kind}", "tokens": tokens, "noise": noise, "unions": sizes}


def _answer_rows(
    runtimes: dict[str, Runtime], config: KeyeConfig, lengths: list[int], answer: int, repeats: int
) -> Iterator[dict[str, Any]]:
    from keye_jax.bench.inputs import Prompt
    from keye_jax.bench.timing import time_answer

    for tokens in lengths:
        dense = None
        for name, runtime in runtimes.items():
            prompt = Prompt.video(config, tokens - answer, rules=runtime.rules)
            timing = time_answer(runtime, prompt, answer, repeats)
            sizes = {"tokens": tokens, "answer": answer, "attention": name}
            yield _report(f"prefill {tokens - answer:,} + {answer} tokens, {name}", timing, sizes, dense)
            dense = timing if name == _DENSE else dense


def _packed_rows(
    runtimes: dict[str, Runtime], config: KeyeConfig, packs: list[tuple[int, int]], repeats: int
) -> Iterator[dict[str, Any]]:
    from keye_jax.bench.inputs import Prompt
    from keye_jax.bench.timing import time_packed_prefill

    for sequences, tokens in packs:
        dense = None
        for name, runtime in runtimes.items():
            prompt = Prompt.video(config, tokens, rules=runtime.rules)
            timing = time_packed_prefill(runtime, prompt, sequences, repeats)
            sizes = {"sequences": sequences, "tokens": tokens, "attention": name}
            yield _report(f"prefill, {sequences} x {_size(tokens)} packed, {name}", timing, sizes, dense)
            dense = timing if name == _DENSE else dense


def _decode_rows(runtimes: dict[str, Runtime], batches: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    from keye_jax.bench.timing import time_decode

    for batch, context in batches:
        what = f"decode, {batch} x {_size(context)}"
        sizes = {"batch": batch, "context": context}
        dense = None
        for name, runtime in runtimes.items():
            timing = time_decode(runtime, batch, context)
            yield _report(f"{what}, {name}", timing, sizes | {"attention": name}, dense)
            dense = timing if name == _DENSE else dense


def _parts(
    runtimes: dict[str, Runtime], config: KeyeConfig, lengths: list[int], batches: list[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    from keye_jax.bench.inputs import Prompt
    from keye_jax.bench.profile import decode_parts, prefill_parts

    for name, runtime in runtimes.items():
        for tokens in lengths:
            seconds = prefill_parts(runtime, Prompt.video(config, tokens, rules=runtime.rules))
            yield _report_parts(f"prefill {_size(tokens)}, {name}", seconds)
        for batch, context in batches:
            seconds = decode_parts(runtime, batch, context)
            yield _report_parts(f"decode, {batch} x {_size(context)}, {name}", seconds)


def _report(what: str, timing: Timing, sizes: dict[str, Any], dense: Timing | None = None) -> dict[str, Any]:
    ratio = timing.seconds / dense.seconds if dense else None
    print(
        f"{what:40}{_seconds(timing.seconds):>12}{timing.tokens_per_second:>12,.0f} tokens/s"
        f"{timing.workspace_bytes / 2**30:>8.2f} GiB workspace{f'{ratio:>8.3f} of dense' if ratio else ''}",
        flush=True,
    )
    from keye_jax.runtime.device import peak_memory_bytes

    peak = {"peak_bytes_so_far": peak_memory_bytes()}
    return {"what": what, "of_dense": ratio} | sizes | dataclasses.asdict(timing) | peak


def _report_parts(what: str, seconds: dict[str, float]) -> dict[str, Any]:
    total = sum(seconds.values())
    parts = ", ".join(f"{part} {_seconds(each)} ({each / total:.0%})" for part, each in seconds.items())
    print(f"{what}: {_seconds(total)} of kernels: {parts}", flush=True)
    return {"what": what, "kernel_seconds": total, "parts": seconds}


def _refuse_if_weights_do_not_fit(config: KeyeConfig, rules: MeshRules) -> None:
    from keye_jax.runtime.device import memory_limit_bytes
    from keye_jax.runtime.memory import weight_bytes

    needed, limit = weight_bytes(config, rules), memory_limit_bytes()
    if needed > limit:
        raise UserError(
            f"the model does not fit: {needed / 2**30:.1f} GiB of weights, {_device(rules)} has "
            f"{limit / 2**30:.1f} GiB; --layers measures a part of it"
        )


def _refused(runtime: Runtime, what: str, batch: int, context: int, extra_bytes: int) -> bool:
    """Says so, with the numbers, if weights, cache and prompt are more than the device, or each of several, has."""
    from keye_jax.runtime.device import memory_limit_bytes
    from keye_jax.runtime.memory import pool_bytes, weight_bytes

    config, rules, limit = runtime.config, runtime.rules, memory_limit_bytes()
    weights = weight_bytes(config, rules)
    cache = pool_bytes(config, batch, context, rules, cache_dtype=runtime.options.cache_dtype)
    if weights + cache + extra_bytes <= limit:
        return False
    print(
        f"{what}: does not fit: {weights / 2**30:.1f} GiB of weights and {cache / 2**30:.1f} GiB of cache, "
        f"{_device(rules)} has {limit / 2**30:.1f} GiB"
    )
    return True


def _device(rules: MeshRules) -> str:
    return f"each of {rules.devices} devices" if rules.devices > 1 else "the device"


def _print_setting(config: KeyeConfig, rules: MeshRules, options: AttentionOptions) -> None:
    import jax

    from keye_jax.runtime.memory import weight_bytes

    each, count, detail = weight_bytes(config, rules), "", ""
    if rules.devices > 1:
        count = f"{rules.devices} x "
        detail = f" on each ({' x '.join(f'{axis} {size}' for axis, size in rules.mesh.shape.items())})"
    print(
        f"{count}{jax.devices()[0].device_kind}, {config.num_hidden_layers} layers, {each / 1e9:.1f} GB of "
        f"random {config.dtype} weights{detail}"
        + (f"; {config.quantization}" if config.quantization else "")
        + (f"; a cache of {options.cache_dtype}" if options.cache_dtype else "")
        + (f"; prompts' experts multiply {options.activation_dtype}" if options.activation_dtype else ""),
        flush=True,
    )


def _print_peak() -> None:
    from keye_jax.runtime.device import memory_limit_bytes, peak_memory_bytes

    print(f"peak memory of a device {peak_memory_bytes() / 2**30:.1f} of {memory_limit_bytes() / 2**30:.1f} GiB")


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _pair(option: str, text: str) -> tuple[int, int]:
    """A number of sequences, and the tokens of each. Raises UserError for anything else."""
    sequences, _, tokens = text.partition("x")
    if not sequences.isdecimal() or int(sequences) < 1 or not tokens:
        raise UserError(f"{option} has {text!r}; it must be sequences x tokens, such as 4x32K")
    return int(sequences), options.tokens(option, tokens)


def _size(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"

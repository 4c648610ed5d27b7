"""Options that several subcommands have together, each group a class; `expanded` puts them into a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from keye_jax.cli import options
from keye_jax.errors import UserError
from keye_jax.runtime import distributed

if TYPE_CHECKING:
    from keye_jax.engine.options import EngineOptions


def expanded(command: Callable[..., int]) -> Callable[..., int]:
    """A command whose parameters that are groups are replaced by the options of these groups.

    The options of a group stand where the group does. The command gets an object of the class.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        fields = get_type_hints(hints[name], include_extras=True)
        groups[name] = hints[name], [field.name for field in dataclasses.fields(hints[name])]
        for field in dataclasses.fields(hints[name]):
            made = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=fields[field.name])
            parameters.append(made.replace(default=field.default))

    @functools.wraps(command)
    def call(**values: Any) -> int:
        for name, (group, fields) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in fields})
        return command(**values)

    made: Any = call
    del made.__wrapped__  # typer would read the groups there
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return made


@dataclasses.dataclass(frozen=True)
class MediaGroup:
    """How images and videos are looked at, if a request does not say."""

    fps: options.Fps = None
    max_frames: options.MaxFrames = None
    num_frames: options.NumFrames = None
    start: options.Start = None
    end: options.End = None
    min_pixels: options.MinPixels = None
    max_pixels: options.MaxPixels = None
    total_pixels: options.TotalPixels = None

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return options.given(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class ModelGroup:
    """How the model computes, and on which devices."""

    attention: options.Attention = "sparse"
    implementation: options.Implementation = None
    dense_below: options.DenseBelow = 0
    indexer_dtype: options.IndexerDtype = None
    cache_dtype: options.CacheDtype = None
    activation_dtype: options.ActivationDtype = None
    prefill_chunk: options.PrefillChunk = None
    dtype: options.Dtype = "checkpoint"
    verify_checksums: options.VerifyChecksums = False
    sharding: options.Sharding = None
    coordinator: options.Coordinator = None
    processes: options.Processes = None
    process_id: options.ProcessId = None
    startup_timeout: options.StartupTimeout = distributed.START_S

    def settings(self) -> dict[str, Any]:
        """The arguments of `load_runtime` but its mesh. Raises UserError for a value that is not allowed."""
        return {
            "attention": options.attention_options(
                self.attention, self.implementation, self.indexer_dtype, self.cache_dtype, self.activation_dtype
            ),
            "prefill_chunk": options.prefill_chunk_size(self.prefill_chunk),
            "dense_below": options.dense_limit(self.dense_below),
            "dtype": options.parameter_dtype(self.dtype),
            "verify_checksums": self.verify_checksums,
        }

    def start(self, **settings: Any) -> None:
        """Joins this process to the others of its job; see `keye_jax.runtime.distributed.start`."""
        distributed.start(self.coordinator, self.processes, self.process_id, timeout=self.startup_timeout, **settings)


@dataclasses.dataclass(frozen=True)
class EngineGroup:
    """How an engine shares the devices out."""

    cache_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of all requests at once that the cache holds, such as 640K; what fits if left out."),
    ] = None
    optimistic: Annotated[
        bool,
        typer.Option("--optimistic", help="Begin more answers than the cache surely holds; some may pause."),
    ] = False
    prompts_together: Annotated[
        int, typer.Option(help="Small chunks of prompts that one step reads; 8 suits many short prompts.")
    ] = 1
    media_workers: Annotated[int, typer.Option(help="Processes that decode videos and images.")] = 2
    frame_cache: Annotated[Path | None, typer.Option(help="Folder that keeps decoded frames between runs.")] = None

    def engine_options(self, **others: Any) -> EngineOptions:
        """The engine's options; `others` are those that are not in the group. Raises UserError."""
        from keye_jax.engine.options import EngineOptions

        at_least(1, media_workers=self.media_workers)
        tokens = self.cache_tokens
        shared = {} if tokens is None else {"cache_tokens": options.tokens("--cache-tokens", tokens)}
        return EngineOptions(
            optimistic=self.optimistic,
            prompts_together=self.prompts_together,
            media_workers=self.media_workers,
            frame_cache=self.frame_cache,
            **shared,
            **others,
        )


def at_least(least: float, **values: float | None) -> None:
    """Refuses values of options, by name, that are below `least`."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")

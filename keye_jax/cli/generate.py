"""`keye-jax generate`: ask a question about images and videos."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from keye_jax import interrupts
from keye_jax.cli import options
from keye_jax.cli.groups import MediaGroup, ModelGroup, expanded
from keye_jax.errors import UserError, shorten

if TYPE_CHECKING:
    from keye_jax.engine.request import Choice, Result
    from keye_jax.processor import PromptPlan
    from keye_jax.runtime.sampling import SamplingParams


class InOrder(TyperCommand):
    """Remembers the order in which `--image` and `--video` were given, which the parsed lists lose."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["media"] = [parameter.name for parameter in given if parameter.name in ("image", "video")]
        return super().parse_args(ctx, args)


@expanded
def generate(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="Image file, URL, or - for stdin; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video file, URL, or - for stdin; may be repeated.")] = None,
    messages: Annotated[
        Path | None, typer.Option(help="JSON file of a whole conversation, or - for stdin, in place of a prompt.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to write; 4096 or what the model's positions allow if left out.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most likely token; the checkpoint's if left out.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability to draw from; the checkpoint's if left out.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Tokens to draw from, 0 for all; the checkpoint's if left out.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    *,
    media: MediaGroup,
    subtitles: Annotated[
        str | None, typer.Option(help="Subtitles of the videos: a file, or 'container' for those in the video.")
    ] = None,
    allow_remote: options.AllowRemote = False,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    model: ModelGroup,
) -> int:
    """Answer a question about images and videos.

    The answer goes to stdout; reasoning, progress and a summary go to stderr.
    """
    settings = model.settings()
    given = {"image": image or [], "video": video or []}
    stdin = _standard_input({**given, "messages": [messages], "subtitles": [subtitles]})
    request = _request(prompt, given, ctx.meta["media"], messages, stdin)
    model.start()

    from convert import buckets
    from keye_jax.engine.checkpoint import load_and_compile, read_checkpoint
    from keye_jax.engine.engine import Engine
    from keye_jax.engine.limits import new_token_limit
    from keye_jax.engine.options import options_for_one
    from keye_jax.engine.request import Piece, Request, RequestError
    from keye_jax.runtime.compilation_cache import enable_compilation_cache
    from keye_jax.runtime.device import memory_limit_bytes, peak_memory_bytes

    enable_compilation_cache()
    chosen = media.given() | options.given(subtitles=stdin if subtitles == "-" else subtitles)
    directory = buckets.local(checkpoint)
    config, processor, defaults = read_checkpoint(directory, allow_remote=allow_remote, media=chosen)
    rules = options.mesh_rules(model.sharding, config)
    asked = options.given(temperature=0.0 if greedy else temperature, top_p=top_p, top_k=top_k, seed=seed)
    sampling = dataclasses.replace(defaults.sampling, **asked)
    plan = processor.plan(**request)
    limit = new_token_limit(
        config,
        plan.num_tokens,
        max_new_tokens,
        dtype=settings["dtype"] or config.dtype,
        indexer_dtype=model.indexer_dtype,
        cache_dtype=model.cache_dtype,
        memory_limit=memory_limit_bytes(),
        rules=rules,
    )

    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    began = time.perf_counter()
    with options.ProgressBars() as report:
        report("loading weights", 0, None)
        engine_options = options_for_one(rules, plan.num_tokens + limit)
        runtime = load_and_compile(directory, config, processor, engine_options, prompt=plan, rules=rules, **settings)
        report("loading weights", 1, 1)
    load_seconds = time.perf_counter() - began
    with Engine(runtime, processor, defaults, engine_options) as engine:
        if not engine.takes_requests:
            return 0
        with options.ProgressBars() as report:
            printer = _Printer(enabled=stream and not as_json, before=report.stop)
            handle = engine.submit(Request(plan=plan, sampling=sampling, max_tokens=limit), report)
            try:
                for piece in handle:
                    if isinstance(piece, Piece):  # no tools are named, so there are no calls
                        printer(piece.text, piece.reasoning)
            except RequestError as error:
                if error.kind in ("internal", "closed"):
                    raise
                raise UserError(str(error)) from error
        result = handle.result()
    printer.finish(result.choices[0], plain=not stream and not as_json)
    for warning in result.warnings:
        if warning not in plan.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    summary = _summary(plan, result, sampling, load_seconds)
    summary["peak_memory_bytes"] = peak_memory_bytes()
    if as_json:
        print(json.dumps(summary, ensure_ascii=False, indent=2))
    else:
        _print_summary(summary)
    return 0


def _standard_input(given: Mapping[str, Sequence[object]]) -> bytes:
    """What stdin holds, if the value of an option is `-`. `given` has the options' values by their names."""
    readers = [f"--{name}" for name, values in given.items() for value in values if str(value) == "-"]
    if not readers:
        return b""
    if len(readers) > 1:
        raise UserError(f"{' and '.join(readers)} are '-'; only one option can read standard input")
    content = sys.stdin.buffer.read()
    if not content:
        raise UserError(f"{readers[0]} is '-'; standard input must not be empty")
    return content


def _request(
    prompt: str | None, given: Mapping[str, list[str]], order: list[str], file: Path | None, stdin: bytes
) -> dict[str, Any]:
    """The arguments of `Processor.plan` from the command line's options, or from a file."""
    from keye_jax.processor.messages import read_request

    if (prompt is None) == (file is None):
        raise UserError("give either --prompt or --messages")
    if file is None:
        sources = {kind: iter(values) for kind, values in given.items()}
        urls = [(kind, next(sources[kind])) for kind in order]
        parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": stdin if url == "-" else url}} for kind, url in urls]
        return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]}
    if order:
        raise UserError("--image and --video go with --prompt; with --messages they belong into the file")
    name = f"--messages is {shorten(str(file))}"
    try:
        content = stdin if str(file) == "-" else file.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name}; it must be a file that can be read ({reason})") from error
    return read_request(content, name)


class _Printer:
    """Prints pieces as they come: the answer on stdout, reasoning on stderr, dimmed on a terminal."""

    def __init__(self, *, enabled: bool, before: Callable[[], None]):
        self._enabled, self._before = enabled, before
        self._dim = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        self._reasoned = False

    def __call__(self, piece: str, reasoning: bool) -> None:
        if not self._enabled:
            return
        self._before()
        if reasoning:
            interrupts.set_unfinished(True)
            print(f"{self._dim[0]}{piece}{self._dim[1]}", end="", file=sys.stderr, flush=True)
            self._reasoned = True
            return
        if self._reasoned:
            self._end_reasoning()
        print(piece, end="", flush=True)

    def _end_reasoning(self) -> None:
        print(file=sys.stderr, flush=True)
        interrupts.set_unfinished(False)
        self._reasoned = False

    def finish(self, answer: Choice, *, plain: bool) -> None:
        if plain:
            print(answer.text)
        elif self._reasoned:
            self._end_reasoning()
        elif self._enabled:
            print(flush=True)


def _summary(plan: PromptPlan, result: Result, sampling: SamplingParams, load_seconds: float) -> dict[str, Any]:
    (choice,), usage, timings = result.choices, result.usage, result.timings
    times = choice.token_seconds
    # Of the tokens after the second, whose step may have had to be compiled.
    rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else 0.0
    return {
        "answer": choice.text,
        "reasoning": choice.reasoning,
        "finish_reason": choice.finish_reason,
        "tokens": {
            "prompt": usage.prompt,
            "image": usage.image,
            "video": usage.prompt - plan.text_tokens - plan.image_tokens,  # with the text of its frames
            "completion": usage.completion,
            "reasoning": usage.reasoning,
        },
        "frame_times": [[round(seconds, 3) for seconds in times] for times in result.frame_times],
        "undecodable_frame_times": [[round(seconds, 3) for seconds in times] for times in result.undecodable_times],
        "warnings": list(result.warnings),
        "sampling": dataclasses.asdict(sampling),
        "seconds": {
            "load_weights": load_seconds,
            "decode_media": timings.media,
            "encode_vision": timings.encoded,
            "prefill": timings.first_token - timings.encoded,
            "first_token": timings.first_token,
            "generate": timings.last_token,
        },
        "tokens_per_second": rate,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    tokens, seconds = summary["tokens"], summary["seconds"]
    frames = sum(len(times) for times in summary["frame_times"])
    text = tokens["prompt"] - tokens["image"] - tokens["video"]
    lines = {
        "frames": f"{frames:,}",
        "prompt": f"{tokens['prompt']:,} tokens ({tokens['video']:,} video, {tokens['image']:,} image, {text:,} text)",
        "written": f"{tokens['completion']:,} tokens, {tokens['reasoning']:,} of them reasoning"
        f" (ended by {'an end token' if summary['finish_reason'] == 'stop' else 'the limit'})",
        "before": f"{seconds['load_weights']:.2f} s loading weights",
        "first token": f"{seconds['first_token']:.2f} s: media decoded after {seconds['decode_media']:.2f} s, encoded"
        f" after {seconds['encode_vision']:.2f} s, then {seconds['prefill']:.2f} s reading the prompt",
        "speed": f"{summary['tokens_per_second']:.1f} tokens/s",
        "peak memory": f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    }
    for name, value in lines.items():
        print(f"{name:>12}  {value}", file=sys.stderr)

"""`python -m tests.random_schemas`: random JSON schemas as grammars, answered by a model of random weights.

Each answer must be valid, or end at its limit as the beginning of a valid one. Schemas are bounded: lengths and counts
have limits. Answers have no free white space. Half of them may begin with a few thoughts.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
from llguidance import LLMatcher

from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.engine.checkpoint import load
from keye_jax.engine.constraint import Grammars
from keye_jax.engine.engine import Engine
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Choice, Request
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.testing import write_processor_files

GOLDEN = Path(__file__).parent / "golden" / "a"
OPTIONS = EngineOptions(rows=16, cache_tokens=16384, max_context=1024, small_chunk=64, media_workers=0)
FORMATS = ("date", "uuid", "ipv4")
NAMES = ("a", "kind", "start time", 'quoted "name"', "größe", "时间", "x_1")


class Schemas:
    """Draws schemas."""

    def __init__(self, draws: random.Random):
        self._draws = draws

    def schema(self) -> dict[str, Any]:
        """An object or an array of at most three levels."""
        return self._draws.choice((self._object, self._object, self._array))(2)

    def _any(self, depth: int) -> dict[str, Any]:
        simple = (self._string, self._integer, self._number, self._fixed, self._format)
        nested = (self._object, self._array, self._union)
        return self._draws.choice(simple if depth == 0 else (*simple, *nested))(depth)

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._draws.sample(NAMES, self._draws.randint(0, 4))
        required = [name for name in names if self._draws.random() < 0.7]
        properties = {name: self._any(depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._draws.randint(0, 2)
        most = least + self._draws.randint(0, 3)
        return {"type": "array", "items": self._any(depth - 1), "minItems": least, "maxItems": most}

    def _union(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._draws.randint(2, 3))]}

    def _string(self, depth: int) -> dict[str, Any]:
        if self._draws.random() < 0.3:
            return {"type": "string", "pattern": self._draws.choice(("^[a-z]{2,5}$", "^\\d{1,3}(-\\d{2})?$", "^x+$"))}
        least = self._draws.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._draws.randint(0, 12)}

    def _integer(self, depth: int) -> dict[str, Any]:
        least = self._draws.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + self._draws.randint(0, 5000)}

    def _number(self, depth: int) -> dict[str, Any]:
        return {"type": "number", "minimum": -5, "maximum": self._draws.randint(0, 50)}

    def _format(self, depth: int) -> dict[str, Any]:
        return {"type": "string", "format": self._draws.choice(FORMATS)}

    def _fixed(self, depth: int) -> dict[str, Any]:
        values = ("red", "a b", True, None, 7, -1.5, "</think>", "<|im_end|>", '"', "\\", "ü")
        return {"enum": self._draws.sample(values, self._draws.randint(1, 4))}


def mistake(choice: Choice, schema: dict[str, Any], grammar: str, grammars: Grammars, think_end: int) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if choice.finish_reason == "stop":
        try:
            jsonschema.validate(json.loads(choice.text), schema, format_checker=jsonschema.FormatChecker(FORMATS))
        except (ValueError, jsonschema.ValidationError) as error:
            return f"{choice.text!r} is not valid: {str(error).splitlines()[0]}"
        return None
    ids = list(choice.token_ids)
    answer = ids[ids.index(think_end) + 1 :] if think_end in ids else ids if not choice.reasoning_tokens else []
    matcher = grammars.compile(grammar)
    # One that only lacks its end token is stopped, and accepts.
    if not matcher.consume_tokens(answer) or (matcher.is_stopped() and not matcher.is_accepting()):
        return f"{choice.text!r} is no beginning of a valid answer"
    return None


def main() -> int:
    """Parses the command line, asks, checks and prints; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_schemas", description=__doc__)
    parser.add_argument("--schemas", type=int, default=1000, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, default=0, help="other schemas for another seed")
    arguments = parser.parse_args()
    draws, findings = random.Random(arguments.seed), []
    schemas = [Schemas(draws).schema() for _ in range(arguments.schemas)]
    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        config = KeyeConfig.from_file(GOLDEN)
        write_checkpoint(directory, config, seed=0)
        write_processor_files(directory, config)
        loaded = load(directory, dtype="float32", prefill_chunk=128)
    _, processor, defaults = loaded
    grammars = Grammars(processor, config.vocab_size, defaults.end_tokens)
    think_end = processor.token_id("</think>")
    assert think_end is not None, "the tokenizer has it"
    ends: collections.Counter[str] = collections.Counter()
    with Engine(*loaded, options=OPTIONS) as engine:
        print(f"warm after {engine.warmup():.0f} s", flush=True)
        begun, asked = time.monotonic(), []
        for number, schema in enumerate(schemas):
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            request = Request(
                messages=[{"role": "user", "content": f"Number {number}?"}],
                max_tokens=draws.choice((8, 64, 256)),
                sampling=SamplingParams(temperature=draws.choice((0.0, 1.0, 2.0)), top_p=1.0, top_k=0, seed=number),
                grammar=grammar,
                thinking_budget=draws.choice((0, 4)),
            )
            asked.append((schema, grammar, engine.submit(request)))
        tokens = 0
        for number, (schema, grammar, handle) in enumerate(asked):
            (choice,) = handle.result(1200).choices
            ends[choice.finish_reason] += 1
            tokens += len(choice.token_ids)
            if (wrong := mistake(choice, schema, grammar, grammars, think_end)) is not None:
                findings.append(f"schema {number}: {wrong}: {json.dumps(schema)}")
        seconds, counts = time.monotonic() - begun, engine.stats()
        if counts.compilations:
            findings.append(f"{counts.compilations} programs were compiled after warmup")
    for finding in findings:
        print(finding)
    print(f"{len(schemas)} schemas in {seconds:.0f} s, {tokens} tokens: {dict(sorted(ends.items()))}")
    print(f"{len(findings)} findings, seed {arguments.seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

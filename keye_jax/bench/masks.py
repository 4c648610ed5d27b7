"""`python -m keye_jax.bench.masks`: what the masks of a grammar cost the host, at the size of the released vocabulary.

A tokenizer of so many made-up tokens is written and prepared. Rows then write random answers of one schema, and in each
step the token of every row is taken in and its mask computed, as an engine does while the devices read. Times are those
of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from keye_jax.byte_level import byte_level_bpe
from keye_jax.engine.constraint import Constraint, Grammars, Masks
from keye_jax.processor.prompt import SafeTokenizer

RELEASED_VOCAB = 151_650
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 200},
        "seconds": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 7200}, "maxItems": 16},
        "kind": {"enum": ["person", "animal", "vehicle", "other"]},
        "sure": {"type": "boolean"},
    },
    "required": ["answer", "seconds", "kind", "sure"],
    "additionalProperties": False,
}
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")


class _Tokenizer:
    """The part of a processor that `Grammars` needs, with a tokenizer of `vocab` tokens."""

    def __init__(self, vocab: int, directory: Path):
        control = {name: vocab - len(_MARKS) + place for place, name in enumerate(_MARKS)}
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(byte_level_bpe(["a film of a ball"], vocab, control)), encoding="utf-8")
        self._tokenizer = SafeTokenizer(path)
        self.control = control

    def encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode_text(text)

    def strict_tokenizer_json(self) -> str:
        return self._tokenizer.strict_json()


def measure(rows: int, steps: int, vocab: int, seed: int) -> dict[str, float]:
    """Times of a run, in seconds: "prepare", "compile", and of steps of all rows "median", "p90" and "p99"."""
    from llguidance import LLMatcher

    with tempfile.TemporaryDirectory(prefix="keye-jax-") as directory:
        tokenizer = _Tokenizer(vocab, Path(directory))
    control, draws = tokenizer.control, np.random.default_rng(seed)
    end = control["<|im_end|>"]
    grammars = Grammars(tokenizer, vocab, {end})  # pyright: ignore[reportArgumentType]
    masks = Masks(vocab, {end}, (control["<think>"], control["</think>"]))
    start = time.thread_time()
    grammars.prepare()
    found = {"prepare": time.thread_time() - start}
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    start = time.thread_time()
    matcher = grammars.compile(grammar)
    found["compile"] = time.thread_time() - start
    answers = [Constraint(masks, "closed", None, matcher.deep_copy()) for _ in range(rows)]
    times = []
    for _ in range(steps):
        tokens = []
        for row, answer in enumerate(answers):
            allowed = np.flatnonzero(np.unpackbits(answer.allowed.view(np.uint8), bitorder="little"))
            tokens.append(int(draws.choice(allowed)))
            if tokens[-1] == end:
                answers[row] = Constraint(masks, "closed", None, matcher.deep_copy())
        start = time.thread_time()
        for answer, token in zip(answers, tokens, strict=True):
            if token != end:
                answer.advance(token)
        times.append(time.thread_time() - start)
    found |= dict(zip(("median", "p90", "p99"), np.quantile(times, (0.5, 0.9, 0.99)).tolist(), strict=True))
    return found


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m keye_jax.bench.masks", description=__doc__)
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="answers that are bound to a grammar")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="tokens of each")
    parser.add_argument("--vocab", type=int, default=RELEASED_VOCAB, metavar="N", help="tokens of the vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="other answers for another seed")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.steps, arguments.vocab, arguments.seed)
    print(f"tokenizer of {arguments.vocab:,} tokens: {found['prepare']:.1f} s, once")
    print(f"grammar: {found['compile'] * 1e3:.1f} ms")
    steps = ", ".join(f"{name} {found[name] * 1e6:,.0f}" for name in ("median", "p90", "p99"))
    print(f"masks of {arguments.rows} rows in a step, microseconds: {steps}")


if __name__ == "__main__":
    main()

"""`python -m tests.fuzz_config`: damaged `config.json` files. Each is a valid configuration or one sentence.

A case changes the released file in one to three places: a value becomes one of another kind or size, a field is lost,
is moved or is there twice, or bytes of the file are changed. What is read must be readable again, and be the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import traceback

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.config_rules import FIXED
from keye_jax.errors import UserError
from keye_jax.parsing import parse_json

RELEASED = json.loads(presets.RELEASED.read_text(encoding="utf-8"))
MOST_CHARACTERS = 600
"""Of a message."""

_VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        0.5,
        1e-45,
        1e30,
        -1e308,
        2**31,
        2**63,
        10**99,
        "",
        "x",
        "1",
        "2048",
        "é\ud800",
    ),
    *(
        [],
        [1],
        [0, 0, 0],
        [[]],
        ["full_attention"],
        {},
        {"a": 1},
        {"type": "yarn", "factor": 4.0},
        {"quant_method": "fp8"},
    ),
]
_TEXTS = ["NaN", "Infinity", "-Infinity", "1e400", "1" * 5000, "[" * 100_000, '{"a":' * 1000, "01", "+1", "'x'", "\x00"]
_MARK = "the mutated value"


def mutated(generator: random.Random) -> bytes:
    """The bytes of a damaged file."""
    values = copy.deepcopy(RELEASED)
    text = None
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        section = generator.choice(["", "", "rope_scaling", "sa_config", "vision_config"])
        place = values.get(section) if section else values
        if not isinstance(place, dict):
            place, section = values, ""
        name = generator.choice([*place, *FIXED[section]] if place else [*FIXED[section]])
        match generator.randrange(6):
            case 0:
                place.pop(name, None)
            case 1:
                values.setdefault("text_config", {})
                if isinstance(values["text_config"], dict):
                    values["text_config"][name] = generator.choice([place.get(name), *_VALUES])
            case 2:
                values["rope_parameters"] = generator.choice([values.get("rope_scaling"), *_VALUES])
            case 3:
                text, place[name] = generator.choice(_TEXTS), _MARK
            case _:
                place[name] = generator.choice(_VALUES)
    content = json.dumps(values)
    if text is not None:
        content = content.replace(json.dumps(_MARK), text)
    damaged = bytearray(content.encode())
    if generator.randrange(8) == 0:
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
    if generator.randrange(20) == 0:
        damaged = damaged[: generator.randrange(len(damaged))]
    return bytes(damaged)


def run(seed: int, number: int) -> tuple[str, str]:
    """Reads a damaged file; returns "valid" or "refused", and the traceback of what was found or ""."""
    content = mutated(random.Random(f"{seed} {number}"))
    try:
        try:
            config = KeyeConfig.from_dict(parse_json(content, "config.json"))
        except UserError as error:
            message = str(error)
            assert message.isprintable() and len(message) <= MOST_CHARACTERS, message
            return "refused", ""
        written = config.to_dict()
        again = KeyeConfig.from_dict(json.loads(json.dumps(written)))
        assert again == config and again.unknown_fields == config.unknown_fields
        return "valid", ""
    except Exception:
        return "failed", f"{traceback.format_exc()}\n{content[:2000]!r}"


def main() -> int:
    """Parses the command line, runs the cases and prints; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_config", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, metavar="N", help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="other cases for another seed")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run only this case")
    arguments = parser.parse_args()
    numbers = range(arguments.cases) if arguments.only is None else [arguments.only]
    counts = {"valid": 0, "refused": 0, "failed": 0}
    for number in numbers:
        outcome, found = run(arguments.seed, number)
        counts[outcome] += 1
        if found:
            print(f"case {number}, seed {arguments.seed}:\n{found}", file=sys.stderr, flush=True)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

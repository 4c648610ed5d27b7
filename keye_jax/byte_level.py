"""Small byte-level BPE tokenizers, made from a few lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# As in the family's tokenizers, answers show them.
_SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def byte_level_bpe(
    lines: Sequence[str], vocab_size: int, control: Mapping[str, int], *, digits: bool = False
) -> dict[str, Any]:
    """The content of a `tokenizer.json` with exactly `vocab_size` tokens. It is the same on every call.

    Args:
      lines: the text whose common parts become tokens.
      vocab_size: at least 257 more than there are control tokens.
      control: ids of the control tokens by name.
      digits: whether each digit is a token of its own.
    """
    splits = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    splitter = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    free = sorted(set(range(vocab_size)) - set(control.values()))
    words, merges = _train(lines, len(free), splitter)
    vocabulary = dict(zip(words, free, strict=True)) | dict(control)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = splitter if digits else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    values = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"] = [
        {"id": token, "content": name, **flags, "special": name not in _SHOWN}
        for name, token in sorted(control.items(), key=lambda item: item[1])
    ]
    return values


def _train(lines: Sequence[str], count: int, splitter: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """The `count` tokens of a byte-level BPE in the order of their ids, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    # The text may be too small for more merges. The other tokens are made-up words. No text is encoded to them, but a
    # random model may answer with them.
    known = set(words)
    for word in _syllables():
        if len(words) == count:
            break
        if word not in known:
            words.append(word)
    return words, [tuple(pair) for pair in model["merges"]]


def _syllables() -> Iterator[str]:
    """Made-up words with a space before them, the shortest first."""
    starts, vowels, ends = "bdfgklmnprstvz", "aeiou", "nlrst"
    for length in (1, 2, 3):
        for number in range((len(starts) * len(vowels)) ** length * len(ends)):
            number, end = divmod(number, len(ends))
            word = ""
            for _ in range(length):
                number, syllable = divmod(number, len(starts) * len(vowels))
                word += starts[syllable // len(vowels)] + vowels[syllable % len(vowels)]
            yield f"Ġ{word}{ends[end]}"

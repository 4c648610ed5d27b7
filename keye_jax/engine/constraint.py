"""What an answer may draw next: a grammar for its text, and a budget for its thoughts.

Grammars are llguidance's (https://github.com/guidance-ai/llguidance), which says for every state of a grammar which
tokens may come next. Here is what it does not know: thoughts, and their budget.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor import Processor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

type Thoughts = Literal["open", "closed", "unopened"]
"""Where an answer begins: inside of a think block, behind one, or where its first token may open one."""


class GrammarError(Exception):
    """A grammar that cannot go on. The text is one sentence."""


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may call the methods.

    Args:
      processor: has the tokenizer. All its control tokens can only be drawn where a grammar names them.
      vocab: size of the model's vocabulary, which may be larger than the tokenizer's.
      end_tokens: what ends an answer.
    """

    def __init__(self, processor: Processor, vocab: int, end_tokens: Collection[int]):
        self._processor, self._vocab, self._end_tokens = processor, vocab, sorted(end_tokens)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Prepares the tokenizer, which takes seconds if the vocabulary is large. Does nothing without llguidance."""
        if self._end_tokens and importlib.util.find_spec("llguidance"):
            self._prepared()

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of a grammar, as `Request.grammar` has it.

        Raises:
          UserError: the grammar is wrong or too large, llguidance is not installed, or no token ends an answer.
        """
        if not self._end_tokens:
            raise UserError("grammar is given, but the checkpoint names no token that ends an answer")
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise UserError("grammar needs llguidance; install it with: pip install 'keye-jax[serve]'") from error
        matcher = LLMatcher(self._prepared(), grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"grammar is not valid: {_sentence(matcher)}")
        return matcher

    def _prepared(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._tokenizer is None:
                text = self._processor.strict_tokenizer_json()
                bare = LLTokenizer(text, n_vocab=self._vocab, eos_token=self._end_tokens)
                wrapper = TokenizerWrapper(_TextTokenizer(bare, self._processor))
                self._tokenizer = LLTokenizer(wrapper, eos_token=self._end_tokens)
            return self._tokenizer


class _TextTokenizer:
    """A tokenizer as llguidance wants it, that makes no control token of a text which is spelled like one.

    llguidance's own does. A grammar that forces such a text would then name a token that it refuses afterwards.
    """

    def __init__(self, bare: LLTokenizer, processor: Processor):
        self._bare, self._processor = bare, processor
        self.eos_token_id, self.bos_token_id = bare.eos_token, None
        self.tokens = [bare.decode_bytes([token]) for token in range(bare.vocab_size)]
        self.special_token_ids = [token for token in range(bare.vocab_size) if bare.is_special_token(token)]

    def __call__(self, text: str) -> list[int]:
        try:
            return self._processor.encode_text(text)
        except UserError:  # only a control token has a character of it
            return self._bare.greedy_tokenize(text)


class Masks:
    """Sets of tokens, uint32 `[ceil(vocab / 32)]` as in `SamplingState`, that the answers of an engine share.

    Args:
      vocab: size of the vocabulary.
      end_tokens: what ends an answer.
      think: ids of the opening and of the closing mark of thoughts; None where there is no such token.

    Attributes:
      all_tokens: every token.
      only_close: the closing mark alone.
      no_open: all but the opening mark.
      thoughts: what thoughts before a grammar may hold: no end token, and no opening mark.
    """

    def __init__(self, vocab: int, end_tokens: Collection[int], think: tuple[int | None, int | None]):
        self.open, self.close = think
        everything = np.ones(-(-vocab // 32) * 32, bool)
        self.all_tokens = _words(everything)
        marks = [mark for mark in think[:1] if mark is not None]
        self.no_open = _words(_without(everything, marks))
        self.thoughts = _words(_without(everything, [*marks, *end_tokens]))
        only_close = np.zeros(len(everything), bool)
        if self.close is not None:
            only_close[self.close] = True
        self.only_close = _words(only_close)

    def beginning(self, prompt_ids: np.ndarray, *, opens: bool, raw: bool) -> Thoughts:
        """Where the answer to a prompt begins.

        Args:
          prompt_ids: int `[t]`.
          opens: whether the prompt opens a think block.
          raw: whether it was written without a chat template. Its answer then opens no block.
        """
        if self.open is None or self.close is None:
            return "closed"
        if opens:
            return "open"
        marks = prompt_ids[np.isin(prompt_ids, (self.open, self.close))]
        return "closed" if raw or (len(marks) and marks[-1] == self.close) else "unopened"


class Constraint:
    """What one answer may draw next.

    Args:
      masks: those of the engine.
      thoughts: where the answer begins.
      budget: most tokens of thoughts; None for any number.
      matcher: at the beginning of the grammar, which the constraint then changes; None without one.

    Attributes:
      allowed: uint32 `[ceil(vocab / 32)]`, the tokens that may be drawn next. The same object stands for the same set.

    Raises:
      GrammarError: the grammar allows nothing.
    """

    def __init__(self, masks: Masks, thoughts: Thoughts, budget: int | None, matcher: LLMatcher | None):
        self._masks, self._budget, self._matcher = masks, budget, matcher
        self._thinking, self._may_open = thoughts == "open", thoughts == "unopened"
        self._spent = 0
        self.allowed = self._allowed()

    @property
    def active(self) -> bool:
        """Whether a token that was drawn and not looked at yet can change what may be drawn behind it."""
        if self._matcher is not None or self._may_open:
            return True
        return self._thinking and self._budget is not None and self._spent + 1 >= self._budget

    def advance(self, token: int) -> None:
        """Takes the token that was drawn; no end token.

        Raises:
          GrammarError: the grammar cannot go on.
        """
        may_open, self._may_open = self._may_open, False
        if may_open and token == self._masks.open:
            self._thinking = True
        elif self._thinking:
            self._thinking = token != self._masks.close
            self._spent += self._thinking
        elif self._matcher is not None and not self._matcher.consume_token(token):
            raise GrammarError(f"the grammar cannot go on: {_sentence(self._matcher)}")
        self.allowed = self._allowed()

    def _allowed(self) -> np.ndarray:
        masks = self._masks
        if self._thinking:
            if self._budget is not None and self._spent >= self._budget:
                return masks.only_close
            return masks.no_open if self._matcher is None else masks.thoughts
        if self._matcher is None:
            return masks.all_tokens if self._may_open else masks.no_open
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(masks.all_tokens)]
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot go on: {_sentence(self._matcher)}")
        if self._may_open and masks.open is not None:
            words = words.copy()
            words[masks.open // 32] |= np.uint32(1 << masks.open % 32)
        if not words.any():
            raise GrammarError("the grammar cannot go on: no token of the vocabulary may come next")
        return words


def _without(tokens: np.ndarray, ids: Collection[int]) -> np.ndarray:
    found = tokens.copy()
    found[list(ids)] = False
    return found


def _words(tokens: np.ndarray) -> np.ndarray:
    """A set of tokens, bool `[n * 32]`, as uint32 `[n]`."""
    return np.packbits(tokens, bitorder="little").view("<u4").astype(np.uint32)


def _sentence(matcher: LLMatcher) -> str:
    """What is wrong with a grammar, in one line of at most 300 characters."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    text = next((line for line in lines if line), "unknown reason")
    return text if len(text) <= 300 else f"{text[:297]}..."

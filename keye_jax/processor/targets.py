"""Which tokens of a conversation a model learns: the answers of the assistant, found from the chat template."""

from __future__ import annotations

from collections.abc import Sequence

from keye_jax.errors import UserError
from keye_jax.processor.prompt import RenderedPrompt

type Piece = tuple[str, bool]


def split_targets(
    prompt: RenderedPrompt, learn: Sequence[bool], opening: str, end_of_turn: str
) -> list[tuple[list[Piece], bool]]:
    """Cuts a rendered conversation before and after each answer to learn.

    An answer is what the model would generate: it begins behind the generation prompt, and ends with the control token
    that ends a turn. Thoughts and tool calls belong to it, with what the template writes around them. What the template
    leaves out, such as thoughts of earlier turns, is not learnt.

    Args:
      prompt: the conversation without a generation prompt.
      learn: whether to learn each message.
      opening: the generation prompt, such as `<|im_start|>assistant` and a newline.
      end_of_turn: the control token that ends a turn.

    Returns:
      Rows (pieces, learnt). To be encoded one by one, so that an answer has the tokens that the model generates.

    Raises:
      UserError: the template writes an answer in another way than it begins one.
    """
    parts: list[tuple[list[Piece], bool]] = []
    rest = prompt.pieces[0]
    index = 1
    before: list[Piece] = []
    while index < len(prompt.pieces):
        author = prompt.authors[index]
        if author is None or not learn[author]:
            before += [rest, prompt.pieces[index]]
            rest = prompt.pieces[index + 1]
            index += 2
            continue
        start = _behind_opening(rest[0], opening, author)
        parts.append(([*before, (rest[0][:start], True)], False))
        answer: list[Piece] = [(rest[0][start:], True)]
        while index < len(prompt.pieces) and prompt.authors[index] == author:
            answer += prompt.pieces[index : index + 2]
            index += 2
        tail = answer.pop()[0]
        end = tail.find(end_of_turn)
        if end < 0:
            raise UserError(f"the chat template does not end messages[{author}] with {end_of_turn!r}")
        end += len(end_of_turn)
        parts.append(([*answer, (tail[:end], True)], True))
        before, rest = [], (tail[end:], True)
    parts.append(([*before, rest], False))
    return parts


def _behind_opening(text: str, opening: str, author: int) -> int:
    """Where an answer begins in the template's text before it: behind as much of `opening` as the text has.

    A template may open thoughts in its generation prompt, and write an answer without thoughts after the header alone.
    """
    least = opening.find("\n") + 1 or len(opening)
    for length in range(len(opening), least - 1, -1):
        at = text.rfind(opening[:length])
        if at >= 0 and length:
            return at + length
    raise UserError(f"the chat template does not begin messages[{author}] with {opening!r}, as it begins answers")

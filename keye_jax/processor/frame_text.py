"""The text around each frame of a video, which tells the model the frame's time."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Iterator, Sequence

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.media import shorten
from keye_jax.processor.prompt import SafeTokenizer
from keye_jax.processor.subtitles import Cue

PRESETS = {
    "keye-1.5": "<|frame|>{time:.1f}",
    "per-frame": "<|frame|>{time:.1f}<|vision_start|>{pads}<|vision_end|>",
    "natural": "<{time:.1f} seconds>",
}
GUESS = "keye-1.5"
_PADS = "{pads}"
# How a time may be written: fixed point with a width and decimals of one digit.
_SPECIFICATION = re.compile(r"0?\d?(\.\d)?[fg]?")
# Seconds. A subtitle that begins this little after a frame belongs before it.
_SUBTITLE_SLACK = 1e-3


@dataclasses.dataclass(frozen=True)
class FrameText:
    """The text around the pad tokens of a frame.

    Attributes:
      name: the preset's name, or the format string.
      before, after: format strings of the text before and after the pad tokens; `time` is in seconds.
    """

    name: str
    before: str
    after: str

    @classmethod
    def parse(cls, value: str) -> FrameText:
        """Reads a preset's name or a format string.

        A format string has the field `{time}`, in seconds, such as `{time:.1f}`. `{pads}` in it is where the pad
        tokens stand, by default at its end.

        Raises:
          UserError: `value` is neither.
        """
        before, _, after = PRESETS.get(value, value).partition(_PADS)
        result = cls(value, before, after)
        try:
            valid = all(
                name is None or (name == "time" and not conversion and _SPECIFICATION.fullmatch(spec or ""))
                for text in (before, after)
                for _, name, spec, conversion in string.Formatter().parse(text)
            )
            # Without a field, or with a time cut to nothing, all frames would have the same text.
            valid = valid and result.at(1.0) != result.at(2.0)
        except (LookupError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"frame_format is {shorten(value)}; it must be a format string such as '<|frame|>{{time:.1f}}', or one "
                f"of {', '.join(PRESETS)}"
            )
        return result

    def at(self, time: float) -> tuple[str, str]:
        """The text before and after the pad tokens of the frame at `time` seconds."""
        return self.before.format(time=time), self.after.format(time=time)


class FrameEncoder:
    """Encodes the text of a video: that of its frames, and subtitles.

    Args:
      tokenizer: the checkpoint's. Control tokens are recognised in the text of frames, and never in subtitles.
      text: the text around a frame.
    """

    def __init__(self, tokenizer: SafeTokenizer, text: FrameText):
        self._tokenizer = tokenizer
        self.text = text

    def interleave(self, times: np.ndarray, cues: Sequence[Cue] = ()) -> Iterator[tuple[list[int], list[int]]]:
        """Yields the token ids before and after the pad tokens of each frame.

        A subtitle stands before the first frame at or after its start. Those that start after the last frame stand
        behind it.

        Args:
          times: float64 [n], seconds of the frames, increasing.
          cues: subtitles, by increasing start.
        """
        waiting = list(reversed(cues))
        for number, time in enumerate(times.tolist()):
            before: list[int] = []
            while waiting and waiting[-1].start <= time + _SUBTITLE_SLACK:
                before += self._cue(waiting.pop())
            head, tail = (self._tokenizer.encode_template(text) if text else [] for text in self.text.at(time))
            if number == len(times) - 1:
                while waiting:
                    tail += self._cue(waiting.pop())
            yield before + head, tail

    def _cue(self, cue: Cue) -> list[int]:
        return self._tokenizer.encode_text(f"{cue.text}\n")

    def num_tokens(self, times: np.ndarray, cues: Sequence[Cue] = ()) -> int:
        """Number of the tokens that `interleave` yields."""
        return sum(len(before) + len(after) for before, after in self.interleave(times, cues))

    def tokens_per_frame(self) -> float:
        """Mean number of text tokens a frame, for 120 frames at 2 a second."""
        return self.num_tokens(np.arange(120) / 2) / 120

"""What the body of a request to the OpenAI interface asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keye_jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body that was read.

    Attributes:
      requests: one for each prompt, in order. Only a text completion may have several.
      model: the name in the body; empty if it has none.
      stream: whether the answer is wanted as it comes.
      include_usage: whether a stream ends with a chunk of usage.
      ignored: names of fields that change nothing here although they may be meant to; sorted.
      echo: fields of the body that the answer repeats; those of the responses interface.
    """

    requests: tuple[Request, ...]
    model: str = ""
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    echo: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def request(self) -> Request:
        """The first request, which is the only one but for text completions."""
        return self.requests[0]

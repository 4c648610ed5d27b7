"""What the body of a request to the OpenAI interface asks for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from keye_jax.engine.request import Request, RequestError
from keye_jax.errors import UserError


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
      names: what the body calls fields of its requests, where that is another name: `messages[0].content` may be
        `instructions`.
    """

    requests: tuple[Request, ...]
    model: str = ""
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    echo: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def request(self) -> Request:
        """The first request, which is the only one but for text completions."""
        return self.requests[0]

    def in_its_words[E: (UserError, RequestError)](self, error: E) -> E:
        """An error about a request, whose sentence begins with the name that its field has in the body."""
        message = str(error)
        for name in sorted(self.names, key=len, reverse=True):
            if re.match(rf"{re.escape(name)}(?!\w)", message):
                told = self.names[name] + message[len(name) :]
                if isinstance(error, RequestError):
                    return RequestError(error.kind, told)
                field = error.field and error.field.replace(name, self.names[name], 1)
                return type(error)(told, field=field)
        return error

"""What all routes share: the engine and its state, and who may give it work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from keye_jax.engine.request import Request
from keye_jax.errors import UserError
from keye_jax.serve.errors import Refusal
from keye_jax.serve.files import FileStore
from keye_jax.serve.frames import FrameReader
from keye_jax.serve.metrics import Metrics
from keye_jax.serve.options import ServeOptions

STARTING_RETRY_S, DRAINING_RETRY_S, QUEUE_RETRY_S = 10.0, 30.0, 2.0


class Service:
    """The state of a server. Only its event loop changes it.

    Args:
      options: of the server.
      name: of the model.
      files: those that clients have sent.

    Attributes:
      engine: answers requests; None until it is ready.
      frames: shows what the model sees; None until the engine is ready.
      connections: how many connections are open.
      draining: whether no more work is taken.
      stalled: whether the engine has work and does not go on.
      outstanding: answers that are written or wait.
      created: seconds since 1970 of the start.
    """

    def __init__(self, options: ServeOptions, name: str, files: FileStore):
        self.options, self.name, self.files = options, name, files
        self.engine: Any = None
        self.frames: FrameReader | None = None
        self.metrics = Metrics(self)
        self.connections: Callable[[], int] = lambda: 0
        self.draining = self.stalled = False
        self.outstanding = 0
        self.created = int(time.time())

    def take(self, engine: Any) -> None:
        """Begins to answer with an engine that is warm."""
        self.frames = FrameReader(engine.processor.media)
        self.engine = engine

    def close(self) -> None:
        """Ends the processes that show frames, and removes files that do not stay."""
        if self.frames is not None:
            self.frames.close()
        self.files.close()

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return self.engine.processor.detokenize([token], skip_special_tokens=False)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine is not None and not self.draining and self.alive

    @property
    def alive(self) -> bool:
        """Whether the engine goes on, or is not there yet."""
        return not self.stalled and (self.engine is None or not self.engine.ended)

    def check_ready(self) -> None:
        """Raises Refusal if no work is taken now."""
        if self.draining:
            raise Refusal(503, "the server is about to end", code="draining", retry_after=DRAINING_RETRY_S)
        if self.engine is None:
            raise Refusal(503, "the model is not ready yet", code="starting", retry_after=STARTING_RETRY_S)
        if not self.alive:
            raise Refusal(503, "the engine does not go on", code="stalled", retry_after=DRAINING_RETRY_S)

    def admit(self, answers: int) -> Admission:
        """Takes a request of so many answers. Raises Refusal if there are too many already."""
        self.check_ready()
        most = self.engine.options.rows + self.options.max_queue
        if answers > most:
            raise Refusal(400, f"the request has {answers} answers; it must have at most {most}", param="n")
        if self.outstanding + answers > most:
            message = f"{self.outstanding} answers are written or wait; there may be {most} at once"
            raise Refusal(429, message, code="queue_full", retry_after=QUEUE_RETRY_S)
        return Admission(self, answers)

    def check_length(self, request: Request) -> None:
        """Raises UserError if a request asks for longer answers than this server writes."""
        most = self.options.max_tokens
        if most is not None and (request.max_tokens or 0) > most:
            raise UserError(f"max_tokens is {request.max_tokens}; it must be at most {most} here", field="max_tokens")

    def submit(self, request: Request) -> Any:
        """Gives a request to the engine, with the paths of uploaded files in the place of their names.

        Raises:
          UserError: a file is not there.
          RequestError: the engine takes no requests.
        """
        if request.messages is not None:
            request = dataclasses.replace(request, messages=self.files.resolve(request.messages))
        return self.engine.submit(request)


class Admission:
    """Answers that are counted until `close`."""

    def __init__(self, service: Service, answers: int):
        self._service, self._answers = service, answers
        service.outstanding += answers

    def close(self) -> None:
        """Does nothing the second time."""
        self._service.outstanding -= self._answers
        self._answers = 0

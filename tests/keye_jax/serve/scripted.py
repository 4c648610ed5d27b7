"""A double of what a model writes: texts are scripted, and all else is an engine's own."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from keye_jax.engine.request import Piece, Request, Result


class ScriptedEngine:
    """An engine whose answers are scripted. It plans, decodes, reads and caches prompts as the one inside does.

    Args:
      engine: the one inside, which draws a few tokens for each answer.
      reasoning, text: of each answer.
      pause_s: seconds between two pieces.

    Attributes:
      processor: that of the one inside.
      asked: all requests.
      cancelled: how many of their answers were cut off.
    """

    def __init__(self, engine: Any, reasoning: str, text: str, pause_s: float = 0.0):
        self._engine = engine
        self.reasoning, self.text, self.pause_s = reasoning, text, pause_s
        self.processor = engine.processor
        self.asked: list[Request] = []
        self.cancelled = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request) -> Any:
        self.asked.append(request)
        inside = dataclasses.replace(request, max_tokens=2)
        return _Handle(self, self._engine.submit(inside))


class _Handle:
    """A handle that writes the script once the engine inside has written."""

    def __init__(self, engine: ScriptedEngine, inside: Any):
        self._engine, self._inside = engine, inside
        self._written = False

    async def __aiter__(self):
        await self._inside
        for text, reasoning in ((self._engine.reasoning, True), (self._engine.text, False)):
            for place in range(0, len(text), 4):
                yield Piece(0, text[place : place + 4], reasoning)
                await asyncio.sleep(self._engine.pause_s)
        self._written = True

    def __await__(self):
        return self._result().__await__()

    async def _result(self) -> Result:
        result = await self._inside
        engine = self._engine
        tokens = len(engine.reasoning + engine.text) // 4
        choice = dataclasses.replace(
            result.choices[0],
            text=engine.text,
            reasoning=engine.reasoning,
            finish_reason="stop",
            parts=None,
        )
        usage = dataclasses.replace(result.usage, completion=tokens, reasoning=len(engine.reasoning) // 4)
        return dataclasses.replace(result, choices=(choice,), usage=usage)

    @property
    def done(self) -> bool:
        return self._written

    def cancel(self) -> None:
        self._engine.cancelled += 1
        self._inside.cancel()

"""What an engine tells of itself: counts for metrics, and whether it gets on."""

from __future__ import annotations

import dataclasses

from keye_jax.engine.plan import Stats


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts for metrics.

    Attributes:
      scheduler: those of the scheduler: sequences, pages, tokens of prompts and of the prefix cache, preemptions.
      compilations: programs compiled since `warmup`, which should be none.
      steps: steps so far.
      embedding_hits: media whose embeddings were kept.
      requests, waiting: requests that have not ended, and those of them of which no prompt is being read, and no answer
        is written, yet.
      generated_tokens: of all answers so far.
    """

    scheduler: Stats
    compilations: int
    steps: int
    embedding_hits: int
    requests: int
    waiting: int
    generated_tokens: int


@dataclasses.dataclass(frozen=True)
class EngineProgress:
    """Whether an engine gets on. A watchdog may end one that is `busy` and whose `at` is too long ago.

    Attributes:
      steps: that are done.
      at: when the last step was done, or the engine began to have work, by `time.monotonic`.
      busy: whether there is work. Waiting for media is none.
    """

    steps: int
    at: float
    busy: bool

"""Runs a job of fakes again and again, kills it each time, and lets the last run end.

The arguments are the input, the output and a number of kills.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from keye_jax.jobs.batch import Batch
from keye_jax.jobs.journal import Journal
from keye_jax.jobs.lines import Shard, count_lines, read_lines
from keye_jax.jobs.report import Progress, Tally
from tests.keye_jax.jobs.fake import FakeEngine, answerer


def run(source: Path, output: Path) -> None:
    digest, lines = count_lines(source)
    key = {"input": digest, "checkpoint": "", "options": {}}
    with Journal(output, key) as journal, source.open("rb") as file, FakeEngine(0.02) as engine:
        tally = Tally(lines, journal.succeeded, journal.failures)
        job = Batch(
            answerer(engine), journal, read_lines(file, Shard()), tally, Progress(), concurrency=16, grace_s=1.0
        )
        asyncio.run(job.run())


def main() -> None:
    source, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    draws = random.Random(0)
    output.touch()
    killed = 0
    for last in [False] * kills + [True]:
        child = os.fork()
        if not child:
            try:
                run(source, output)
            finally:
                os._exit(0)
        if not last:
            # At a random moment, but not before the job has done something.
            size = output.stat().st_size + draws.randint(0, source.stat().st_size // kills // 2)
            while output.stat().st_size <= size and not os.waitid(
                os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(draws.uniform(0, 0.002))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    print(killed)


if __name__ == "__main__":
    main()

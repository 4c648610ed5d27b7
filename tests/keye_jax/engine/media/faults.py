"""A processor that fails in ways that no file in the tests makes it fail. Workers import it."""

import dataclasses
import os
import signal
import time

from keye_jax.errors import UserError
from keye_jax.processor import Processor, VideoPlan


@dataclasses.dataclass(frozen=True, eq=False)
class FaultyVideo(VideoPlan):
    """After two frames something happens."""

    fault: str = ""

    def pixels(self, which, *, threads=0):
        for number, item in enumerate(super().pixels(which, threads=threads)):
            if number == 2:
                happen(self.fault)
            yield item


class FaultyProcessor(Processor):
    """Does what the option `fault` of a request says: "plan crash" while it plans, "decode crash" while it decodes."""

    def plan(self, messages, *, fault="", **options):
        when, _, what = fault.partition(" ")
        if when == "plan":
            happen(what)
        plan = super().plan(messages, **options)
        if when != "decode":
            return plan
        faulty = [FaultyVideo(**vars(video), fault=what) for video in plan.videos]
        return dataclasses.replace(plan, videos=tuple(faulty))


def happen(what):
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "hang":
        time.sleep(1000)
    elif what == "endless":
        while True:
            pass
    elif what == "refuse":
        raise UserError("the video is not to be decoded")
    else:
        raise LookupError(f"nothing is called {what}")

"""Several processes, one job: starting `jax.distributed`, and ending all of them when one is lost.

JAX tells processes apart and carries their data. What it says when one of them dies is the number of a task, after a
while, or nothing until a collective times out; so each process also keeps a sign of life in JAX's own key-value store
and ends with a sentence that names the host whose sign is missing.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn

from keye_jax import interrupts
from keye_jax.errors import UserError, shorten
from keye_jax.runtime import launchers, rendezvous

SILENCE_S = 10.0
"""Seconds without a sign of life after which a process is lost."""

START_S = 60.0
"""Seconds that the others may take to arrive, unless the user says otherwise; that is at most `MOST_START_S`."""

MOST_START_S = 7 * 24 * 3600

_SIGN_S = 1.0
# After this silence JAX aborts all. Up to half of it may be over when a process dies: twice what ending it here takes.
_HEARTBEAT_S = 60
_SHUTDOWN_S = MOST_START_S  # whoever is lost before is named by its silence
_ALIVE, _DONE, _FAILED, _ENDED = "keye/alive/", "done", "failed: ", "ended: "
_TOLD, _PASSED_ON = "keye/told/", "keye/passed_on/"


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = START_S,
    lost_code: int = 1,
) -> None:
    """Joins this process to the others of its job; does nothing where there is only one.

    Arguments that are left out are taken from the environment, as `launchers.find` reads it. "auto" for `coordinator`,
    alone, says that there are others: where the environment does not name them, JAX is asked, which knows the workers
    of a TPU machine outside GKE. Afterwards only process 0 prints, and an error that nothing catches ends all of them.

    Args:
      coordinator: "HOST:PORT" of process 0, the same for all processes.
      processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds that the others may take to arrive.
      lost_code: the exit code of the others if one is lost or fails.

    Raises:
      UserError: some of the arguments are missing or impossible, or the others do not arrive.
    """
    if not 0 < timeout <= MOST_START_S:
        raise UserError(f"--startup-timeout is {timeout:g}; it must be above 0, and at most {MOST_START_S:,} seconds")
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if coordinator == "auto" and processes is None and process_id is None:
        launch = launchers.find(os.environ) or _asked_of_jax(timeout)
    elif any(value is not None for value in given.values()):
        launch = _checked(given, os.environ)
    else:
        launch = launchers.find(os.environ)
    if launch is None or launch.processes == 1:
        return
    rendezvous.meet(launch.coordinator, launch.processes, launch.process_id, timeout)

    import jax

    # With the preemption service on, a signal to terminate is noted and nothing happens.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process_id,
            # As JAX has it under Slurm and Open MPI; a variable of its own goes first.
            local_device_ids=None if launch.local is None or os.environ.get("JAX_LOCAL_DEVICE_IDS") else [launch.local],
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes of this job cannot find each other: {str(error).splitlines()[0]}") from error
    global _job
    _job = _Job(jax.process_index(), jax.process_count(), lost_code)
    interrupts.announce(_job.announce)


def _checked(given: dict[str, Any], environment: Mapping[str, str]) -> launchers.Launch:
    if given["--coordinator"] == "auto":
        raise UserError("--coordinator is 'auto'; it must be HOST:PORT of process 0, or auto, alone")
    address, processes, process_id = launchers.completed(*given.values(), environment=environment)
    if address is None or processes is None or process_id is None:
        values = zip(given, (address, processes, process_id), strict=True)
        missing = [flag for flag, value in values if value is None]
        raise UserError(f"{' and '.join(missing)} must be given too: {', '.join(given)} belong together")
    address = launchers.check_address("--coordinator", address.strip())
    if processes < 1:
        raise UserError(f"--processes is {processes}; it must be at least 1")
    if not 0 <= process_id < processes:
        raise UserError(f"--process-id is {process_id}; it must be from 0 to --processes - 1 = {processes - 1}")
    return launchers.Launch(address, processes, process_id)


def _asked_of_jax(timeout: float) -> launchers.Launch:
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, max(1, round(timeout)))
    except Exception as error:
        raise UserError(f"--coordinator is 'auto', and JAX does not find the others: {shorten(str(error))}") from error
    address, processes, process_id, local = found
    if address is None or processes is None or process_id is None:
        raise UserError(
            "--coordinator is 'auto', and neither a launcher's variables nor a TPU machine's data say where the others "
            "are; give --coordinator HOST:PORT, --processes and --process-id"
        )
    return launchers.Launch(address, processes, process_id, local[0] if local else None)


def process_count() -> int:
    """How many processes `start` has joined."""
    return 1 if _job is None else len(_job.names)


def is_main() -> bool:
    """Whether this process prints and writes files: process 0, or the only one."""
    return _job is None or _job.process_id == 0


def finish() -> None:
    """Says that this process has done its part; it may then go before the others."""
    if _job is not None:
        _job.sign = _DONE
        _job.send_sign()


def store() -> Any:
    """JAX's key-value store, which all processes of a job share: its client, after `start`."""
    from jax._src import distributed

    return distributed.global_state.client


def tell(word: str) -> str:
    """A word of process 0, in every process: the others wait for it, and get "" if process 0 is done without one."""
    if _job is None:
        return word
    if _job.process_id == 0:
        store().key_value_set(f"{_TOLD}word", word)
        return word
    while True:
        if told := store().key_value_dir_get(_TOLD):
            return told[0][1]
        if _job.signs().get(0) == _DONE:
            return ""
        time.sleep(_SIGN_S)


def pass_on(number: int) -> None:
    """Has process 0 end the job in its own way, since this process, which goes on until then, has got a signal."""
    if _job is not None:
        store().key_value_set(f"{_PASSED_ON}{_job.process_id}", str(int(number)), allow_overwrite=True)


def take_passed_on(function: Callable[[int], None]) -> None:
    """Has process 0 call a function, from a thread, with the first signal that is passed on.

    Otherwise it gets that signal itself.
    """
    if _job is not None:
        _job.take_passed_on = function


def crash(error: Exception) -> None:
    """Ends this process after an error of one of its threads, and the others with it; returns where there are none."""
    if _job is not None:
        _job.crash(type(error), error, error.__traceback__)


def fail(message: str, code: int) -> None:
    """Ends this process for a reason that it knows, and the others with it; returns only where there are no others.

    When all fail alike, as over a mistake in their arguments, process 0 alone says so.
    """
    if _job is None:
        return
    _job.fail(message)
    if _job.process_id:
        time.sleep(2 * _SIGN_S)
        if _job.signs().get(0) != _job.sign:
            _job.say(f"{_job.names[_job.process_id]}: {message}")
    else:
        _job.say(message)
        # The others read the reason before the store goes with this process.
        time.sleep(3 * _SIGN_S)
    os._exit(code)


class _Job:
    """This process among the others.

    Attributes:
      process_id: which one this is.
      names: of all processes, with their hosts.
      errors: where messages go; sys.stdout and sys.stderr lead nowhere but in process 0.
      take_passed_on: what process 0 does with a signal that another has passed on.
      sign: what the others see of this one: a counter, or that it is done or has failed.
    """

    def __init__(self, process_id: int, processes: int, lost_code: int):
        self.process_id, self.sign = process_id, "0"
        self.errors = os.fdopen(os.dup(2), "w", buffering=1)
        self.take_passed_on: Callable[[int], None] = functools.partial(os.kill, os.getpid())
        self._lost_code = lost_code
        self._client = store()
        self._client.key_value_set(f"keye/name/{process_id}", f"process {process_id} ({socket.gethostname()})")
        self._client.wait_at_barrier("keye/start", round(START_S) * 1000)
        names = self._read("keye/name/")
        self.names = [names[i] for i in range(processes)]
        # Libraries below Python write to standard output too, which is for the answer.
        answer = os.dup(1) if process_id == 0 else os.open(os.devnull, os.O_WRONLY)
        sys.stdout = os.fdopen(answer, "w", buffering=1)
        os.dup2(2, 1)
        if process_id:
            sys.stderr = sys.stdout
            self._name_the_coordinator_when_jax_aborts()
        # Left to itself, Python would wait at its exit for the others, who may be waiting for this process.
        sys.excepthook = self.crash
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self._leave)

    def _leave(self) -> None:
        """Waits for the others and stops watching: a thread inside JAX while Python ends would abort the process."""
        import jax

        jax.distributed.shutdown()
        self._over.set()
        self._watcher.join(5 * _SIGN_S)
        if self.process_id:
            ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL

    def say(self, message: str) -> None:
        # Not through the file's buffer, in whose midst a signal may have come.
        os.write(self.errors.fileno(), f"keye-jax: {message}\n".encode())

    def send_sign(self) -> None:
        self._client.key_value_set(f"{_ALIVE}{self.process_id}", self.sign, allow_overwrite=True)

    def signs(self) -> dict[int, str]:
        """The last sign of each process."""
        return self._read(_ALIVE)

    def fail(self, message: str) -> None:
        self.sign = f"{_FAILED}{message}"
        self.send_sign()

    def announce(self, reason: str, code: int) -> bool:
        """Has the others end with this process, which a signal has told to end.

        Ctrl-C tells all of them at once, and process 0 alone says so; a pod's SIGTERM is said where it arrives.
        """
        self.sign = f"{_ENDED}{code} was {reason}"
        self.send_sign()
        said = f"{self.names[self.process_id]} was {reason}"
        everywhere = code == interrupts.SIGNALLED + signal.SIGINT
        if self.process_id == 0:
            self.say(reason if everywhere else said)
            time.sleep(3 * _SIGN_S)  # the others read it before the store goes with this process
        else:
            if everywhere:
                time.sleep(2 * _SIGN_S)
            if not everywhere or self.signs().get(0) != self.sign:
                self.say(said)
        return True

    def _read(self, folder: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(folder)}

    def _watch(self) -> None:
        seen, silence, last = {}, dict.fromkeys(range(len(self.names)), 0.0), time.monotonic()
        passed_on: dict[int, str] = {}
        while not self.sign.startswith((_FAILED, _ENDED)) and not self._over.wait(_SIGN_S):
            try:
                if self.sign.isdecimal():
                    self.sign = str(int(self.sign) + 1)
                self.send_sign()
                signs = self.signs()
                if self.process_id == 0 and not passed_on and (passed_on := self._read(_PASSED_ON)):
                    process_id, number = next(iter(passed_on.items()))
                    self.say(f"{self.names[process_id]} was {interrupts.reason(int(number))}")
                    self.take_passed_on(int(number))
            except Exception:
                signs = seen  # process 0, which has the store, is the first to be missed
            # A host too busy to let this process have its turn may keep the others waiting too, who are not lost.
            passed, last = min(time.monotonic() - last, 2 * _SIGN_S), time.monotonic()
            for process_id, name in enumerate(self.names):
                sign = signs.get(process_id, "")
                known = sign == _DONE or sign != seen.get(process_id, "")
                silence[process_id] = 0 if known else silence[process_id] + passed
                if process_id == self.process_id or self.sign.startswith((_FAILED, _ENDED)) or interrupts.told():
                    continue
                if sign.startswith(_FAILED):
                    self._end(f"{name} failed: {sign.removeprefix(_FAILED)}", self._lost_code)
                if sign.startswith(_ENDED):
                    code, _, why = sign.removeprefix(_ENDED).partition(" ")
                    self._end(f"{name} {why}", int(code))
                if silence[process_id] > SILENCE_S:
                    self._end(f"{name} is lost: no sign of life for {SILENCE_S:.0f} s", self._lost_code)
            seen = signs

    def _end(self, why: str, code: int) -> NoReturn:
        self.say(f"{why}; {self.names[self.process_id]} ends")
        if self.process_id == 0:
            time.sleep(3 * _SIGN_S)  # until the others have seen it too: with this process their connection breaks
        os._exit(code)

    def crash(self, _: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
        """Ends this process after an error that nothing caught.

        A process whose partner dies in the middle of a collective gets an error too; so the partner has its time to be
        found missing, and is then named, before the error is taken for this process's own.
        """
        interrupts.end_if_told()
        time.sleep(SILENCE_S + 3 * _SIGN_S)
        self.fail(f"{type(error).__name__}: {error}".splitlines()[0])
        self.errors.write("".join(traceback.format_exception(error.with_traceback(trace))))
        self.say(f"{self.names[self.process_id]} failed")
        time.sleep(3 * _SIGN_S)
        os._exit(1)

    def _name_the_coordinator_when_jax_aborts(self) -> None:
        """JAX aborts a process at once, with a message for its developers, when the connection to process 0 breaks."""

        def handle(_: int) -> None:
            self._end(f"{self.names[0]} is lost: the connection to it broke", self._lost_code)

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)


_job: _Job | None = None

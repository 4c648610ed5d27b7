"""A signal ends a command within seconds, with one line, in moments where KeyboardInterrupt alone does not."""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests.interrupts import attempt, commands
from tests.keye_jax.processes import ROOT

_START = """
import sys
from keye_jax import interrupts
interrupts.handle()
def ready():
    print("ready", flush=True)
"""

MOMENTS = {
    "in native code": """
import hashlib
with interrupts.raised():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
""",
    "swallowed": """
import time
with interrupts.raised():
    ready()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
""",
    "taken for another error": """
import time
with interrupts.raised():
    ready()
    try:
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise ValueError("not this") from error
""",
    "in a destructor, while threads fail": """
import threading, time
class Held:
    def __del__(self):
        ready()
        time.sleep(60)
def fail():
    threading.Event().wait(0.5)
    raise ValueError("not this")
with interrupts.raised():
    threading.Thread(target=fail).start()
    held = Held()
    del held
    threading.Event().wait(0.1)
    while threading.active_count() > 2:
        time.sleep(0.1)
""",
    "at an exit that hangs": """
import atexit, threading, time
atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()
with interrupts.raised():
    ready()
""",
    "during imports": """
import time
ready()
time.sleep(60)
""",
    "during a command's import of native code": """
import importlib.abc, importlib.util, os, time
class Native(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "native" else None
    def exec_module(self, module):
        try:
            ready()
            time.sleep(60)
        except BaseException:  # as nanobind's enumerations do
            os.abort()
sys.meta_path.insert(0, Native())
with interrupts.raised():
    import native
""",
}


def begun(program):
    process = subprocess.Popen(
        [sys.executable, "-c", _START + program],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def ended(process, seconds=30):
    try:
        return *process.communicate(timeout=seconds), process.returncode
    finally:
        process.kill()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_line_says_it_and_the_process_ends(moment, number):
    process = begun(MOMENTS[moment])
    time.sleep(0.3)  # it is in the midst of it
    process.send_signal(number)
    _, err, code = ended(process)
    reason = {signal.SIGINT: "interrupted", signal.SIGTERM: "told to end (SIGTERM)"}[number]
    assert (code, err) == (128 + number, f"keye-jax: {reason}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_done_is_done_while_python_ends(number):
    program = """
import os, time
class Held:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ready\\n")
        sleep(1)
held = Held()
"""
    process = begun(program)
    process.send_signal(number)
    _, err, code = ended(process)
    assert (code, err) == (0, "")


def test_the_second_ctrl_c_does_not_wait_for_what_is_being_closed():
    program = """
import time
with interrupts.raised():
    try:
        ready()
        time.sleep(60)
    finally:
        ready()
        interrupts._PATIENCE_S = 60
        time.sleep(60)
"""
    process = begun(program)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err, code = ended(process)
    assert (code, err) == (130, "keye-jax: interrupted\n")


def test_a_signal_is_given_to_a_function():
    program = """
import hashlib, os
with interrupts.raised(), interrupts.given_to(lambda number: os._exit(number)):
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    process = begun(program)
    process.send_signal(signal.SIGTERM)
    _, err, code = ended(process)
    assert (code, err) == (signal.SIGTERM, "")


def test_signals_end_the_process_that_are_no_longer_given_to_a_function():
    program = """
import time
with interrupts.raised():
    with interrupts.given_to(print):
        pass
    ready()
    time.sleep(60)
"""
    process = begun(program)
    process.send_signal(signal.SIGINT)
    out, err, code = ended(process)
    assert (code, out, err) == (130, "", "keye-jax: interrupted\n")


def test_the_second_signal_to_anothers_handler_ends_the_process():
    program = """
import hashlib, signal
signal.signal(signal.SIGINT, lambda *_: None)
with interrupts.raised(), interrupts.ended_by_second():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    process = begun(program)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err, code = ended(process)
    assert (code, err) == (130, "keye-jax: interrupted\n")


def test_the_line_stands_alone_after_text_that_was_not_finished():
    program = """
import sys, time
with interrupts.raised():
    interrupts.set_unfinished(True)
    print("a thought", end="", file=sys.stderr, flush=True)
    ready()
    time.sleep(60)
"""
    process = begun(program)
    process.send_signal(signal.SIGINT)
    _, err, code = ended(process)
    assert (code, err) == (130, "a thought\nkeye-jax: interrupted\n")


def test_a_signal_after_the_command_has_said_how_it_stopped_adds_no_line():
    program = """
import time
with interrupts.raised():
    interrupts.say_stopped(2, " after step 3")
    ready()
    time.sleep(60)
"""
    process = begun(program)
    process.send_signal(signal.SIGINT)
    _, err, code = ended(process)
    assert (code, err) == (130, "keye-jax: stopped by SIGINT after step 3\n")


def test_a_signal_waits_until_a_child_is_known():
    program = """
import time
interrupts._PATIENCE_S = 60
with interrupts.raised(), interrupts.kept_from_children():
    ready()
    time.sleep(1)  # the thread of signals gets it
    print("known", flush=True)
"""
    process = begun(program)
    process.send_signal(signal.SIGINT)
    out, err, code = ended(process)
    assert (code, out, err) == (130, "known\n", "keye-jax: interrupted\n")


def test_little_is_imported_before_signals_are_handled():
    program = "import sys, keye_jax.interrupts; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOT)}
    # Without site-packages, where an installed package may have anything imported.
    result = subprocess.run([sys.executable, "-S", "-c", program], env=environment, capture_output=True, text=True)
    assert "keye_jax.interrupts" in result.stdout.split()
    assert not {"typing", "pathlib", "re", "inspect", "subprocess"} & set(result.stdout.split())


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_child_does_not_get_the_signal_and_ends_with_its_parent(ends_itself):
    program = f"""
import os, signal, subprocess, time
reading, writing = os.pipe()
child = f'''
import sys, time
from keye_jax import interrupts
{"interrupts.end_with({reading})" if ends_itself else ""}
print("ready", flush=True)
time.sleep(60)
'''
with interrupts.kept_from_children(), interrupts.raised():
    process = subprocess.Popen([sys.executable, "-c", child], pass_fds=[reading])
    {"" if ends_itself else "interrupts.kill_at_end(process)"}
os.close(reading)
with interrupts.raised():
    time.sleep(60)
"""
    process = begun(program)
    process.send_signal(signal.SIGINT)
    # The child has the same pipes, which are read to their end.
    _, err, code = ended(process)
    assert (code, err) == (130, "keye-jax: interrupted\n")


def test_a_signal_that_the_parent_ignores_stays_ignored():
    program = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.handle()
ready()
sys.exit(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)
"""
    process = begun(program)
    _, err, code = ended(process)
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_commands_are_interrupted_at_random_moments(tmp_path):
    """A few tries; `python -m tests.interrupts` makes more, of all commands."""
    chosen = commands(tmp_path)
    draw = random.Random(time.monotonic())
    for name in ("convert", "frames", "generate"):
        what, wrong = attempt(chosen[name], 6.0, tmp_path / f"{name}.out", draw)
        assert not wrong, f"{name} {what}: {wrong}"

import gc
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.compiler_flags import COMPILER_FLAGS

# On Linux a process has 65,530 mappings of memory, and a compiled program takes about 20. When they are used up, XLA
# logs "Cannot allocate memory" and the process ends with a segmentation fault.
_MOST_MAPPINGS = 15_000

# Layouts of up to eight devices are tested on virtual ones.
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), COMPILER_FLAGS, "--xla_force_host_platform_device_count=8")
)
# Compiled programs are kept beside the checkout, not in the user's cache. Workers and the processes that tests start
# have many small ones in common.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# A shell has processes that it starts in the background ignore Ctrl-C, and those of tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--interpret-all", action="store_true", help="interpret every test of what is for a TPU: minutes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Puts the long files first: while one ends, short ones keep the other cores busy.

    They are those with slow tests, and then those with few tests: the files with hundreds take seconds.
    """
    count = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, count[item.path], item.path))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Forgets the compiled programs of earlier test files when there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden():
    """Directory of recorded reference data."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def quick_to_compile():
    """For many programs, each run once.

    Such programs round differently, and later files of the same process use them too, if they ask for the same ones.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compiled():
    """The names of the programs that are compiled during a test, also of those that the cache has."""
    import jax

    names = []

    def listen(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)

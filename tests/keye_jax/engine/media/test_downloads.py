"""Folders for downloads: those of living processes stay, those of killed ones go."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keye_jax.engine.media import downloads
from keye_jax.engine.media.downloads import DownloadFolder

ROOT = Path(__file__).parents[4]
PROGRAM = """
import time
from keye_jax.engine.media.downloads import DownloadFolder
folder = DownloadFolder()
(folder.path / "clip.mp4").touch()
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary ones."""
    monkeypatch.setattr(downloads.tempfile, "tempdir", str(tmp_path))
    return tmp_path


NO_LOCKS = """
import errno, fcntl, os
def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = no_locks
"""


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_process_leaves_nothing_for_long(temporary, monkeypatch, locks):
    program = PROGRAM
    if not locks:
        program = NO_LOCKS + PROGRAM
        monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # to be put back afterwards
        exec(NO_LOCKS, {})
    others = [temporary / "keye-jax-demo", temporary / "other"]
    for other in others:
        other.mkdir()
    (temporary / "keye-jax-file").touch()
    kept = set(temporary.iterdir())
    environment, command = os.environ | {"TMPDIR": str(temporary)}, [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"there\n"
            (theirs,) = set(temporary.iterdir()) - kept
            DownloadFolder().close()
            assert (theirs / "files" / "clip.mp4").exists(), "its process lives"
        finally:
            process.send_signal(signal.SIGKILL)
    assert theirs.exists()
    mine = DownloadFolder()
    assert not theirs.exists() and list(mine.path.iterdir()) == []
    second = DownloadFolder()
    assert mine.path.exists() and second.path.exists(), "both are of this process"
    mine.close()
    second.close()
    assert set(temporary.iterdir()) == kept

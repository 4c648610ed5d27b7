"""What is wrong with one request costs only that request."""

import http.server
import os
import signal
import threading
import time

import numpy as np
import pytest

from keye_jax.engine.media import Finished, MediaWorkers, Planned
from tests.keye_jax.engine.media.conftest import Told, follow, image, text, user, video
from tests.keye_jax.engine.media.faults import FaultyProcessor

FAULTS = {
    "plan crash": ("media", "the media of the request cannot be read; the decoder crashed (SIGSEGV)"),
    "decode crash": ("media", "messages[0].content[0].video cannot be read; the decoder crashed (SIGSEGV)"),
    "decode exit": ("media", "messages[0].content[0].video cannot be read; the decoder crashed (exit code 3)"),
    "plan hang": ("timeout", "the media of the request took too long; each step of reading it must take at most 4 s"),
    "decode endless": (
        "timeout",
        "messages[0].content[0].video took too long; each step of reading it must take at most 4 s",
    ),
    "decode refuse": ("media", "the video is not to be decoded"),
    "decode other": ("internal", "reading the media failed: LookupError: nothing is called other"),
}


@pytest.fixture(scope="module")
def faulty(checkpoint, config):
    processor = FaultyProcessor.from_checkpoint(checkpoint, config, allow_remote=True)
    with MediaWorkers(processor, 2, 8 << 20, piece_patches=1024, timeout=4) as workers:
        yield workers


def test_only_the_requests_at_fault_fail(faulty, processor, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:1000])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    asked = {fault: (user(video(clip)), {"fault": fault}) for fault in FAULTS}
    asked |= {f"good {number}": (user(video(clip)), {}) for number in range(4)}
    asked |= {
        "no index": (user(video(tmp_path / "broken.mp4")), {}),
        "no picture": (user(text("?"), image(tmp_path / "broken.png")), {}),
        "no file": (user(video(tmp_path / "none.mp4")), {}),
        "no server": (user(video("http://127.0.0.1:9/a.mp4")), {}),
        "no message": ([{"role": "nobody"}], {}),
        "no option": (user(video(clip, fps=-1)), {}),
        "no function": ("not messages", {}),
    }
    for name, (messages, options) in asked.items():
        faulty.submit(name, messages, options)
    told = follow(faulty, asked)
    for name, (kind, message) in FAULTS.items():
        assert (told[name].broken.kind, told[name].broken.message) == (kind, message)
        assert told[name].broken.job_id == name
    kinds = {name: one.broken and one.broken.kind for name, one in told.items() if name not in FAULTS}
    assert kinds == {
        **{f"good {number}": None for number in range(4)},
        **{"no index": "media", "no picture": "media", "no file": "media", "no option": "invalid"},
        **{"no server": "unreachable", "no message": "invalid", "no function": "invalid"},
    }
    inputs = processor.process(processor.plan(user(video(clip))))
    for number in range(4):
        np.testing.assert_array_equal(told[f"good {number}"].all_patches("video"), inputs.video_patches)
    assert faulty.arena.used == 0


def test_a_worker_that_is_killed_while_it_waits_is_replaced(faulty, clip):
    follow_one(faulty, clip, "before")
    for number in range(3):
        for pid in faulty.worker_pids:
            os.kill(pid, signal.SIGKILL)
        follow_one(faulty, clip, f"after {number}")


def follow_one(workers, clip, name):
    workers.submit(name, user(video(clip)))
    assert follow(workers, [name])[name].decoded


def test_pieces_told_before_a_crash_stay_readable(faulty, processor, clip):
    faulty.submit("a", user(video(clip, fps=10)), {"fault": "decode crash"})
    held, broken = [], None
    begin = time.monotonic()
    while broken is None:
        assert time.monotonic() < begin + 30
        for event in faulty.poll():
            if isinstance(event, Planned):
                faulty.decode("a")
            elif hasattr(event, "patches"):
                held.append(event)
            else:
                broken = event
        time.sleep(0.002)
    follow_one(faulty, clip, "b")
    inputs = processor.process(processor.plan(user(video(clip, fps=10))))
    for event in held:
        start = event.first_frame * len(event.patches) // event.frames
        np.testing.assert_array_equal(event.patches, inputs.video_patches[start : start + len(event.patches)])
        event.release()
    assert faulty.arena.used == 0


def test_slow_plans_do_not_hold_others_up(checkpoint, config, clip):
    processor = FaultyProcessor.from_checkpoint(checkpoint, config)
    with MediaWorkers(processor, 1, 8 << 20, timeout=60) as workers:
        for number in range(4):
            workers.submit(number, user(video(clip)), {"fault": "plan hang"})
        workers.submit("quick", user(video(clip)))
        told = Told()
        begin = time.monotonic()
        while told.decoded is None:
            assert time.monotonic() < begin + 60
            for event in workers.poll():
                told.take(event)
                if isinstance(event, Planned):
                    workers.decode(event.job_id)
            time.sleep(0.01)
        assert len(workers.worker_pids) <= 6


class _Endless(http.server.BaseHTTPRequestHandler):
    """A video that never ends."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
                time.sleep(0.01)
        except OSError:
            pass

    def log_message(self, format, *args):
        pass


def test_an_endless_download_is_given_up_and_removed(faulty, clip):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        faulty.submit("endless", user(video(f"http://127.0.0.1:{server.server_address[1]}/a.mp4")))
        faulty.submit("good", user(video(clip)))
        told = follow(faulty, ["endless", "good"])
        server.shutdown()
    assert told["endless"].broken.kind == "timeout"
    assert told["good"].decoded
    assert not list(faulty.folder.iterdir())


class _File(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format, *args):
        pass


def test_a_download_lives_until_the_request_ends(faulty, processor, clip):
    _File.content = clip.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _File) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.mp4"
        names = ["a", "b", "c"]
        for name in names:
            faulty.submit(name, user(video(url)))
        planned = follow(faulty, names, until=lambda told: all(one.prompt for one in told.values()), decode=False)
        server.shutdown()
    faulty.submit("crash", user(video(clip)), {"fault": "plan crash"})
    assert follow(faulty, ["crash"])["crash"].broken
    for pid in faulty.worker_pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    for name in ("a", "c"):
        faulty.decode(name)
    told = follow(faulty, ["a", "c"], told=planned)
    inputs = processor.process(processor.plan(user(video(clip))))
    for name in ("a", "c"):
        assert told[name].broken is None
        np.testing.assert_array_equal(told[name].all_patches("video"), inputs.video_patches)
    assert [path.is_dir() for path in faulty.folder.iterdir()] == [True]
    faulty.cancel("b")
    assert not list(faulty.folder.iterdir())


def test_a_hung_request_can_be_cancelled(checkpoint, config, clip):
    processor = FaultyProcessor.from_checkpoint(checkpoint, config)
    with MediaWorkers(processor, 1, 8 << 20, timeout=60) as workers:
        workers.submit("hung", user(video(clip)), {"fault": "decode hang"})
        follow(workers, ["hung"], until=lambda told: told["hung"].prompt is not None)
        time.sleep(1)
        workers.cancel("hung")
        workers.submit("next", user(video(clip)))
        begin = time.monotonic()
        assert follow(workers, ["next"])["next"].decoded
        assert time.monotonic() - begin < 20
        assert not any(isinstance(event, Finished) for event in workers.poll())

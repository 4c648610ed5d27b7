"""A few of the mutated requests of `python -m tests.fuzz_server`."""

import shutil

from tests.fuzz_server import Fuzz, bodies, check_end, held, warm


def test_mutated_requests(serving, engine, files, tmp_path):
    for name in ("clip.mp4", "picture.png"):
        shutil.copy(files / name, tmp_path)
    server = serving(max_tokens=8, stall_s=5)
    asked = bodies(tmp_path)
    warm(server, asked)
    before = held()
    fuzz = Fuzz(server, asked, seed=0)
    fuzz.run(range(150))
    assert not fuzz.faults
    assert fuzz.codes[200] > 5 and fuzz.codes[400] > 50
    assert not check_end(server, engine, before)

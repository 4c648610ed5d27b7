import dataclasses
import sys
from xml.etree import ElementTree

import pytest

from keye_jax.engine.openai import read_chat
from keye_jax.jobs import report
from keye_jax.jobs.report import Outcome, Progress, Tally, duration
from keye_jax.runtime.sampling import SamplingParams
from tests.keye_jax.jobs.fake import answer_to


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
    return clock


@pytest.fixture
def tally(clock):
    """Of 40 lines, 10 of which were done before, in 10 seconds: 9 answers and one failure."""
    tally = Tally(40, 8, {"media": 2})
    result = answer_to(read_chat({"messages": ["hi"]}, sampling=SamplingParams()).request)
    for index in range(9):
        clock.now += 1
        times = ((0.0, 1800.0), ())
        tally.add(Outcome({}, float(index + 1), 1, dataclasses.replace(result, frame_times=times)))
    clock.now += 1
    tally.add(Outcome({}, 1.0, 3, code="timeout"))
    return tally


def test_one_line(tally):
    assert tally.sentence() == "20 of 40 done, 3 failed, 3 tokens/s, 1,620.0 video hours an hour, 20 s left"
    assert "left" not in Tally(3, 3, {}).sentence() and "left" not in Tally(3, 0, {}).sentence()


def test_the_report(tally):
    got = tally.report()
    failures = {"media": 2, "timeout": 1}
    assert got["job"] == {"requests": 40, "succeeded": 17, "failed": 3, "not_done": 20, "failures": failures}
    run = got["run"]
    assert (run["seconds"], run["requests"], run["retries"], run["requests_per_second"]) == (10.0, 10, 2, 1.0)
    assert (run["prompt_tokens"], run["cached_tokens"], run["completion_tokens"]) == (90, 36, 27)
    assert (run["prompt_tokens_per_second"], run["completion_tokens_per_second"]) == (9.0, 2.7)
    assert (run["video_hours"], run["video_hours_per_hour"]) == (4.5, 1620.0)
    assert run["latency_seconds"] == {"median": 5.0, "p90": 8.2, "p95": 8.6, "p99": 8.92, "max": 9.0}
    assert run["first_token_seconds"]["max"] == 0.004 and run["seconds_between_tokens"]["median"] == 0.002


def test_the_report_of_nothing(clock):
    got = Tally(0, 0, {}).report()
    assert got["run"]["latency_seconds"] is None and got["job"]["requests"] == 0


def test_the_plot(tally, tmp_path):
    pytest.importorskip("matplotlib")
    for each in (tally, Tally(3, 0, {})):
        each.plot(tmp_path / "plot.svg")
        assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")


def test_the_plot_without_matplotlib(tally, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError):
        tally.plot(tmp_path / "plot.svg")


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3599.6, 7300, 90_000)] == [
        *("0 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 1 min", "1 d 1 h"),
    ]


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(tally, capsys):
    progress = Progress()
    assert progress.interval_s == 60
    progress.show(tally)
    progress.close(tally)
    assert capsys.readouterr().err.splitlines() == [tally.sentence()] * 2


def test_progress_is_a_bar_on_a_terminal(tally, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    progress = Progress()
    assert progress.interval_s == 0.5
    progress.show(tally)
    progress.close(tally)
    assert "20 of 40 done" in capsys.readouterr().err

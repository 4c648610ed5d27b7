"""On a local Ray cluster of two workers, one of which kills itself in the middle of the work."""

import asyncio
import contextlib
import functools
import json
import os
import signal
from pathlib import Path

import pytest

from keye_jax.config import KeyeConfig
from keye_jax.engine.options import EngineOptions
from keye_jax.engine.request import Request, RequestError
from keye_jax.errors import UserError
from keye_jax.jobs.batch import Batch, open_engine
from keye_jax.jobs.journal import Journal
from keye_jax.jobs.lines import Shard, count_lines, read_lines
from keye_jax.jobs.ray import RayEngines, Worker
from keye_jax.jobs.report import Progress, Tally
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.testing import write_processor_files
from tests.keye_jax.jobs.fake import FakeEngine, answerer, line
from tests.keye_jax.jobs.test_batch import outcomes
from tests.keye_jax.jobs.test_real_jobs import answers, real_lines

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


class MortalEngine(FakeEngine):
    """Kills its process at its 20th request, or ends ("closed"), if no other did so before."""

    def __init__(self, marker, way):
        super().__init__(0.02, after={20: self._die})
        self._marker, self._way = marker, way

    def _die(self):
        try:
            self._marker.touch(exist_ok=False)
        except FileExistsError:
            return
        if self._way == "closed":
            raise RequestError("closed", "it ended")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of two CPUs, whose workers find these tests."""
    environment = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "JAX_PLATFORMS": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
        ray.init(**options, runtime_env={"env_vars": environment})
        yield
        ray.shutdown()


@pytest.mark.parametrize("way, workers", [("killed", 2), ("closed", 2), ("killed", 1)])
def test_a_job_that_loses_a_worker(cluster, tmp_path, way, workers):
    content = b"".join(line(str(index), "media" if index % 9 == 0 else f"hi {index}") for index in range(150)) + b"x\n"
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    digest, lines = count_lines(source)

    def run(output, open_engine):
        with Journal(output, {"input": digest, "checkpoint": "", "options": {}}) as journal, source.open("rb") as file:
            tally = Tally(lines, 0, {})
            job = Batch(
                *(answerer(open_engine()), journal, read_lines(file, Shard()), tally, Progress()),
                concurrency=16,
                grace_s=1.0,
            )
            assert asyncio.run(job.run()) is None
        return outcomes(output), tally

    marker = tmp_path / "lost"
    expected, _ = run(tmp_path / "alone.jsonl", FakeEngine)
    opener = functools.partial(MortalEngine, marker, way)
    got, tally = run(tmp_path / "ray.jsonl", lambda: RayEngines(opener, workers=workers, gpus=0, concurrency=8))
    assert got == expected and len(got) == 151
    assert marker.exists() and tally.report()["run"]["retries"] > 0


class MortalModel:
    """An engine with a model, in a process that kills itself at its 10th request, if no other did so before."""

    def __init__(self, marker, checkpoint):
        options = EngineOptions(rows=4, cache_tokens=8192, media_workers=1)
        settings = {"dtype": "float32", "prefill_chunk": 128, "options": options}
        self._engine = open_engine(str(checkpoint), warmup=False, **settings)
        self._marker, self._asked = marker, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._engine.close()

    def submit(self, request):
        self._asked += 1
        if self._marker is not None and self._asked == 10:
            with contextlib.suppress(FileExistsError):
                self._marker.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return self._engine.submit(request)


def test_a_job_with_a_model_that_loses_a_worker(cluster, tmp_path, files):
    """The answers are those of one engine in this process: greedy ones, and sampled ones by their seeds."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(real_lines(files, 60))
    digest, lines = count_lines(source)

    def run(output, engine):
        with Journal(output, {"input": digest, "checkpoint": "", "options": {}}) as journal, source.open("rb") as file:
            job = Batch(
                *(answerer(engine), journal, read_lines(file, Shard()), Tally(lines, 0, {}), Progress()),
                concurrency=16,
                grace_s=1.0,
            )
            assert asyncio.run(job.run()) is None
        return answers(output)

    with MortalModel(None, files / "checkpoint") as engine:
        expected = run(tmp_path / "alone.jsonl", engine)
    marker = tmp_path / "lost"
    opener = functools.partial(MortalModel, marker, files / "checkpoint")
    got = run(tmp_path / "ray.jsonl", RayEngines(opener, workers=2, gpus=0, concurrency=8))
    assert got == expected and len(got) == 61 and marker.exists()


def test_workers_that_do_not_start_end_the_job(cluster):
    async def ask():
        engines = RayEngines(fails, workers=2, gpus=0, concurrency=8)
        await engines.submit(Request(messages=[{}]))

    with pytest.raises(RequestError, match="no worker is left; sharding is wrong") as error:
        asyncio.run(ask())
    assert error.value.kind == "closed"


def fails():
    raise UserError("sharding is wrong")


@pytest.mark.parametrize("way", ["killed", "closed"])
def test_a_dataset_that_loses_a_worker(cluster, tmp_path, golden, way):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_processor_files(checkpoint, KeyeConfig.from_file(golden / "a"))
    marker = tmp_path / "killed"
    bodies = [json.loads(line("", f"hi {index}", **({"n": "x"} if index == 7 else {})))["body"] for index in range(60)]
    rows: list[dict[str, str | None]] = [
        {"custom_id": str(index), "body": json.dumps(body)} for index, body in enumerate(bodies)
    ]
    rows[9]["body"], rows[11]["body"] = "no JSON", None
    dataset = ray.data.from_items(rows).map_batches(
        Worker,
        fn_constructor_kwargs={
            "checkpoint": str(checkpoint),
            "sampling": SamplingParams(),
            "opener": functools.partial(opened, marker, way),
        },
        batch_size=10,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    got = {}
    for row in dataset.iter_rows():
        assert row["custom_id"] not in got
        got[row["custom_id"]] = row
    assert marker.exists() and len(got) == 60
    for index, body in enumerate(bodies):
        row = got[str(index)]
        if index in (7, 9, 11):
            assert json.loads(row["error"])["code"] == "invalid" and row["response"] is None
        else:
            expected = asyncio.run(answerer(FakeEngine()).answer("", body)).record["response"]["body"]
            assert json.loads(row["response"])["choices"] == expected["choices"] and row["error"] is None


def opened(marker, way, checkpoint):
    return MortalEngine(marker, way)

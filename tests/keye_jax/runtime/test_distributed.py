"""Real processes on one machine: they load a checkpoint by parts, give one answer, and end together."""

import json
import math
import signal
import socket
import time

import pytest

from convert.mapping import rows
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.runtime import distributed
from tests.keye_jax.processes import SHARDING, begin, finish, free_port, told, write_inputs

# Reads a prompt and writes tokens, says what it wrote and how much it read from disk, and goes on until it is stopped.
WORKER = """
import json, sys, time
from keye_jax.runtime import distributed
checkpoint, sharding, count, port, process_id = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if count > 1:
    distributed.start(f"127.0.0.1:{port}", count, process_id)
said = distributed._job.errors if distributed._job else sys.stdout
import jax, numpy as np, tensorstore
from convert import load_params
from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye
from keye_jax.model.params import parameter_shardings
from keye_jax.runtime.prefill import Segment
from keye_jax.runtime.runtime import Runtime
from keye_jax.runtime.sampling import SamplingParams
from keye_jax.sharding import MeshRules, ShardingConfig

def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])

config = KeyeConfig.from_file(checkpoint)
rules = MeshRules.create(ShardingConfig.from_file(sharding), config)
params = load_params(checkpoint, config, shardings=parameter_shardings(config, rules))
read = bytes_read()
runtime = Runtime(Keye.from_params(config, params), config, rules=rules)
ids = np.random.default_rng(0).integers(0, 500, 90).astype(np.int32)
positions = np.broadcast_to(np.arange(90, dtype=np.int32), (3, 90))
pool, tables = runtime.new_cache(1, 4096)
logits, pool = runtime.prefill([Segment(ids, positions, tables[0])], pool)
state = runtime.new_state(rules.size("batch"), len(tables[0]))
greedy, where = SamplingParams(temperature=0), {"position_delta": 0, "pages": tables[0]}
state = runtime.set_row(state, 0, token=int(ids[-1]), length=89, sampling=greedy, **where)
leads, tokens = [], []
while True:
    state = runtime.draw(logits, state)
    tokens.append(int(state.tokens[0]))
    best = np.sort(np.asarray(logits)[0])
    leads.append(float(best[-1] - best[-2]))
    if len(tokens) == 8:
        print(json.dumps([tokens, leads, read]), file=said, flush=True)
        if count == 1:
            break
    logits, state, pool = runtime.decode(state, pool)
"""

# Runs the command, and says how many frames this process decoded.
COMMAND = """
import sys
from keye_jax.cli import app, run
from keye_jax.processor.decode import VideoFile
frames, read = [], VideoFile.read

def counted(self, indices, *args, **others):
    frames.extend(indices)
    return read(self, indices, *args, **others)

VideoFile.read = counted
counts, arguments = sys.argv[1], sys.argv[2:]
code = run(app, arguments)
open(counts, "w").write(str(len(frames)))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distributed")
    write_inputs(directory)
    return directory / "orbax"


@pytest.fixture(scope="module")
def alone(checkpoint):
    """What one process writes, and the bytes it reads."""
    code, out, err = finish(begin("-c", WORKER, checkpoint, SHARDING, 1, 0, 0))
    assert code == 0, err
    return json.loads(out)


def small_bytes(checkpoint):
    """Of the arrays that are in one chunk, which every process reads: those of 1 MB and less."""
    config = KeyeConfig.from_file(checkpoint)
    sizes = [4 * math.prod(row.shape) for row in rows(config) if row.in_model]
    return sum(size for size in sizes if size <= 2**20)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(4, 2)])
def test_processes_read_their_parts_write_the_same_and_end_when_one_is_killed(checkpoint, alone, count, victim):
    port = free_port()
    workers = [begin("-c", WORKER, checkpoint, SHARDING, count, port, i) for i in range(count)]
    (tokens, leads, whole), small = alone, small_bytes(checkpoint)
    # The tokens are the same on any machine: each is ahead by more than the rounding.
    assert min(leads) > 1e-3
    assert small < 0.15 * whole
    try:
        for worker in workers:
            found, _, read = json.loads(told(worker, "[["))
            assert found == tokens
            assert read <= 1.15 * ((whole - small) / count + small)  # chunks are no finer than 1 MB
        workers[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for number, worker in enumerate(workers):
            _, _, err = finish(worker, seconds=60)
            if number != victim:
                assert worker.returncode == 1, err
                assert f"keye-jax: process {victim} ({socket.gethostname()}) is lost" in err
        assert time.monotonic() - killed < 30
    finally:
        for worker in workers:
            worker.kill()


def test_the_coordinator_is_named_when_it_is_killed():
    program = """if True:
        import sys, time
        from keye_jax.runtime import distributed
        distributed.start(sys.argv[1], 2, int(sys.argv[2]))
        print("up", file=distributed._job.errors, flush=True)
        time.sleep(60)
    """
    address = f"127.0.0.1:{free_port()}"
    workers = [begin("-c", program, address, i) for i in range(2)]
    try:
        for worker in workers:
            told(worker, "up")
        workers[0].kill()
        code, _, err = finish(workers[1], seconds=30)
        assert code == 1 and f"keye-jax: process 0 ({socket.gethostname()}) is lost" in err
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.slow
def test_two_processes_answer_as_one_and_the_first_decodes_all_frames(checkpoint, tmp_path):
    ask = ["generate", "--checkpoint", checkpoint, "--video", checkpoint.parent / "clip.mp4", "--prompt", "What moves?"]
    ask += ["--greedy", "--max-new-tokens", 4, "--json"]
    code, out, err = finish(begin("-c", COMMAND, tmp_path / "alone", *ask))
    assert code == 0, err
    several = [*ask, "--sharding", SHARDING, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2]
    workers = [begin("-c", COMMAND, tmp_path / str(i), *several, "--process-id", i) for i in range(2)]
    (code, first, err), (_, second, _) = [finish(worker) for worker in workers]
    assert code == 0, err
    answers = [json.loads(text) for text in (out, first)]
    assert answers[0]["reasoning"] == answers[1]["reasoning"] and answers[0]["answer"] == answers[1]["answer"]
    assert answers[0]["frame_times"] == answers[1]["frame_times"]
    assert second == ""
    assert len(answers[0]["frame_times"][0]) == 8
    assert [int((tmp_path / name).read_text()) for name in ("alone", "0", "1")] == [8, 8, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "--processes and --process-id must be given too"),
        ((None, 2, 0), "--coordinator must be given too"),
        (("host", 2, 0), "--coordinator is 'host'; it must be HOST:PORT"),
        (("host:99999", 2, 0), "--coordinator is 'host:99999'; it must be HOST:PORT"),
        (("host:1", 2, 2), "--process-id is 2; it must be from 0 to --processes - 1 = 1"),
        (("host:1", 0, 0), "--processes is 0; it must be at least 1"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


# Each launcher's variables for process 0 of two on this machine; those that say the number, and the port of process 0.
LAUNCHERS = {
    "jax": ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
    "kubernetes": ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}, "JOB_COMPLETION_INDEX"),
    "kubeflow": (
        {"COORDINATOR_ADDRESS": "127.0.0.1", "COORDINATOR_PORT": "{port}", "NUM_PROCESSES": "2"},
        "PROCESS_ID",
    ),
    "torch": ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}", "WORLD_SIZE": "2"}, "RANK"),
    "open mpi": (
        {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_MCA_orte_hnp_uri": "{job_of_4096}.0;tcp://127.0.0.1:1",
        },
        "OMPI_COMM_WORLD_RANK",
    ),
    "slurm": (
        {
            "SLURM_JOB_ID": "{job}",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "0",
        },
        "SLURM_PROCID",
    ),
    "mpi": ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", "PMI_SIZE": "2"}, "PMI_RANK"),
    "tpu": ({"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "JAX_COORDINATOR_PORT": "{port}"}, "TPU_WORKER_ID"),
    "megascale": (
        {
            "TPU_WORKER_HOSTNAMES": "127.0.0.1",
            "TPU_WORKER_ID": "0",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080",
            "JAX_COORDINATOR_PORT": "{port}",
        },
        "MEGASCALE_SLICE_ID",
    ),
}


def launched(launcher, program, *arguments):
    """Two processes as a launcher starts them."""
    variables, number = LAUNCHERS[launcher]
    port = free_port()
    while port < 61440:  # where Slurm's and Open MPI's ports are
        port = 61440 + port % 4096
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                port = free_port()
    job = port - 61440
    filled = {name: value.format(port=port, job=job, job_of_4096=4096 * job) for name, value in variables.items()}
    return [begin("-c", program, *arguments, environment=filled | {number: str(i)}) for i in range(2)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_find_each_other_as_the_launcher_says(launcher):
    program = """if True:
        import os
        from keye_jax.runtime import launchers, rendezvous
        found = launchers.find(os.environ)
        rendezvous.meet(found.coordinator, found.processes, found.process_id, 30)
        print(found.process_id)
    """
    for number, worker in enumerate(launched(launcher, program)):
        code, out, err = finish(worker, seconds=60)
        assert (code, out) == (0, f"{number}\n"), err


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_process_ends_all_by_its_name(victim):
    program = """if True:
        import time
        from keye_jax import interrupts
        from keye_jax.runtime import distributed
        interrupts.handle()
        with interrupts.raised():
            distributed.start("auto")
            print("up", file=distributed._job.errors, flush=True)
            time.sleep(60)
    """
    workers = launched("slurm", program)
    try:
        for worker in workers:
            told(worker, "up")
        workers[victim].send_signal(signal.SIGTERM)
        name = f"process {victim} ({socket.gethostname()})"
        for number, worker in enumerate(workers):
            code, _, err = finish(worker, seconds=30)
            said = f"keye-jax: {name} was told to end (SIGTERM)"
            if number != victim:
                said += f"; process {number} ({socket.gethostname()}) ends"
            assert (code, err) == (143, f"{said}\n")
    finally:
        for worker in workers:
            worker.kill()


def test_half_of_a_launchers_variables_is_refused_by_the_command(checkpoint):
    """And not answered by each process alone."""
    ask = ["generate", "--checkpoint", checkpoint, "--prompt", "?"]
    code, out, err = finish(
        begin("-m", "keye_jax.cli", *ask, environment={"SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1"})
    )
    assert (code, out) == (2, "")
    assert err.startswith("keye-jax: SLURM_JOB_ID, SLURM_NTASKS and SLURM_LOCALID are not set, and ")
    assert err.count("\n") == 1


def test_auto_finds_nothing_here():
    with pytest.raises(UserError, match="--coordinator is 'auto', and"):
        distributed.start("auto")


def test_auto_asks_the_tpu_machine(monkeypatch):
    """The last row of the table of launchers: a TPU pod outside GKE. The machine's data are those of its server."""
    from jax._src.clusters import cloud_tpu_cluster as machine

    said = {"agent-worker-number": "2", "worker-network-endpoints": ",".join(f"id:{n}:127.0.0.1" for n in range(4))}
    monkeypatch.setattr(machine, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(machine, "get_metadata", lambda key: (said.get(key, ""), 200))
    for name in ("TPU_SKIP_MDS_QUERY", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"process 2 cannot reach process 0 at 127\.0\.0\.1:8482 within 1 s"):
        distributed.start("auto", timeout=1)
    assert distributed.process_count() == 1


def test_flags_are_completed_by_variables(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here:1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "5")
    with pytest.raises(UserError, match="--process-id is 5; it must be from 0 to"):
        distributed.start(processes=2)
    with pytest.raises(UserError, match="--processes must be given too"):
        distributed.start(process_id=0)
    for timeout in (0, float("nan"), float("inf"), 1e30):
        with pytest.raises(
            UserError, match=r"--startup-timeout is .*; it must be above 0, and at most 604,800 seconds"
        ):
            distributed.start(processes=2, process_id=0, timeout=timeout)

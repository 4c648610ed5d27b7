"""What launchers of clusters say in the environment: every row of the table in docs/shard.md."""

import re

import pytest

from keye_jax.errors import UserError
from keye_jax.runtime import launchers
from keye_jax.runtime.launchers import Launch
from tests.keye_jax.processes import ROOT

JAX = {"JAX_COORDINATOR_ADDRESS": "node0:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
KUBEFLOW = {"COORDINATOR_ADDRESS": "job-worker-0", "COORDINATOR_PORT": "6666", "NUM_PROCESSES": "4", "PROCESS_ID": "2"}
TORCH = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
ORTE = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
SLURM = {
    "SLURM_JOB_ID": "4098",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "tpu0,tpu1,tpu2,tpu3", "TPU_WORKER_ID": "2"}
MEGASCALE = {
    "TPU_WORKER_HOSTNAMES": "tpu2,tpu3",
    "TPU_WORKER_ID": "0",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "tpu0:8080",
}
GROUPS = {
    "jax": (JAX, Launch("node0:8476", 4, 2)),
    "kubeflow": (KUBEFLOW, Launch("job-worker-0:6666", 4, 2)),
    "torch": (TORCH, Launch("job-master-0:23456", 4, 2)),
    "open mpi": (ORTE, Launch(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 2, 1)),
    "slurm": (SLURM, Launch("node07:61442", 4, 2, 0)),
    "mpi": (PMI | {"JAX_COORDINATOR_ADDRESS": "node0:8476"}, Launch("node0:8476", 4, 2)),
    "tpu": (TPU, Launch("tpu0:8482", 4, 2)),
    "megascale": (MEGASCALE, Launch("tpu0:8482", 4, 2)),
}


FORMS = [
    (JAX | {"JAX_COORDINATOR_ADDRESS": "node0", "JAX_COORDINATOR_PORT": "99"}, Launch("node0:99", 4, 2)),
    (JAX | {"JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "3"}, Launch("node0:8476", 4, 3)),
    (JAX | SLURM | {"SLURM_PROCID": "1"}, Launch("node0:8476", 4, 2)),
    # The address alone goes with what another launcher says.
    (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "[::1]:9"}, Launch("[::1]:9", 4, 2, 1)),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "node9:9"}, Launch("node9:9", 4, 2, 0)),
    (SLURM | {"SLURM_STEP_NODELIST": "a,b"}, Launch("a:61442", 4, 2, 0)),
    (SLURM | {"SLURM_STEP_NODELIST": "gpu-[3,5-7],b"}, Launch("gpu-3:61442", 4, 2, 0)),
    (SLURM | {"SLURM_STEP_NODELIST": "rack[1-2]node[03,5]-ib,b"}, Launch("rack1node03-ib:61442", 4, 2, 0)),
    # With a chosen address no other is needed.
    *(
        ({name: group[name] for name in which} | {"JAX_COORDINATOR_ADDRESS": "a:9"}, Launch("a:9", 4, 2))
        for group, which in ((KUBEFLOW, ("NUM_PROCESSES", "PROCESS_ID")), (TORCH, ("WORLD_SIZE", "RANK")))
    ),
    ({name: f" {value} " for name, value in JAX.items()}, Launch("node0:8476", 4, 2)),
    (TPU | {"TPU_WORKER_HOSTNAMES": "tpu0, tpu1,tpu2,"}, Launch("tpu0:8482", 3, 2)),
    # A step of two tasks in an allocation of four.
    (SLURM | {"SLURM_STEP_NUM_TASKS": "3"}, Launch("node07:61442", 3, 2, 0)),
    (OPEN_MPI | SLURM | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:43370"}, None),
    (TPU | {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_ID": "1"}, Launch("a:8482", 2, 1)),
]


@pytest.mark.parametrize("name", GROUPS)
def test_every_launcher_says_which_process_this_is(name):
    variables, expected = GROUPS[name]
    assert launchers.find(variables) == expected


@pytest.mark.parametrize(("variables", "expected"), FORMS)
def test_forms_of_values(variables, expected):
    found = launchers.find(variables)
    if expected is None:
        expected = Launch("[fe80::1]:61441", 4, 2, 1)
    assert found == expected


def test_addresses_in_a_file(tmp_path):
    path = tmp_path / "addresses"
    path.write_text("tpu0:8471,tpu1:8471\n")
    found = launchers.find({"TPU_PROCESS_ADDRESSES_PATH": str(path), "TPU_WORKER_ID": "1"})
    assert found == Launch("tpu0:8482", 2, 1)


def test_every_row_of_the_page_is_tried():
    page = (ROOT / "docs" / "shard.md").read_text()
    rows = re.search(r"(?m)^\| launcher \|.*\n\|[-|]+\n((?:\|.*\n)+)", page)
    assert rows is not None
    tried = {name for variables, _ in [*GROUPS.values(), *FORMS] for name in variables}
    shown = set[str]()
    for row in rows[1].splitlines():
        launcher, *cells = row.strip("|").split("|")
        named = set(re.findall(r"\b[A-Z]+_\w+|\bRANK\b", " ".join(cells)))
        assert named <= tried | {"TPU_PROCESS_ADDRESSES_PATH"}, launcher
        assert named or "--coordinator auto" in row, launcher
        shown |= named
    assert {name for variables, _ in GROUPS.values() for name in variables} <= shown


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # The script of a Slurm job is no step.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_NTASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"MEGASCALE_NUM_SLICES": "1"},
        {"JOB_COMPLETION_INDEX": "3"},
        {"WORLD_SIZE": "1"},
        *({**variables, **dict.fromkeys(variables, "")} for variables, _ in GROUPS.values()),
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_that_is_alone(variables):
    assert launchers.find(variables) is None


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (name, missing)
        for name, (variables, _) in GROUPS.items()
        for missing in variables
        # Without these there is another group, or none.
        if missing not in ("OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES")
        if missing != "MEGASCALE_NUM_SLICES" and (name, missing) != ("mpi", "JAX_COORDINATOR_ADDRESS")
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_half_a_group_is_refused_by_name(name, missing, empty):
    variables = dict(GROUPS[name][0])
    del variables[missing]
    with pytest.raises(UserError, match=rf"\b{missing}\b.*not set.*belong together") as caught:
        launchers.find(variables | ({missing: ""} if empty else {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (OPEN_MPI, "Open MPI does not say where process 0 is: JAX_COORDINATOR_ADDRESS must be HOST:PORT"),
        (PMI, "not where process 0 is: JAX_COORDINATOR_ADDRESS must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "node0:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are not set"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "node0"}, "JAX_COORDINATOR_ADDRESS is 'node0'; it must be HOST:PORT"),
        (JAX | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'; it must be a whole number"),
        (JAX | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES is 0; it must be at least 1"),
        (JAX | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4; it must be from 0 to JAX_NUM_PROCESSES - 1 = 3"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID is '-1'; it must be a whole number"),
        (KUBEFLOW | {"COORDINATOR_PORT": "http"}, "it must be HOST:PORT"),
        *(
            (
                JAX | {"JAX_COORDINATOR_ADDRESS": address},
                f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT",
            )
            for address in (
                *("::1:8476", "http://node0:8476", "node 0:8476", ":8476", "node0:0", "node0:65536", "[]:1"),
                *("node0..svc:8476", f"{'n' * 64}:8476"),
            )
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2"}, "SLURM_STEP_NODELIST is '[1-2'; it must be a list of nodes"),
        (TPU | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID is 4; TPU_WORKER_HOSTNAMES has 4 workers"),
        (MEGASCALE | {"MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID is 2; it must be below MEGASCALE_NUM_SLICES"),
        ({"TPU_PROCESS_ADDRESSES_PATH": "/none"}, "TPU_PROCESS_ADDRESSES_PATH is '/none'; it must be a file"),
    ],
)
def test_values_that_are_impossible(variables, message):
    with pytest.raises(UserError, match=re.escape(message)):
        launchers.find(variables)

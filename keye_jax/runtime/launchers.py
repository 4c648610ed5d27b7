"""Which process of which job this is, as launchers of clusters say it in environment variables.

Each launcher has a group of variables that belong together. An empty variable counts as one that is not set. A group of
which a part is set is a mistake: its processes would not find each other, and each would answer alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from keye_jax.errors import UserError, shorten

Environment = Mapping[str, str]
TPU_PORT = 8482
# A name or an IPv4 address, or an IPv6 address in brackets.
_HOST = r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]"

# Variables of launchers that are not JAX itself.
_OTHERS = {"NUM_PROCESSES", "PROCESS_ID", "WORLD_SIZE", "RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} | {
    *("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "PMI_SIZE", "PMI_RANK", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID")
}
# Slurm and Open MPI share machines among jobs, so the port follows from the job: one of the last so many.
_PORTS = 2**12


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process of a job.

    Attributes:
      coordinator: "HOST:PORT" of process 0.
      processes: how many there are.
      process_id: which one this is, from 0.
      local: its number among those of its host, if each of these has one GPU; None if a process has all of them.
    """

    coordinator: str
    processes: int
    process_id: int
    local: int | None = None


def find(environment: Environment) -> Launch | None:
    """What the environment says of this process; None if it says nothing, or that the process is alone.

    Raises:
      UserError: a part of what belongs together is missing, or a value is impossible.
    """
    given = _given(environment)
    chosen = _chosen(given, "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT")
    for launcher in (_jax, _kubeflow, _torch, _open_mpi, _slurm, _pmi, _tpu):
        if (launch := launcher(given, chosen)) is not None:
            return launch if launch.processes > 1 else None
    return None


def completed(
    coordinator: str | None, processes: int | None, process_id: int | None, *, environment: Environment
) -> tuple[str | None, int | None, int | None]:
    """These three of a launch; those that are None from JAX's own variables, if they are set.

    An indexed job of Kubernetes says the process in JOB_COMPLETION_INDEX.

    Raises:
      UserError: a variable is impossible.
    """
    given = _given(environment)
    coordinator = coordinator or _chosen(given, "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT")
    if processes is None and "JAX_NUM_PROCESSES" in given:
        processes = _number(given, "JAX_NUM_PROCESSES")
    for name in ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"):
        if process_id is None and name in given:
            process_id = _number(given, name)
    return coordinator, processes, process_id


def check_address(name: str, address: str) -> str:
    """A "HOST:PORT". Raises UserError with the option's or variable's name if it is none."""
    host, _, port = address.rpartition(":")
    try:
        host.encode("idna")  # as sockets do, which end with this error
    except UnicodeError:
        host = ""
    if not re.fullmatch(_HOST, host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"{name} is {shorten(address)}; it must be HOST:PORT of process 0")
    return address


def _jax(given: Environment, chosen: str | None) -> Launch | None:
    count, index = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    if not {count, index} & given.keys() and _OTHERS & given.keys():
        return None  # the address alone goes with what another launcher says of the rest
    if count in given and index not in given and "JOB_COMPLETION_INDEX" in given:
        index = "JOB_COMPLETION_INDEX"
    if not _several(given, ("JAX_COORDINATOR_ADDRESS", count, index), count=count):
        return None
    assert chosen is not None
    return _launch(given, chosen, count, index)


def _kubeflow(given: Environment, chosen: str | None) -> Launch | None:
    return _with_port(given, chosen, ("COORDINATOR_ADDRESS", "COORDINATOR_PORT"), ("NUM_PROCESSES", "PROCESS_ID"))


def _torch(given: Environment, chosen: str | None) -> Launch | None:
    return _with_port(given, chosen, ("MASTER_ADDR", "MASTER_PORT"), ("WORLD_SIZE", "RANK"))


def _with_port(given: Environment, chosen: str | None, place: tuple[str, str], which: tuple[str, str]) -> Launch | None:
    """A group of four: host and port of process 0, unless these are chosen, how many processes, and which one."""
    if not _several(given, which if chosen else (*place, *which), count=which[0]):
        return None
    address = chosen or _chosen(given, *place)
    assert address is not None
    return _launch(given, address, *which)


def _open_mpi(given: Environment, chosen: str | None) -> Launch | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    if not _several(given, names, count=names[0]):
        return None
    uri = given.get("OMPI_MCA_orte_hnp_uri")
    if chosen is None:
        found = uri and re.match(r"(\d+)\.\d+;.*?tcp6?://(?:\[([^],]+)|([^,:]+))", uri)
        if not found:
            raise UserError(
                "Open MPI does not say where process 0 is: JAX_COORDINATOR_ADDRESS must be HOST:PORT of it "
                "(mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT)"
            )
        job, six, four = found.groups()
        chosen = f"{f'[{six}]' if six else four}:{_port(int(job) // 2**12)}"
    return _launch(given, chosen, *names)


def _slurm(given: Environment, chosen: str | None) -> Launch | None:
    # The script of a job is no step: it runs once, whatever it says of tasks.
    if not {"SLURM_STEP_NODELIST", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} & given.keys():
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", count, "SLURM_PROCID", "SLURM_LOCALID")
    if not _several(given, names, count=count):
        return None
    if chosen is None:
        # The first name of such as "node7,node9", "node[07-09,12],other3" and "rack[1-2]node[3,5]".
        first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", given["SLURM_STEP_NODELIST"])
        host = "" if first is None else re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])
        if not re.fullmatch(_HOST, host):
            raise UserError(
                f"SLURM_STEP_NODELIST is {shorten(given['SLURM_STEP_NODELIST'])}; it must be a list of nodes"
            )
        chosen = f"{host}:{_port(_number(given, 'SLURM_JOB_ID'))}"
    return _launch(given, chosen, *names[2:])


def _pmi(given: Environment, chosen: str | None) -> Launch | None:
    if not _several(given, ("PMI_SIZE", "PMI_RANK"), count="PMI_SIZE"):
        return None
    if chosen is None:
        raise UserError(
            "PMI_SIZE says that there are several processes and not where process 0 is: "
            "JAX_COORDINATOR_ADDRESS must be HOST:PORT of it"
        )
    return _launch(given, chosen, "PMI_SIZE", "PMI_RANK")


def _tpu(given: Environment, chosen: str | None) -> Launch | None:
    """The workers of a slice, and several slices as Megascale joins them."""
    slices = _number(given, "MEGASCALE_NUM_SLICES", 1)
    kind, hosts = _tpu_hosts(given)
    names = () if len(hosts) == 1 and slices == 1 else ("TPU_WORKER_ID",)
    if slices > 1:
        names += ("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
    if not names:
        return None
    _several({**given, kind: "there"}, (kind, *names))
    worker = _number(given, "TPU_WORKER_ID")
    number = _number(given, "MEGASCALE_SLICE_ID") if slices > 1 else 0
    if not worker < len(hosts):
        raise UserError(f"TPU_WORKER_ID is {worker}; {kind} has {len(hosts)} workers, so it must be below that")
    if not number < slices:
        raise UserError(f"MEGASCALE_SLICE_ID is {number}; it must be below MEGASCALE_NUM_SLICES, which is {slices}")
    place = "MEGASCALE_COORDINATOR_ADDRESS" if slices > 1 else kind
    host = given[place] if slices > 1 else hosts[0]
    port = _number(given, "JAX_COORDINATOR_PORT", TPU_PORT)
    address = chosen or f"{re.sub(':[0-9]+$', '', host)}:{port}"
    return Launch(check_address(place, address), slices * len(hosts), number * len(hosts) + worker)


def _tpu_hosts(given: Environment) -> tuple[str, list[str]]:
    """The variable that names a slice's workers, and what it says; one worker if there is none."""
    if path := given.get("TPU_PROCESS_ADDRESSES_PATH"):
        try:
            return "TPU_PROCESS_ADDRESSES_PATH", _split(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"TPU_PROCESS_ADDRESSES_PATH is {path!r}; it must be a file that can be read") from error
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in given:
            return name, _split(given[name])
    return "TPU_WORKER_HOSTNAMES", ["localhost"]


def _split(hosts: str) -> list[str]:
    return [host.strip() for host in hosts.split(",") if host.strip()]


def _several(given: Environment, names: tuple[str, ...], *, count: str = "") -> bool:
    """Whether a group is set and is of several processes. Raises UserError if a part of it is missing."""
    there = [name for name in names if name in given]
    if not there or (count in given and _number(given, count) == 1):
        return False
    if missing := [name for name in names if name not in given]:
        raise UserError(
            f"{_and(missing)} {'is' if len(missing) == 1 else 'are'} not set, and {_and(there)} "
            f"{'is' if len(there) == 1 else 'are'}; they belong together"
        )
    return True


def _launch(given: Environment, address: str, count: str, index: str, local: str | None = None) -> Launch:
    processes, process_id = _number(given, count), _number(given, index)
    if processes < 1:
        raise UserError(f"{count} is {processes}; it must be at least 1")
    if process_id >= processes:
        raise UserError(f"{index} is {process_id}; it must be from 0 to {count} - 1 = {processes - 1}")
    return Launch(address, processes, process_id, None if local is None else _number(given, local))


def _given(environment: Environment) -> Environment:
    """The variables that are set, without spaces around their values."""
    return {name: value.strip() for name, value in environment.items() if value.strip()}


def _chosen(given: Environment, name: str, port: str) -> str | None:
    """An address whose port may be in another variable."""
    address = given.get(name)
    if address is None:
        return None
    if port in given and (":" not in address or address.endswith("]")):
        address = f"{address}:{given[port]}"
    return check_address(name, address)


def _number(given: Environment, name: str, default: int | None = None) -> int:
    if default is not None and name not in given:
        return default
    text = given[name]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{name} is {shorten(text)}; it must be a whole number")
    return int(text)


def _port(job: int) -> int:
    return 2**16 - _PORTS + job % _PORTS


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

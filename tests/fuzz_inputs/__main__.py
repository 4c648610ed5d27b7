"""`python -m tests.fuzz_inputs`: damaged media files and message files, read by the processor.

A case is a finding if the process dies, if it takes more than 10 s or 2 GiB, if it raises anything but a `UserError`,
or if the message of that is not one line.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_processor_files
from tests.fuzz_inputs import cases, seeds, worker
from tests.fuzz_inputs.cases import Task
from tests.fuzz_inputs.worker import Outcome


def main() -> int:
    """Parses the command line, runs the cases and prints; returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_inputs", description=__doc__)
    parser.add_argument("--media", type=int, default=20_000, metavar="N", help="cases of damaged media files")
    parser.add_argument("--messages", type=int, default=20_000, metavar="N", help="cases of damaged message files")
    parser.add_argument("--seed", type=int, default=0, help="other cases for another seed")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that run cases side by side")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run only this case of each kind that is not 0")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the inputs of findings, or of --only, to DIR")
    arguments = parser.parse_args()
    # What is printed may quote characters that have no encoding.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    tasks = [
        Task(kind, arguments.seed, number)
        for kind in cases.KINDS
        if (count := getattr(arguments, kind)) > 0
        for number in (range(count) if arguments.only is None else [arguments.only])
    ]
    if arguments.write:
        (arguments.write / "messages").mkdir(parents=True, exist_ok=True)
        seeds.make(arguments.write / "messages")
    with tempfile.TemporaryDirectory(prefix="keye-jax-fuzz-") as directory:
        folder = Path(directory)
        (folder / "seeds").mkdir()
        seeds.make(folder / "seeds")
        write_processor_files(folder / "checkpoint", KeyeConfig.from_file(presets.TINY))
        return _run(tasks, folder, arguments)


def _run(tasks: list[Task], folder: Path, arguments: argparse.Namespace) -> int:
    one = arguments.only is not None
    rows: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for done, (task, outcome) in enumerate(worker.run(tasks, folder, arguments.jobs, verbose=one), 1):
        if one or outcome.status == "finding":
            case = cases.make(task, folder / "seeds")
            outcome = dataclasses.replace(outcome, group=case.group)
            name = f"{task.kind} {task.number}, seed {task.seed}"
            print(f"{name} ({case.group}; {case.damage}): {outcome.status}: {outcome.reason}", flush=True)
            if one and outcome.details:
                print(outcome.details)
            if arguments.write:
                target = arguments.write / task.kind
                target.mkdir(parents=True, exist_ok=True)
                case.write(target, f"{task.seed}-{task.number}-")
        rows[task.kind, outcome.group].append(outcome)
        if done % 1000 == 0:
            print(f"{done:,} of {len(tasks):,}", file=sys.stderr, flush=True)
    outcomes = [outcome for group in rows.values() for outcome in group]
    findings = [outcome.reason for outcome in outcomes if outcome.status == "finding"]
    _print(rows)
    for reason, count in collections.Counter(reason.partition(":")[0] for reason in findings).most_common():
        print(f"{count:,} times: {reason}")
    print(f"{len(findings):,} findings in {len(tasks):,} cases, seed {arguments.seed}")
    return 1 if findings else 0


def _print(rows: dict[tuple[str, str], list[Outcome]]) -> None:
    table = Table("kind", "made from", "cases", "read", "refused", "findings", "slowest s", "peak MiB")
    for column in table.columns[2:]:
        column.justify = "right"
    for kind in cases.KINDS:
        groups = sorted(group for each, group in rows if each == kind)
        for group in groups:
            table.add_row(kind, group, *_cells(rows[kind, group]))
        if groups:
            table.add_row(kind, "all", *_cells([outcome for group in groups for outcome in rows[kind, group]]))
            table.add_section()
    Console(width=120).print(table)


def _cells(outcomes: list[Outcome]) -> list[str]:
    counts = collections.Counter(outcome.status for outcome in outcomes)
    return [
        f"{len(outcomes):,}",
        *(f"{counts[status]:,}" for status in ("read", "refused", "finding")),
        f"{max(outcome.seconds for outcome in outcomes):.2f}",
        f"{max(outcome.peak_bytes for outcome in outcomes) / 2**20:,.0f}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())

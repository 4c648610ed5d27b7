"""`keye-jax doctor` and `keye-jax --version`: what this machine has, and what is missing."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from keye_jax.doctor import Finding, Report


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Says what this machine can run, which kernels it takes, and what is missing.

    Exits with 1 if it cannot run `generate`.
    """
    from keye_jax.doctor import examine

    _leave_memory_free()
    found = examine()
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    return 0 if found.runs else 1


def print_versions(wanted: bool) -> None:
    """Prints versions and ends the command, if they are wanted."""
    if wanted:
        from keye_jax.doctor import versions

        _leave_memory_free()
        print("\n".join(versions()))
        raise typer.Exit


def _leave_memory_free() -> None:
    """Keeps JAX from taking the memory of GPUs that other jobs may be using."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _print(found: Report) -> None:
    print(f"keye-jax {found.version}, Python {found.python} ({found.executable}), {found.system}")
    print(", ".join(f"{name} {version or 'is missing'}" for name, version in found.packages.items()))
    soft, hard = (f"{limit:,}" if limit >= 0 else "any number" for limit in found.open_files)
    writable = {True: "writable", False: "NOT writable", None: "not tried"}[found.cache[1]]
    devices = [f"{each.count} x {each.kind}, {_gib(each.memory)} each" for each in found.devices]
    rows = [
        ("devices", "; ".join(devices) or "none"),
        ("ptxas", found.ptxas or "none"),
        ("compiled programs", f"{found.cache[0]}, {writable}"),
        ("shared memory", f"{_gib(found.media_bytes)} for media workers; {_gib(found.free_bytes)} are free"),
        ("open files", f"{soft}, and {hard} if asked for"),
    ]
    rows += [(name, f"takes {implementation}") for name, implementation in found.operations.items()]
    rows += [(f"not {name}", f"it {why}") for name, why in found.refused.items()]
    _print_rows(rows)
    for title, findings in (("missing", found.missing), ("warnings", found.warnings), ("problems", found.problems)):
        if findings:
            print(f"\n{title}:")
            _print_rows([_row(each) for each in findings])
    print()
    print("this machine can run `keye-jax generate`" if found.runs else "this machine can NOT run `keye-jax generate`")


def _row(finding: Finding) -> tuple[str, str]:
    return f"  {finding.what}", finding.remedy or ""


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name.ljust(width)}  {text}".rstrip())


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

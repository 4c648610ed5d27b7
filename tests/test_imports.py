"""Imports point down: what each part of the packages may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keye_jax

ROOT = Path(__file__).parents[1]

# A part is a package or a module right below keye_jax, or another top-level package.
# Its arrows are the parts that it may import; what these may import, it may import too.
ARROWS: dict[str, tuple[str, ...]] = {
    "keye_jax.cli": (
        "keye_jax.eval",
        "keye_jax.bench",
        "keye_jax.planning",
        "keye_jax.jobs",
        "keye_jax.serve",
        "keye_jax.train",
        "keye_jax.presets",
        "keye_jax.doctor",
        "convert",
    ),
    "keye_jax.doctor": ("keye_jax.engine", "keye_jax"),
    "keye_jax.demo": ("keye_jax.cli", "keye_jax.eval", "keye_jax.train"),
    "keye_jax.jobs": ("keye_jax.engine", "keye_jax.presets"),
    "keye_jax.serve": ("keye_jax.engine", "keye_jax.jobs", "keye_jax.call_process"),
    "keye_jax.engine": ("keye_jax.runtime", "keye_jax.processor", "keye_jax.file_lock", "convert"),
    "keye_jax.eval": ("keye_jax.runtime", "keye_jax.engine", "keye_jax.train"),
    "keye_jax.bench": (
        "keye_jax.engine",
        "keye_jax.jobs",
        "keye_jax.serve",
        "keye_jax.train",
        "keye_jax.presets",
        "keye_jax.testing",
    ),
    "keye_jax.planning": ("keye_jax.runtime", "keye_jax.train"),
    "keye_jax.train": (
        "keye_jax.model",
        "keye_jax.processor",
        "keye_jax.progress",
        "keye_jax.call_process",
        "keye_jax.byte_level",
        "keye_jax.presets",
        "convert",
    ),
    "keye_jax.runtime": (
        "keye_jax.model",
        "keye_jax.kv_cache",
        "keye_jax.sharding",
        "keye_jax.progress",
        "keye_jax.interrupts",
    ),
    "keye_jax.model": ("keye_jax.kv_cache", "pallas_kernels"),
    "keye_jax.kv_cache": ("keye_jax.sharding", "keye_jax.page_allocator", "pallas_kernels"),
    "keye_jax.page_allocator": (),
    "keye_jax.sharding": ("keye_jax.config",),
    "keye_jax.processor": ("keye_jax.config", "keye_jax.progress", "keye_jax"),
    "keye_jax.testing": ("keye_jax.config", "keye_jax.byte_level"),
    "keye_jax.byte_level": (),
    "keye_jax.presets": ("keye_jax.errors",),
    "keye_jax.config": ("keye_jax.config_rules", "keye_jax.quantization"),
    "keye_jax.quantization": ("keye_jax.errors", "pallas_kernels"),
    "keye_jax.config_rules": ("keye_jax.parsing",),
    "keye_jax.parsing": ("keye_jax.errors",),
    "keye_jax.errors": (),
    "keye_jax.file_lock": (),
    "keye_jax.call_process": ("keye_jax.interrupts",),
    "keye_jax.interrupts": (),
    "keye_jax": (),  # __init__.py: the version, and names of the library that are looked up late
    "keye_jax.progress": (),
    "convert": ("keye_jax.config", "keye_jax.sharding", "keye_jax.progress", "keye_jax.file_lock"),
    "pallas_kernels": (),
}


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for package in ("keye_jax", "convert", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Modules of the packages that a module imports, wherever in it, with the lines."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            # `from package import module` imports the module.
            names = [each if (each := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        for each in names:
            if each.split(".")[0] in ("keye_jax", "convert", "pallas_kernels") and each != name:
                yield each, node.lineno


def part_of(module: str) -> str:
    """The part that a module belongs to."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "keye_jax" and len(names) > 1 else names[0]


def below(part: str) -> set[str]:
    """All parts that arrows from this one lead to, over others too."""
    found: set[str] = set()
    waiting = list(ARROWS[part])
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += ARROWS[each]
    return found


def test_the_table_has_every_part_and_no_circle():
    assert {part_of(name) for name in MODULES} == set(ARROWS)
    for part in ARROWS:
        assert part not in below(part), f"{part} is below itself"


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_imports_point_down(part: str):
    allowed = below(part) | {part}
    upward = [
        f"{name}:{line} imports {each}"
        for name, path in MODULES.items()
        if part_of(name) == part
        for each, line in imported(name, path)
        if part_of(each) not in allowed
    ]
    assert not upward, "\n".join(upward)


def test_modules_do_not_import_each_other_in_a_circle():
    """Within a part too. A package stands for what its `__init__` imports."""
    edges = {name: {each for each, _ in imported(name, path)} & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for each in sorted(edges[name]):
                visit(each, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_the_package_itself_imports_nothing():
    """Its names, those of the library, are looked up when they are used."""
    assert not list(imported("keye_jax", MODULES["keye_jax"]))
    program = "import sys, keye_jax; print('jax' in sys.modules, keye_jax.Engine.__name__, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Engine", "True"]
    for name in keye_jax._LIBRARY:
        assert getattr(keye_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'keye_jax' has no attribute 'engin'"):
        keye_jax.engin  # noqa: B018


def test_an_import_in_a_function_or_for_types_is_found(tmp_path):
    file = tmp_path / "made.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from keye_jax import runtime\n"
        "def f():\n    import convert.load\n    from ..model.keye import Keye\n"
    )
    found = {name for name, _ in imported("keye_jax.sharding.made", file)}
    assert found == {"keye_jax.runtime", "convert.load", "keye_jax.model.keye"}

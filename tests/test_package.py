"""The package as a stranger gets it: a wheel in an environment of its own, used from an empty folder."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("keye_jax", "pallas_kernels", "convert")

# How the distribution is called that a module comes from, where the names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "jaxlib": "jax",
    "orbax": "orbax-checkpoint",
    "pillow_heif": "pillow-heif",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
    "yaml": "pyyaml",
}
LOADED_BY_NAME = {"huggingface_hub", "modelscope", "ray"}  # in convert/hub.py and keye_jax/jobs/ray.py
NOT_REQUIRED = {"torch", "tensorboardX"}  # the benchmark compares with one, and training writes curves with the other


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment in which the wheel is installed. It sees neither the checkout nor an installed copy of it.

    The dependencies are those of the environment that runs the tests.
    """
    pytest.importorskip("pip")
    wheels, prefix = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed") / "venv"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    isolated = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    check_call([*pip, "wheel", "--no-deps", *isolated, "--wheel-dir", str(wheels), str(ROOT)], wheels)
    [wheel] = wheels.glob("keye_jax-*.whl")
    check_call([sys.executable, "-m", "venv", "--without-pip", str(prefix)], wheels)
    python = prefix / "bin" / "python"
    check_call([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], wheels)
    # A path in a .pth file is searched last, and the .pth files that lie there, of an editable install, are not read.
    [library] = prefix.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (library / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return SimpleNamespace(python=str(python), command=str(prefix / "bin" / "keye-jax"), library=library)


@pytest.fixture
def run(installed, tmp_path, monkeypatch):
    """Runs a command of the environment in an empty folder, and returns what it prints."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for name in ("PYTHONPATH", "PYTHONHOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "empty"
    folder.mkdir()
    return lambda *command: check_call([*command], folder)


def check_call(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


class TestInstalled:
    def test_all_is_imported_from_there(self, run, installed):
        code = f"import {', '.join(PACKAGES)}\nfor each in ({', '.join(PACKAGES)}): print(each.__file__)"
        found = run(installed.python, "-P", "-c", code).splitlines()
        assert found == [str(installed.library / name / "__init__.py") for name in PACKAGES]

    def test_configs_are_those_of_the_checkout(self, run, installed):
        directory = Path(run(installed.python, "-c", "from keye_jax import presets; print(presets.DIRECTORY)").strip())
        assert directory == installed.library / "keye_jax" / "configs"
        assert contents(directory) == contents(ROOT / "configs")

    def test_help(self, run, installed):
        assert "--prefill" in run(installed.command, "bench", "--help")
        assert "DIR" in run(installed.python, "-m", "keye_jax.demo", "--help")
        assert "--modelscope" in run(installed.python, "-m", "convert", "--help")

    @pytest.mark.slow
    def test_plan(self, run, installed):
        plan = [installed.command, "plan", "--no-compile"]
        printed = run(*plan, "--platform", "h200:1", "--context", "128K")
        assert printed.startswith("h200:1: 1 devices") and "it fits" in printed
        configs = installed.library / "keye_jax" / "configs"
        plan += ["--config", str(configs / "model" / "tiny.json"), "--platform", "h200:4", "--context", "32K"]
        preset = run(*plan, "--sharding", "expert")
        assert preset.startswith("h200:4: 4 devices (expert 4)")
        assert run(*plan, "--sharding", str(configs / "sharding" / "expert.yaml")) == preset

    @pytest.mark.slow
    def test_bench(self, run, installed, monkeypatch):
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        config = installed.library / "keye_jax" / "configs" / "model" / "tiny.json"
        sizes = ["--layers", "1", "--prefill", "64", "--prefill-chunk", "64", "--decode", "1x128", "--repeats", "1"]
        less = ["--packed", "", "--no-dense", "--no-fp8", "--no-unions"]
        printed = run(installed.command, "bench", "--config", str(config), *sizes, *less)
        assert "prefill 64, sparse" in printed and "decode, 1 x 128, sparse" in printed

    @pytest.mark.slow
    def test_demo(self, run, installed, tmp_path):
        printed = run(installed.python, "-m", "keye_jax.demo", "here")
        assert re.search(r"Done in \d+ s\.$", printed, re.M)
        found = {path.name for path in (tmp_path / "empty" / "here").iterdir()}
        assert found == {"orbax", "clip.mp4", ".keye-jax-demo"}
        assert re.search(r"^[45] of 5 are right", printed, re.M)
        assert {path.name for path in (tmp_path / "empty").iterdir()} == {"here"}


class TestDependencies:
    """What is imported is required, and what is required is imported."""

    def test_of_the_packages(self):
        imported = set().union(*(self.imported(ROOT / name) for name in PACKAGES))
        assert (imported - NOT_REQUIRED) | LOADED_BY_NAME == self.required(
            "video", "heic", "hub", "ray", "train", "bench", "serve"
        )

    def test_of_the_tests(self):
        assert self.imported(ROOT / "tests") <= self.required(
            "video", "heic", "hub", "ray", "train", "bench", "serve", "dev"
        )

    @staticmethod
    def required(*extras: str) -> set[str]:
        """Names of the dependencies, with those of the extras."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
        names = {re.sub(r"[^\w.-].*", "", line) for line in [*project["dependencies"], *lines]}
        return names - {project["name"]}

    @staticmethod
    def imported(folder: Path) -> set[str]:
        """Distributions of other projects that the files of a folder import."""
        found: set[str] = set()
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module)
        modules = {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"tests", *PACKAGES}
        # Some tests import their neighbours by bare names.
        modules -= {path.stem for path in folder.rglob("*.py")}
        return {DISTRIBUTIONS.get(module, module) for module in modules}


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.suffix in (".json", ".yaml"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}

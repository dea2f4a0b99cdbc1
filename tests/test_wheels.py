"""The two distributions, arkv and arkv-bench: their settings agree, their wheels are complete, and they work alone."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from email.message import Message
from email.parser import Parser
from functools import cache
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import SOURCES, imports, parse

ROOT = Path(__file__).resolve().parents[1]
VERSION = (ROOT / "arkv" / "VERSION").read_text(encoding="utf-8").strip()
NOT_IN_THE_PACKAGE = {"LICENSE", "README.md", "VERSION", "pyproject.toml"}
"""Files in arkv/ that are about the distribution."""


def settings(folder: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


# What the two pyproject.toml say -------------------------------------------------------------------------------------


def test_both_have_one_version_and_one_range_of_python() -> None:
    library, suite = settings(ROOT / "arkv"), settings(ROOT)
    for folder, found in ((ROOT / "arkv", library), (ROOT, suite)):
        assert found["project"]["dynamic"] == ["version"]
        assert folder / found["tool"]["setuptools"]["dynamic"]["version"]["file"] == ROOT / "arkv" / "VERSION"
    # The one number that is written a second time.
    assert [need for need in suite["project"]["dependencies"] if need.startswith("arkv")] == [f"arkv=={VERSION}"]
    for key in ("requires-python", "license", "authors"):
        assert library["project"][key] == suite["project"][key]
    assert library["build-system"] == suite["build-system"]
    assert (ROOT / "arkv" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_library_needs_torch_and_transformers_only() -> None:
    needs = settings(ROOT / "arkv")["project"]["dependencies"]
    assert {re.split(r"[^\w-]", need)[0] for need in needs} == {"torch", "transformers"}


def test_the_library_shows_the_same_example_as_the_suite() -> None:
    shown = [
        re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        for folder in (ROOT / "arkv", ROOT)
    ]
    assert shown[0]
    assert shown[1]
    assert shown[0][1] == shown[1][1]


def test_every_package_of_the_library_is_named() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "arkv").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders if "build" not in folder.parts}
    assert set(settings(ROOT / "arkv")["tool"]["setuptools"]["packages"]) == found, "name it in arkv/pyproject.toml"


IMPORTED_AS = {"optimum-quanto": "optimum", "lm-eval": "lm_eval", "pyyaml": "yaml"}
"""Where the name of an import is not that of its distribution."""
COMES_WITH = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "markupsafe": "jinja2",
    "sklearn": "lm_eval",
}
"""Imports that a requirement brings along: its own interface is made of them, or it alone wants them (sklearn)."""


@cache
def imported(*folders: str) -> set[str]:
    """What the sources in ``folders`` import of others, by top-level name."""
    trees = {source: parse(source) for source in SOURCES if source.split("/")[0] in folders}
    found = {name for source, tree in trees.items() for name, _ in imports(tree, source)}
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"arkv", "bench", "tasks"}


def test_every_requirement_is_imported_or_says_what_it_is_for() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    needs = settings(ROOT)["project"]
    found = imported("bench", "tasks")
    for need in needs["dependencies"]:
        name = re.split(r"[^\w-]", need)[0]
        (line,) = (line for line in lines if line.strip().startswith(f'"{need}"'))
        assert IMPORTED_AS.get(name, name) in found or "#" in line, f"{name}: nobody imports it"
    assert {"ray", "optuna"} <= found


def test_every_import_of_others_is_a_requirement() -> None:
    needs = settings(ROOT)["project"]
    asked = [*needs["dependencies"], *(need for extra in needs["optional-dependencies"].values() for need in extra)]
    names = {re.split(r"[^\w-]", need)[0] for need in asked}
    allowed = {IMPORTED_AS.get(name, name) for name in names}
    assert {name for name in imported("bench", "tasks") if COMES_WITH.get(name, name) not in allowed} == set()


def test_lm_eval_is_capped_below_its_next_minor() -> None:
    (need,) = (need for need in settings(ROOT)["project"]["dependencies"] if need.startswith("lm-eval"))
    (_, least), (_, limit) = (re.split(r"(?<=[<=])(?=\d)", part) for part in need.split("]")[1].split(","))
    major, minor = least.split(".")[:2]
    assert limit == f"{major}.{int(minor) + 1}"


# What is built -------------------------------------------------------------------------------------------------------


def run(*command: object, errors: bool = False, **options: Any) -> str:
    done = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout + (done.stderr if errors else "")


class Built:
    """Sdists and wheels of a copy of this checkout, in which older builds have left their traces."""

    def __init__(self, folder: Path) -> None:
        self.source, self.dist = folder / "source", folder / "dist"
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*", "*~", "*.orig")
        for name in ("arkv", "bench", "tasks", "tests"):
            shutil.copytree(ROOT / name, self.source / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.source / name)
        self.files = {
            path.relative_to(self.source).as_posix()
            for name in ("arkv", "bench", "tasks")
            for path in (self.source / name).rglob("*")
            if path.is_file()
        } - {f"arkv/{name}" for name in NOT_IN_THE_PACKAGE}
        for name in ("arkv/build/lib/arkv/stale.py", "build/lib/bench/stale.py", "build/lib/tests/stale.py"):
            (self.source / name).parent.mkdir(parents=True)
            (self.source / name).touch()

        # As `make wheels` does it, without an index.
        self.dist.mkdir()
        code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
        for project in (self.source / "arkv", self.source):
            run(sys.executable, "-c", code, self.dist, cwd=project)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
        sdists = sorted(self.dist.glob("*.tar.gz"))
        run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "-w", self.dist, *sdists, cwd=folder)

    def wheel(self, name: str) -> Path:
        return self.dist / f"{name}-{VERSION}-py3-none-any.whl"

    def names(self, name: str) -> set[str]:
        with zipfile.ZipFile(self.wheel(name)) as file:
            return set(file.namelist())

    def metadata(self, name: str) -> Message:
        with zipfile.ZipFile(self.wheel(name)) as file:
            return Parser().parsestr(file.read(f"{name}-{VERSION}.dist-info/METADATA").decode())

    def requirements(self, name: str) -> set[str]:
        """Without those of extras."""
        found = self.metadata(name).get_all("Requires-Dist") or []
        return {need.replace(" ", "") for need in found if "extra ==" not in need}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("wheels"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packages"), [("arkv", {"arkv"}), ("arkv_bench", {"bench", "tasks"})])
def test_a_wheel_holds_every_file_of_its_packages_and_nothing_else(built: Built, name: str, packages: set[str]) -> None:
    about = {file for file in built.names(name) if file.startswith(f"{name}-{VERSION}.dist-info/")}
    assert built.names(name) - about == {file for file in built.files if file.split("/")[0] in packages}
    assert f"{name}-{VERSION}.dist-info/licenses/LICENSE" in about


@pytest.mark.slow
def test_what_is_no_python_is_there(built: Built) -> None:
    """The comparison above would not see a file that is missing in both."""
    assert {"arkv/py.typed", "arkv/kernels/cpu/attend.c", "arkv/kernels/cpu/numbers.h"} <= built.names("arkv")
    assert {"bench/presets/demo.yaml", "bench/report/templates/page.css"} <= built.names("arkv_bench")
    with tarfile.open(built.dist / f"arkv-{VERSION}.tar.gz") as file:
        sdist = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"VERSION", "README.md", "LICENSE", "py.typed", "kernels/cpu/attend.c", "kernels/cpu/numbers.h"} <= sdist


@pytest.mark.slow
def test_the_metadata_says_what_each_needs(built: Built) -> None:
    assert {re.split(r"[^\w-]", need)[0] for need in built.requirements("arkv")} == {"torch", "transformers"}
    assert f"arkv=={VERSION}" in built.requirements("arkv_bench")
    extras = set(built.metadata("arkv_bench").get_all("Provides-Extra") or [])
    assert extras == {"peers", "ray", "tune", "dev"}
    for name in ("arkv", "arkv_bench"):
        found = built.metadata(name)
        assert (found["Version"], found["License-Expression"]) == (VERSION, "MIT")
        assert found["Requires-Python"] == settings(ROOT)["project"]["requires-python"]
    assert str(built.metadata("arkv").get_payload()).strip().startswith("# arkv\n")


# What is installed ---------------------------------------------------------------------------------------------------

DECODE = """
import sys
from importlib.metadata import version
from importlib.util import find_spec
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import arkv
from arkv import CacheConfig, compress

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
inputs = {"input_ids": torch.randint(1, 97, (1, 300)), "attention_mask": torch.ones(1, 300, dtype=torch.int64)}
with compress(model, CacheConfig.for_method("mix", cache_size=128, quant_format="int8")) as cache:
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
counts = cache.token_counts()
assert output.shape == (1, 308), output.shape
assert all(counts[state] > 0 for state in ("original", "quantized", "evicted")), counts
assert find_spec("bench") is None and find_spec("tests") is None
assert "lm_eval" not in sys.modules
print(arkv.__file__, version("arkv"))
"""


class Installed:
    """An environment with the wheel of arkv, that shares all other packages with the one the tests run in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
        self.bin = folder / "env" / "bin"
        (self.packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        self.install(wheel)

    def install(self, wheel: Path) -> None:
        """By pip from outside, while the shared packages are not to be seen: it must not touch what lies there."""
        shared = self.packages / "shared.pth"
        shared.unlink(missing_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.bin / "python"]
        run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=self.folder)
        # A folder on the path, whose own .pth files, of editable installs, are not read.
        folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        shared.write_text("".join(f"{path}\n" for path in folders), encoding="utf-8")

    def run(
        self,
        program: str,
        *arguments: object,
        under: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        errors: bool = False,
    ) -> str:
        """Outside of the repository, with nothing of it on the path, and a home of its own; ``errors`` adds stderr."""
        more = dict(environment or {})
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ARKV"))}
        variables |= {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache"), **more}
        return run(*under, self.bin / program, *arguments, cwd=self.folder, env=variables, errors=errors)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), built.wheel("arkv"))


@pytest.mark.slow
def test_the_library_decodes_without_the_suite(installed: Installed) -> None:
    assert installed.run("python", "-c", DECODE).split() == [str(installed.packages / "arkv" / "__init__.py"), VERSION]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_kernels_are_built_where_the_package_cannot_be_written(installed: Installed) -> None:
    folder = installed.packages / "arkv" / "kernels" / "cpu"
    kept = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if path.is_dir()}
    under: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root writes everywhere, unless it gives that right up
        under = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
        if shutil.which("setpriv") is None or subprocess.run([*under, "true"], capture_output=True).returncode:
            pytest.skip("root can write everywhere, and setpriv cannot change that here")
    for path in kept:
        path.chmod(0o555)
    try:
        said = installed.run("python", "-m", "arkv.kernels", under=under)
        library = Path(said.removeprefix("CPU kernels: ").strip())
        assert library.parent == installed.folder / "cache" / "arkv"
        loaded = "from arkv.kernels.cpu.building import library; print(library()._name)"
        assert installed.run("python", "-c", loaded, under=under).strip() == str(library)
    finally:
        for path, mode in kept.items():
            path.chmod(mode)


@pytest.mark.slow
def test_the_suite_answers_beside_the_library(built: Built, tmp_path: Path) -> None:
    installed = Installed(tmp_path, built.wheel("arkv"))
    installed.install(built.wheel("arkv_bench"))
    assert "run" in installed.run("arkv-bench", "--help")
    assert installed.run("arkv-bench", "--version") == f"arkv-bench {VERSION}\n"
    assert "paper-longbench" in installed.run("arkv-bench", "list", "presets")
    code = "import arkv, bench, tasks; print(arkv.__file__, bench.__file__, tasks.__file__)"
    places = [str(installed.packages / name / "__init__.py") for name in ("arkv", "bench", "tasks")]
    assert installed.run("python", "-c", code).split() == places


class Required(Installed):
    """An environment with both wheels and what they ask for, and what that asks for: no pip, no extras, no tools.

    Those packages are links to the ones that the tests run with, so that nothing is downloaded.
    """

    def __init__(self, folder: Path, *wheels: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
        self.bin = folder / "env" / "bin"
        (self.packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        self.pip("install", "-q", "--no-deps", "--no-index", *wheels)
        own = {wheel.name.split("-")[0].replace("_", "-") for wheel in wheels}
        for name in self.needed(*wheels) - own:
            for file in distribution(name).files or []:
                source, target = Path(str(distribution(name).locate_file(file.parts[0]))), self.packages / file.parts[0]
                if file.parts[0] != ".." and not target.exists():
                    target.symlink_to(source.resolve())

    def pip(self, *arguments: object) -> str:
        """Pip from outside."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.bin / "python"]
        return run(*pip, *arguments, cwd=self.folder)

    def needed(self, *wheels: Path) -> set[str]:
        """All that has to be installed, by canonical name."""
        found: set[str] = set()
        waiting: list[tuple[str, str]] = []

        def ask(requirements: Sequence[str], extra: str) -> None:
            for requirement in map(Requirement, requirements):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    waiting.extend((canonicalize_name(requirement.name), part) for part in ("", *requirement.extras))

        for wheel in wheels:
            (about,) = self.packages.glob(f"{wheel.name.split('-')[0]}-*.dist-info")
            ask(PathDistribution(about).requires or [], "")
        seen: set[tuple[str, str]] = set()
        while waiting:
            name, extra = item = waiting.pop()
            if item not in seen and not name.startswith("arkv"):
                seen.add(item)
                found.add(name)
                ask(distribution(name).requires or [], extra)
        return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # it installs, compiles, and beside others answers
def test_a_demo_in_an_empty_environment(built: Built, tmp_path: Path) -> None:
    """As after `pip install arkv-bench`: no checkout, no pip, no extras; the kernels are compiled by the first use."""
    from bench.models.storage import cache_root

    installed = Required(tmp_path, built.wheel("arkv"), built.wheel("arkv_bench"))
    assert "No broken requirements" in installed.pip("check")
    absent = (
        "from importlib.util import find_spec as f; print([n for n in ('pip', 'kvpress', 'optuna', 'pytest') if f(n)])"
    )
    assert installed.run("python", "-c", absent) == "[]\n"
    # The model of this user's cache, or fetched into it.
    (cache_root() / "models").mkdir(parents=True, exist_ok=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "models").symlink_to(cache_root() / "models")

    few = ["--lengths", "600", "--samples", "2", "--cache-ratio", "0.25"]
    arguments = ["run", "--preset", "demo", *few, "--outdir", "runs/first"]
    environment = {"ARKV_CACHE": str(tmp_path / "own"), "TQDM_DISABLE": "1"}
    first = installed.run("arkv-bench", *arguments, environment=environment, errors=True)
    record = json.loads((tmp_path / "runs" / "first" / "record.json").read_text())
    assert record["hardware"]["cpu_kernel"] is (shutil.which("cc") is not None)
    assert ("Compiling the CPU kernels" in first) is (shutil.which("cc") is not None)
    with open(tmp_path / "runs" / "first" / "results.csv", newline="") as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    assert {"full", "window", "mix"} <= methods
    assert "mix" in installed.run("arkv-bench", "report", environment=environment)
    assert "Compiling" not in installed.run("arkv-bench", "doctor", environment=environment, errors=True)

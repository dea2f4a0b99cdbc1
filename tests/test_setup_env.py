"""scripts/setup_env.sh, driven in a copy of the repository's settings with stand-ins for python's pip and for conda."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs the real Python, but a "virtual environment" is a folder with this same script in it, and pip only writes down
# what it was asked for.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && : >"${@: -1}/pyvenv.cfg" ;;
    "-m pip")
        echo "${@:3}" >>"$RECORD"
        if [ "$3" = install ] && [ -n "${PIP_FAILS:-}" ]; then echo "no such release" && exit 1; fi
        ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""

# Knows one environment, `there`; keeps the spec it is handed.
FAKE_CONDA = """#!/bin/bash
echo "$(basename "$0") $*" >>"$RECORD"
if [ "$1 $2" = "env list" ]; then
    printf '# conda environments:\\n#\\nbase    *  /opt/conda\\nthere      /opt/conda/envs/there\\n'
fi
while [ $# -gt 0 ]; do
    if [ "$1" = -f ]; then cp "$2" "$RECORD.yml"; fi
    shift
done
"""


class Workshop:
    """A small repository with the script in it, a PATH with the stand-ins, and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        self.bin = folder / "bin"
        self.record = folder / "record"
        (self.repository / "scripts").mkdir(parents=True)
        (self.repository / "arkv").mkdir()
        self.bin.mkdir()
        for name in (
            "scripts/setup_env.sh",
            "pyproject.toml",
            "arkv/pyproject.toml",
            "arkv/VERSION",
            "constraints.txt",
            "constraints-newest.txt",
            "environment.yml",
        ):
            shutil.copy(ROOT / name, self.repository / name)
        self.put("python3", FAKE_PYTHON)

    def put(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.repository / "scripts" / "setup_env.sh", *map(str, arguments)],
            cwd=self.folder,
            env={
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "RECORD": str(self.record),
                "REAL_PYTHON": sys.executable,
                "HOME": str(self.folder),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def succeed(self, *arguments: object, **environment: str) -> str:
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refuse(self, *arguments: object, **environment: str) -> str:
        """The one line with which the script declines."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.startswith("setup_env.sh: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    def recorded(self) -> list[str]:
        """The commands so far, forgotten once read."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return lines

    def handed(self) -> str:
        """The spec that conda was handed."""
        return Path(f"{self.record}.yml").read_bytes().decode()


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def conda(workshop: Workshop) -> Workshop:
    workshop.put("conda", FAKE_CONDA)
    return workshop


def test_help_explains_every_option(workshop: Workshop) -> None:
    text = workshop.succeed("--help")
    options = "venv python extras newest-transformers base conda file name dry-run help"
    for option in options.split(" "):
        assert f"\n  --{option} " in text or f", --{option} " in text or f"\n  --{option}\n" in text
    assert workshop.succeed("-h") == text
    assert workshop.recorded() == []


# Virtual environments ------------------------------------------------------------------------------------------------


def test_a_virtual_environment_is_pinned_and_editable(workshop: Workshop) -> None:
    assert "Ready" in workshop.succeed()
    install = workshop.recorded()[-1]
    assert install.startswith("install -q ")
    assert f"-c {workshop.repository}/constraints.txt" in install
    assert install.endswith(f" -e {workshop.repository}/arkv -e {workshop.repository}[dev,peers,tune,ray]")
    assert (workshop.repository / ".venv" / "bin" / "python").exists()


def test_a_second_run_does_nothing_until_something_changes(workshop: Workshop) -> None:
    workshop.succeed()
    workshop.recorded()
    assert workshop.succeed() == "Up to date: .venv\n"
    assert workshop.recorded() == []

    for change in ("pyproject.toml", "arkv/pyproject.toml", "arkv/VERSION", "constraints.txt"):
        with (workshop.repository / change).open("a") as file:
            file.write("# changed\n")
        assert "updating .venv" in workshop.succeed()
        assert workshop.recorded()
    assert "updating .venv" in workshop.succeed("--extras", "dev")
    assert workshop.recorded()[-1].endswith("[dev]")
    assert "Up to date" in workshop.succeed("--extras", "dev")


def test_a_failed_install_shows_why_and_is_tried_again(workshop: Workshop) -> None:
    done = workshop.run(PIP_FAILS="1")
    assert done.returncode == 1
    assert "no such release" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("setup_env.sh: pip failed; its whole output is in ")
    workshop.recorded()
    assert "Ready" in workshop.succeed()
    assert workshop.recorded()


def test_the_folder_is_relative_to_the_caller_and_extras_may_be_none(workshop: Workshop) -> None:
    workshop.succeed("--venv", "my envs/a", "--extras", "")
    assert (workshop.folder / "my envs" / "a" / "bin" / "python").exists()
    assert workshop.recorded()[-1].endswith(f"-e {workshop.repository}")


def test_a_folder_of_someone_else_is_left_alone(workshop: Workshop) -> None:
    precious = workshop.folder / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    assert "was not made by this script" in workshop.refuse("--venv", precious)
    assert (precious / "thesis.tex").exists()
    assert workshop.recorded() == []


def test_dry_run_prints_the_commands_and_runs_none(workshop: Workshop) -> None:
    text = workshop.succeed("--dry-run", "--extras", "dev")
    commands = [line for line in text.splitlines() if line.startswith("+ ")]
    assert commands[0].startswith("+ python3 -m venv ")
    assert "-m pip install" in commands[1]
    assert "constraints.txt" in commands[1]
    assert not (workshop.repository / ".venv").exists()
    assert workshop.recorded() == []


@pytest.mark.parametrize("version", ["2.7.18", "3.6.15", "3.9.18"])
def test_an_old_python_is_named(workshop: Workshop, version: str) -> None:
    workshop.put("python3", f"#!/bin/sh\necho {version}\n")
    line = workshop.refuse()
    assert "Python 3.10 or newer is needed" in line
    assert f"python3 is {version}" in line
    assert "--python" in line


def test_a_missing_python_is_named(workshop: Workshop) -> None:
    assert "python4 does not start" in workshop.refuse("--python", "python4")


def test_a_python_without_venv_names_the_package_to_install(workshop: Workshop) -> None:
    script = '#!/bin/bash\ncase "$2" in *ensurepip*) exit 1 ;; *) exec "$REAL_PYTHON" "$@" ;; esac\n'
    workshop.put("python3", script)
    assert "apt-get install python3-venv" in workshop.refuse()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--venv"], "--venv needs a value"),
        (["--name", "x"], "add --conda or --file"),
        (["--base", "x"], "goes with --newest-transformers"),
        (["--conda", "--venv", "x"], "not about conda"),
        (["--extras", "dev peers"], "separated by commas"),
    ],
)
def test_options_that_make_no_sense_are_refused(workshop: Workshop, arguments: list[str], reason: str) -> None:
    assert reason in workshop.refuse(*arguments)


needs_python_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="the newest transformers needs Python 3.11")


@needs_python_311
def test_the_newest_transformers_replaces_pins_and_leaves_the_peers_out(workshop: Workshop) -> None:
    workshop.succeed("--newest-transformers")
    install = workshop.recorded()[-1]
    venv = workshop.repository / ".venv-newest"
    assert install.endswith(f"-c {venv}/constraints.txt -e {workshop.repository}/arkv -e {workshop.repository}[dev]")

    def pins(path: Path) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                found.setdefault(line.split("==")[0], set()).add(line)
        return found

    usual = pins(workshop.repository / "constraints.txt")
    newer = pins(workshop.repository / "constraints-newest.txt")
    assert newer["transformers"] != usual["transformers"]
    assert pins(venv / "constraints.txt") == usual | newer
    assert "Up to date" in workshop.succeed("--newest-transformers")


@needs_python_311
def test_the_newest_transformers_starts_from_a_copy_by_hard_links(workshop: Workshop) -> None:
    workshop.succeed()
    base, venv = workshop.repository / ".venv", workshop.repository / ".venv-newest"
    packages = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (base / packages / "library").mkdir(parents=True)
    (base / packages / "library" / "__init__.py").write_text("here = 1\n")
    (base / "bin" / "tool").write_text(f"#!{base}/bin/python\nprint('tool')\n")
    (base / "bin" / "tool").chmod(0o755)
    (base / "bin" / "program").write_bytes(b"\x7fELF")
    workshop.recorded()

    workshop.succeed("--newest-transformers")
    assert (venv / packages / "library" / "__init__.py").samefile(base / packages / "library" / "__init__.py")
    assert (venv / "bin" / "program").samefile(base / "bin" / "program")
    assert (venv / "bin" / "tool").read_text() == f"#!{venv}/bin/python\nprint('tool')\n"
    assert os.access(venv / "bin" / "tool", os.X_OK)
    assert (base / "bin" / "tool").read_text().startswith(f"#!{base}/bin/python")
    assert not (venv / "bin" / "python").samefile(base / "bin" / "python")
    uninstall = next(line for line in workshop.recorded() if line.startswith("uninstall"))
    assert {"kvpress", "optuna", "ray"} <= set(uninstall.split())
    assert "pytest" not in uninstall.split()


@pytest.mark.slow
@needs_python_311
def test_the_two_real_environments_are_apart() -> None:
    """``make test`` has made both; elsewhere the second one is made here."""
    if not Path(sys.prefix, ".arkv-setup").exists():
        pytest.skip("not running in an environment that scripts/setup_env.sh made")
    newest = Path(f"{sys.prefix}-newest")
    command = [ROOT / "scripts" / "setup_env.sh", "--venv", newest, "--newest-transformers", "--base", sys.prefix]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    again = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert again.stdout.startswith("Up to date")

    def version(python: Path | str, package: str) -> str:
        code = f"from importlib.metadata import version; print(version('{package}'))"
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()

    pins = dict(line.split("==") for line in (ROOT / "constraints-newest.txt").read_text().split() if "==" in line)
    for package, pinned in pins.items():
        assert version(newest / "bin" / "python", package) == pinned
        assert version(sys.executable, package) not in ("", pinned)
    assert version(newest / "bin" / "python", "kvpress") == ""
    subprocess.run([newest / "bin" / "python", "-m", "pip", "check"], check=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
@needs_python_311
def test_the_core_passes_its_tests_under_the_newest_transformers() -> None:
    newest = Path(f"{sys.prefix}-newest", "bin", "python")
    if not newest.exists():
        pytest.skip("make env-newest makes the environment that this needs")
    command = [newest, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/arkv"]
    run = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


# Conda ---------------------------------------------------------------------------------------------------------------


def test_conda_makes_the_environment_then_installs_the_pins(conda: Workshop) -> None:
    conda.succeed("--conda")
    listing, create, install = conda.recorded()
    assert listing == "conda env list"
    assert create.startswith("conda env create -n arkv -f ")
    assert install == (
        f"conda run -n arkv python -m pip install -q -c {conda.repository}/constraints.txt "
        f"-e {conda.repository}/arkv -e {conda.repository}[dev,peers,tune,ray]"
    )
    assert "name: arkv\n" in conda.handed()
    assert "- python=3.11\n" in conda.handed()


def test_conda_updates_what_exists(conda: Workshop) -> None:
    conda.succeed("--conda", "--name", "there", "--extras", "dev")
    _, update, install = conda.recorded()
    assert update.startswith("conda env update -n there -f ")
    assert install.endswith("[dev]")


@pytest.mark.parametrize(
    ("tool", "name", "command"),
    [
        ("mamba", "new", "mamba env create -n new -f "),
        ("mamba", "there", "mamba env update -n there -f "),
        ("micromamba", "new", "micromamba create -y -n new -f "),
        ("micromamba", "there", "micromamba install -y -n there -f "),
    ],
)
def test_mamba_and_micromamba_serve_as_well(workshop: Workshop, tool: str, name: str, command: str) -> None:
    workshop.put(tool, FAKE_CONDA)
    workshop.succeed("--conda", "--name", name)
    _, make, install = workshop.recorded()
    assert make.startswith(command)
    assert install.startswith(f"{tool} run -n {name} python -m pip install ")


def test_without_any_conda_one_line_says_so(workshop: Workshop) -> None:
    assert "none of conda, mamba and micromamba is on PATH" in workshop.refuse("--conda")


def test_an_exported_spec_loses_its_prefix_and_takes_the_name(conda: Workshop) -> None:
    spec = conda.folder / "exported.yml"
    text = "name: theirs\nchannels:\n  - defaults\ndependencies:\n  - numpy=1.26\nprefix: /home/them/envs/theirs\n"
    spec.write_text(text)
    conda.succeed("--file", "exported.yml", "--name", "mine")
    _, create, install = conda.recorded()
    assert create.startswith("conda env create -n mine -f ")
    assert str(spec) not in create
    assert install == f"conda run -n mine python -m pip install -q -e {conda.repository}/arkv -e {conda.repository}"
    assert conda.handed() == "name: mine\nchannels:\n  - defaults\ndependencies:\n  - numpy=1.26\n"
    assert spec.read_text() == text
    assert not Path(create.split()[-1]).exists(), "the copy is removed afterwards"


@pytest.mark.parametrize(
    ("spec", "handed"),
    [
        pytest.param(
            "prefix: /x\nname: a\ndependencies: [pip]\n", "name: mine\ndependencies: [pip]\n", id="prefix first"
        ),
        pytest.param(
            "name: a\nprefix: /x\ndependencies:\n- pip\n", "name: mine\ndependencies:\n- pip\n", id="in the middle"
        ),
        pytest.param("dependencies:\n  - pip\n", "name: mine\ndependencies:\n  - pip\n", id="no name"),
        pytest.param(
            "name: a\ndependencies:\n  - pip\nprefix: /x", "name: mine\ndependencies:\n  - pip\n", id="no last newline"
        ),
        pytest.param(
            "name: a\r\ndependencies:\r\n  - pip\r\nprefix: C:\\Users\\a b\r\n\r\n",
            "name: mine\ndependencies:\n  - pip\n\n",
            id="windows line ends",
        ),
        pytest.param(
            "\ufeff# exported\n---\n\n'name' : a\n\"prefix\": '/x'\ndependencies: [pip]\n",
            "# exported\n---\n\nname: mine\ndependencies: [pip]\n",
            id="byte order mark, comment, document start, quotes",
        ),
        pytest.param(
            "name: a\nprefix:\n  /x/with a\n  long path\ndependencies: [pip]\n",
            "name: mine\ndependencies: [pip]\n",
            id="value on the next lines",
        ),
        pytest.param(
            "name: a\ndependencies: [pip]\nvariables:\n  prefix: kept\n  name: kept\nprefix: /x\n",
            "name: mine\ndependencies: [pip]\nvariables:\n  prefix: kept\n  name: kept\n",
            id="variables keep theirs",
        ),
        pytest.param(
            "  name: a\n  dependencies:\n  - prefix-lib\n  prefix: /x\n",
            "  name: mine\n  dependencies:\n  - prefix-lib\n",
            id="indented as a whole",
        ),
    ],
)
def test_prefix_and_name_wherever_they_stand(conda: Workshop, spec: str, handed: str) -> None:
    yaml = pytest.importorskip("yaml")
    path = conda.folder / "spec.yml"
    path.write_bytes(spec.encode())
    conda.succeed("--file", path, "--name", "mine")
    assert conda.handed() == handed
    loaded = yaml.safe_load(handed)
    assert loaded["name"] == "mine"
    assert loaded["dependencies"]
    assert "prefix" not in loaded
    assert path.read_bytes() == spec.encode()


def test_a_missing_or_empty_spec_is_named(conda: Workshop) -> None:
    assert "no such file" in conda.refuse("--file", "nowhere.yml")
    (conda.folder / "empty.yml").write_text("# nothing\n")
    assert "nothing but comments" in conda.refuse("--file", "empty.yml")
    assert "may hold letters" in conda.refuse("--conda", "--name", "a b")
    assert conda.recorded() == []


def test_dry_run_of_conda_only_looks(conda: Workshop) -> None:
    text = conda.succeed("--conda", "--dry-run")
    assert "+ conda env create -n arkv -f " in text
    assert "+ conda run -n arkv python -m pip install " in text
    assert conda.recorded() == ["conda env list"]

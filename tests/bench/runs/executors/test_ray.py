"""A run on a real Ray cluster of two nodes on this machine: the same samples, whatever dies on the way."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from bench.engine.engine import Failure
from bench.engine.inspect import read_maps
from bench.errors import UserError
from bench.names import RESULTS, SAMPLES
from bench.runs.executors.base import Unit
from bench.runs.executors.cluster import capacity
from bench.runs.run import Outcome, execute
from bench.settings.run import RunConfig
from tests.bench.conftest import quiet_environment, read_lines, save_tiny_model
from tests.bench.lines import recorded

ray = pytest.importorskip("ray")

from bench.runs.executors import ray as executor  # noqa: E402
from bench.runs.executors import worker  # noqa: E402

PLUGIN = """
import torch

from bench.extend import Method, keep_tokens


class Newest(Method):
    name = "newest"

    def __init__(self):
        self.least = 1

    def compress(self, model, prompt, budget):
        count = max(self.least, budget.tokens)
        return keep_tokens(prompt, [torch.arange(prompt.tokens - count, prompt.tokens)] * len(prompt.layers))
"""

RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Ray's workers would stand back behind everything else on a busy machine."""
ANSWERS = ("model", "task", "document", "prompt_sha256", "cell")
"""What a sample answers."""
TIMES = {"prefill_s", "compress_s", "ttft_ms", "question_s", "decode_s", "tpot_ms", "decode_tokens_per_s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for gsm8k's five examples."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=8192)


def config(model: Path, **settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "model": (str(model),),
        "tasks": ("needle",),
        "quant_type": ("full", "mix"),
        "cache_size": (64,),
        "window_size": (8,),
        "quant_format": ("int8",),
        "lengths": (250,),
        "samples": 12,
        "device": "cpu",
        "dtype": "float32",
    }
    return RunConfig(**{**defaults, **settings})


def go(settings: RunConfig, path: Path) -> tuple[Outcome, str]:
    console = Console(file=io.StringIO(), width=200)
    outcome = execute(settings, path, console)
    return outcome, console.file.getvalue()  # type: ignore[attr-defined]


def samples(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Without times; each once."""
    lines = read_lines(path / SAMPLES)
    found = {tuple(line[name] for name in ANSWERS): {k: v for k, v in line.items() if k not in TIMES} for line in lines}
    assert len(found) == len(lines)
    return found


def table(path: Path) -> list[dict[str, str]]:
    """Rows of results.csv without times."""
    with open(path / RESULTS, newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


# --- Without a cluster ---


def test_room_on_a_cluster() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert capacity(nodes, cpus=1, gpus=0) == 11
    assert capacity(nodes, cpus=2, gpus=0) == 5
    assert capacity(nodes, cpus=1, gpus=1) == 2
    assert capacity(nodes, cpus=1, gpus=2) == 1
    assert capacity(nodes, cpus=1, gpus=0.4) == 4


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens(model: Path, tmp_path: Path, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UserError, match=f"--address={address}: no Ray cluster answers there"):
        go(config(model, executor="ray", address=address), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give auto, local, host:port or ray://host:port"):
        go(config(model, executor="ray", address="nowhere"), tmp_path / "run")


def test_settings_of_ray_without_ray(model: Path) -> None:
    with pytest.raises(UserError, match=r"--workers=2: it needs --executor ray"):
        config(model, workers=2)


@pytest.mark.slow
def test_an_address_where_somebody_else_listens(model: Path, tmp_path: Path) -> None:
    """In a process of its own: what Ray has begun there cannot be stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = shell("--executor", "ray", "--address", address, "--model", model, "--outdir", tmp_path / "run")
    assert done.returncode == 1
    # Ray has its say before.
    *_, last = done.stderr.splitlines()
    assert last == f"arkv-bench: --address={address}: no Ray cluster answered there within 15 s"
    assert "Traceback" not in done.stderr


def command(*arguments: object) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "bench.cli", "run", *map(str, arguments)],
        "cwd": Path(__file__).parents[4],
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(*arguments), env=quiet_environment(**RAY, **environment), check=False, timeout=300)


def running_in(folder: str) -> list[str]:
    """Command lines that name the folder: those of Ray's processes name their session's."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = process.read_bytes().replace(b"\0", b" ").decode()
            found += [line] if folder in line else []
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cluster_of_its_own_and_a_driver_that_is_killed(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments: list[object] = ["--executor", "ray", "--address", "local", "--workers", 1, "--outdir", run]
    arguments += ["--model", model, "--lengths", 2000, "--samples", 12, "--quant-type", "full,mix", "--device", "cpu"]
    arguments += ["--cache-size", 64, "--quant-format", "int8", "--dtype", "float32"]
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        driver = subprocess.Popen(**command(*arguments), env=quiet_environment(**RAY, TMPDIR=folder))
        wait_for(lambda: (run / SAMPLES).is_file() and len((run / SAMPLES).read_bytes().splitlines()) >= 4)
        driver.kill()
        driver.communicate()
        wait_for(lambda: not running_in(folder))
        shutil.rmtree(next(Path(folder).iterdir()))
        before = samples(run)
        assert 4 <= len(before) < 24
        done = shell(*arguments, TMPDIR=folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{len(before)} of 24 answers are in" in done.stdout
        assert "raylet" not in done.stdout
        assert not running_in(folder)
        assert list(Path(folder).iterdir()) == []
    assert len(samples(run)) == 24
    assert before.items() <= samples(run).items()


# --- On a cluster of two nodes ---


def start_cluster() -> Any:
    """One worker fits on each of two nodes; the driver is attached to a head without any cores."""
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}
    found = Cluster()
    try:
        found.add_node(num_cpus=0, **small)
        for _ in range(2):
            found.add_node(num_cpus=1, **small)
    except BaseException:
        found.shutdown()
        raise
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    before = dict(os.environ)
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        root = str(Path(__file__).parents[4])
        os.environ.update(quiet_environment(**RAY, RAY_TMPDIR=folder, PYTHONPATH=root))
        try:
            found = start_cluster()
        except Exception as error:
            # Ray gives a node 30 seconds, which a busy machine may need more than.
            if "timed out during startup" not in str(error):
                raise
            found = start_cluster()
        yield found
        found.shutdown()
    os.environ.clear()
    os.environ.update(before)


def on(cluster: Any, model: Path, **settings: Any) -> RunConfig:
    return config(model, executor="ray", address=cluster.address, **settings)


@pytest.fixture
def after_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any], None]], None]:
    """Have something happen, once, when so many units have come back."""

    def register(count: int, happen: Callable[[Any], None]) -> None:
        original = executor.RayExecutor._take
        seen = 0

        def take(self: Any, ref: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == count:
                happen(self)
            return original(self, ref)

        monkeypatch.setattr(executor.RayExecutor, "_take", take)

    return register


class Stuck(NamedTuple):
    """A worker that has a unit and never answers it."""

    pid: int
    node: str


def hold_one_worker(monkeypatch: pytest.MonkeyPatch, note: Path) -> Callable[[], Stuck]:
    """Have the first worker that gets a unit keep it for good, so that its death finds it at work. Returns a function
    that waits until one does, and says who."""

    class Held(worker.Worker):
        def answer(self, unit: Unit) -> worker.Reply:
            try:
                with open(note, "x") as file:
                    file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}\n")
            except FileExistsError:
                return worker.Worker.answer(self, unit)
            time.sleep(600)
            raise AssertionError("nobody has killed it")

    def stuck() -> Stuck:
        for _ in range(600):
            if note.exists() and (words := note.read_text()).endswith("\n"):
                pid, node = words.split()
                return Stuck(int(pid), node)
            time.sleep(0.1)
        raise AssertionError("no worker has begun with a unit")

    monkeypatch.setattr(executor, "Worker", Held)
    return stuck


@pytest.mark.slow
def test_the_same_samples_as_in_one_process(cluster: Any, model: Path, tmp_path: Path, shared_data: Path) -> None:
    settings: dict[str, Any] = {"tasks": ("needle", "fidelity", "gsm8k"), "samples": 3, "continuation": 8, "limit": 3}
    settings |= {"data_dir": shared_data, "gen_kwargs": "max_gen_toks=8"}
    here, _ = go(config(model, **settings), tmp_path / "here")
    there, said = go(on(cluster, model, **settings), tmp_path / "there")
    assert here.measured == there.measured == 18
    assert samples(tmp_path / "here") == samples(tmp_path / "there")
    assert table(tmp_path / "here") == table(tmp_path / "there")
    assert "2 of 2 workers" in said
    record = recorded(tmp_path / "there")
    assert [worker["ended"] for worker in record["executor"]["workers"]] == [None, None]
    assert record["models"]["tiny"]["device"] == "cpu"
    # Where it was measured does not matter to a run that goes on.
    again, _ = go(config(model, **settings), tmp_path / "there")
    assert again.measured == 0


@pytest.mark.slow
def test_plugins_and_states_maps(cluster: Any, model: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(PLUGIN)
    settings: dict[str, Any] = {"tasks": ("needle", "fidelity"), "quant_type": ("full", "mix", "newest")}
    settings |= {"samples": 3, "continuation": 8, "states": True, "plugin": (str(plugin),)}
    go(config(model, **settings), tmp_path / "here")
    outcome, _ = go(on(cluster, model, **settings), tmp_path / "there")
    assert not outcome.failures
    assert samples(tmp_path / "here") == samples(tmp_path / "there")
    assert {row.method for row in outcome.rows} == {"full", "mix", "newest"}
    # Of mix and of the plugin, whose cache knows its tokens, in each task.
    assert len(read_maps(tmp_path / "there")) == 4
    assert read_maps(tmp_path / "here") == read_maps(tmp_path / "there")


@pytest.mark.slow
def test_a_plugin_that_workers_cannot_run(cluster: Any, model: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(f"import os\nif os.getpid() != {os.getpid()}:\n    import nowhere\n{PLUGIN}")
    with pytest.raises(UserError, match=r"worker 1 on .*own\.py: ModuleNotFoundError: No module named 'nowhere'"):
        go(on(cluster, model, workers=1, quant_type=("full", "newest"), plugin=(str(plugin),)), tmp_path / "run")


@pytest.mark.slow
def test_more_workers_than_there_is_room_for(cluster: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--workers=3: .* room for 2 workers: 3 nodes, 2 CPUs, 0 GPUs"):
        go(on(cluster, model, workers=3), tmp_path / "run")


@pytest.mark.slow
def test_workers_with_another_version(
    cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {**executor.versions(), "transformers": "5.1.9"}
    monkeypatch.setattr(executor, "versions", lambda: mine)
    import transformers

    with pytest.raises(
        UserError, match=f"transformers {transformers.__version__}; this process has transformers 5.1.9"
    ):
        go(on(cluster, model, workers=1), tmp_path / "run")


@pytest.mark.slow
def test_a_worker_that_cannot_even_begin(
    cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lacking(worker.Worker):
        def __init__(self, threads: int) -> None:
            raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(executor, "Worker", Lacking)
    with pytest.raises(UserError, match=r"worker 1 could not be started: .*No module named 'torch'"):
        go(on(cluster, model, workers=1), tmp_path / "run")


@pytest.mark.slow
def test_a_model_that_workers_cannot_see(
    cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind(worker.Worker):
        def prepare(self, setup: Any, fingerprints: Any) -> str | None:
            moved = {name: f"{reference}-elsewhere" for name, reference in setup.models.items()}
            return worker.Worker.prepare(self, dataclasses.replace(setup, models=moved), fingerprints)

    monkeypatch.setattr(executor, "Worker", Blind)
    with pytest.raises(
        UserError, match=r"worker 1 on .* cannot use the model: The model path .*/tiny-elsewhere does not exist"
    ):
        go(on(cluster, model, workers=1), tmp_path / "run")


@pytest.mark.slow
def test_a_worker_is_killed(
    cluster: Any, model: Path, tmp_path: Path, after_units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(config(model), tmp_path / "here")
    stuck = hold_one_worker(monkeypatch, tmp_path / "stuck")
    after_units(3, lambda running: os.kill(stuck().pid, signal.SIGKILL))
    outcome, said = go(on(cluster, model), tmp_path / "there")
    assert "died" in said
    assert "its documents are done by others" in said
    assert not outcome.failures
    assert samples(tmp_path / "here") == samples(tmp_path / "there")
    assert table(tmp_path / "here") == table(tmp_path / "there")


@pytest.mark.slow
def test_a_document_that_kills_its_workers_fails_alone(
    cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = "needle"

    class Poisoned(worker.Worker):
        def answer(self, unit: Unit) -> worker.Reply:
            if any(document.id == poison for document, _ in unit.work):
                os._exit(1)
            return worker.Worker.answer(self, unit)

    go(config(model, samples=3), tmp_path / "here")
    poison = next(iter(samples(tmp_path / "here")))[2]
    monkeypatch.setattr(executor, "Worker", Poisoned)
    outcome, said = go(on(cluster, model, samples=3, retries=1), tmp_path / "there")
    assert [(item["document"], item["cell"]) for item in outcome.failures] == [
        (key[2], key[4]) for key in samples(tmp_path / "here") if key[2] == poison
    ]
    assert "2 workers were lost over it" in outcome.failures[0]["error"]
    assert outcome.measured == 4
    assert sum(line.startswith("worker ") for line in said.splitlines()) == 2
    assert {key for key in samples(tmp_path / "here") if key[2] != poison} == samples(tmp_path / "there").keys()


@pytest.mark.slow
def test_what_one_worker_has_no_memory_for_is_tried_by_another(
    cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = tmp_path / "refused"

    class Small(worker.Worker):
        def answer(self, unit: Unit) -> worker.Reply:
            results, loaded = worker.Worker.answer(self, unit)
            name, result = results[0]
            if not refused.exists():
                refused.touch()
                results[0] = name, Failure(cell=result.cell, error="OutOfMemoryError: CUDA out of memory")
            return worker.Reply(results, loaded)

    monkeypatch.setattr(executor, "Worker", Small)
    outcome, _ = go(on(cluster, model, samples=2, retries=1), tmp_path / "run")
    assert refused.exists()
    assert (outcome.measured, outcome.failures) == (4, [])
    samples(tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(cluster: Any, model: Path, tmp_path: Path, after_units: Any) -> None:
    def stop(running: Any) -> None:
        raise KeyboardInterrupt

    after_units(4, stop)
    with pytest.raises(KeyboardInterrupt):
        go(on(cluster, model), tmp_path / "run")
    assert not ray.is_initialized()
    done = len(samples(tmp_path / "run"))
    assert 0 < done < 24
    outcome, said = go(on(cluster, model), tmp_path / "run")
    assert outcome.measured == 24 - done
    assert f"{done} of 24 answers are in" in said


@pytest.mark.slow
def test_a_node_is_lost(
    cluster: Any, model: Path, tmp_path: Path, after_units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last of those on the cluster: what is left of it is one node."""
    go(config(model), tmp_path / "here")
    stuck = hold_one_worker(monkeypatch, tmp_path / "stuck")

    def remove(running: Any) -> None:
        (node,) = (node for node in cluster.worker_nodes if node.node_id == stuck().node)
        cluster.remove_node(node, allow_graceful=False)

    after_units(3, remove)
    outcome, said = go(on(cluster, model), tmp_path / "there")
    assert "its documents are done by others" in said
    assert not outcome.failures
    assert samples(tmp_path / "here") == samples(tmp_path / "there")
    assert table(tmp_path / "here") == table(tmp_path / "there")

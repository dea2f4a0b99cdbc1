"""Units on a Ray cluster: one actor per worker, which holds one model at a time.

The driver hands out units, starts a worker anew where one has died, and alone writes the run folder. See
``docs/ray.md``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from bench.engine.engine import Failure, Measurement
from bench.errors import UserError
from bench.methods.grid import Cell
from bench.models.inputs import identity
from bench.models.loading import describe
from bench.progress import LOG_INTERVAL_S
from bench.records.states import StatesMap
from bench.runs import folder as records
from bench.runs.executors.base import Answered, Answerer, Executor, Setup, Unit
from bench.runs.executors.scheduler import Scheduler, Ticket
from bench.settings.run import RunConfig
from tasks.base import Document

CONNECT_S = 15.0
"""How long a cluster has to answer."""
START_S = 120.0
"""How long a run waits for all of its workers before it begins with those that are there."""
PATIENCE_S = 600.0
"""How long it waits where there is none at all."""
WAIT_S = 1.0
"""How long the driver sleeps at most between two looks at its workers."""
DEATHS = 20
"""So many workers may die in a row without any answer in between."""
OBJECT_STORE_BYTES = 200_000_000
"""Of a cluster of the run's own: what passes between its processes is small."""

_OUT_OF_MEMORY = "MemoryError"
"""What errors say of a GPU (OutOfMemoryError), or of the machine, that has no more."""
_BROKEN = ("AcceleratorError", "CUDA error")
"""What errors say after which a process cannot use its GPU any more."""
_VERSIONS = ("arkv-bench", "source", "torch", "transformers", "lm-eval")
_PASSED_ON = ("ARKV_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that workers get from the driver."""


def ray_library() -> Any:
    """Ray, quiet. Raises :class:`UserError` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would announce, for every worker without a GPU, that it will leave a variable alone one day.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--executor=ray needs Ray: pip install 'arkv-bench[ray]'") from None
    return ray


def versions() -> dict[str, str]:
    """What driver and workers must have in common; ``source`` is a hash of the project's files."""
    packages = records.environment()["packages"]
    # A driver without a GPU may have another build of torch: 2.13.0+cpu.
    found = {name: str(packages.get(name)).partition("+")[0] for name in _VERSIONS}
    return {**found, "source": records.source_sha256()[:12]}


class Introduction(NamedTuple):
    """Who a worker is."""

    node: str
    """Name of its machine."""
    pid: int
    versions: dict[str, str]
    hardware: dict[str, Any]


class Reply(NamedTuple):
    """What a worker makes of a unit."""

    results: list[tuple[str, Measurement | Failure]]
    """Document ids, and what each cell made of them."""
    loaded: dict[str, dict[str, str]]
    """Device and dtype of every model that the worker has loaded, by name."""


class Worker:
    """What runs in the process of a worker."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._answerer: Answerer | None = None

    def introduce(self) -> Introduction:
        """Who this is; asked first, since another version may understand nothing else."""
        return Introduction(socket.gethostname(), os.getpid(), versions(), records.environment()["hardware"])

    def prepare(self, setup: Setup, fingerprints: Mapping[str, str]) -> str | None:
        """Look for the models. Returns what is wrong with them, or None."""
        self._answerer = Answerer(setup)
        for name, reference in setup.models.items():
            try:
                found = describe(reference, trust_remote_code=setup.trust_remote_code)
            except UserError as error:
                return str(error)
            if (mine := identity(found)) != fingerprints[name]:
                return (
                    f"{reference} holds another model there (fingerprint {mine[:12]}, here {fingerprints[name][:12]})"
                )
        return None

    def answer(self, unit: Unit) -> Reply:
        """Answer all of a unit."""
        assert self._answerer is not None
        results = [(answered.document.id, answered.result) for answered in self._answerer.answer(unit)]
        return Reply(results, self._answerer.loaded)

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        """What a model's tri-state cells make of a document's prompt, by key."""
        assert self._answerer is not None
        return self._answerer.map_states(name, document, cells)


@dataclass
class _Hand:
    """A worker as the driver knows it."""

    name: str
    actor: Any
    introduction: Introduction | None = None
    joined: float = 0.0
    documents: int = 0
    failures: int = 0
    ended: str | None = None

    @property
    def place(self) -> str:
        """For a person."""
        return self.name if self.introduction is None else f"{self.name} on {self.introduction.node}"


@dataclass
class _Hands:
    """Workers that are starting, and those that are at work."""

    starting: dict[Any, _Hand] = field(default_factory=dict)
    """By the reference of what they have been asked."""
    working: dict[str, _Hand] = field(default_factory=dict)
    asked: dict[Any, tuple[_Hand, Ticket]] = field(default_factory=dict)
    """Units by the reference of their answers."""


def capacity(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many workers with so many cores and GPUs each there is room for on ``ray.nodes()``."""
    room = 0
    for node in nodes:
        if node["Alive"]:
            resources = node["Resources"]
            most = int(resources.get("CPU", 0) // cpus)
            if gpus:
                have = resources.get("GPU", 0)
                # Shares of one GPU never reach over to another one.
                most = min(most, int(have // gpus) if gpus >= 1 else int(have) * int(1 / gpus + 1e-9))
            room += most
    return room


class RayExecutor(Executor):
    """Units on the workers of a cluster.

    Args:
        config: which cluster, and what a worker gets of it.
        setup: what a worker needs to answer.
        fingerprints: identities of the models, by name; workers must find the same ones.
        console: where it says that a worker has died.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, config: RunConfig, setup: Setup, fingerprints: Mapping[str, str], console: Console) -> None:
        self._ray = ray_library()
        self._config = config
        self._setup = setup
        self._fingerprints = dict(fingerprints)
        self._console = console
        self._versions = versions()
        self._hands = _Hands()
        self._known: list[_Hand] = []
        self._deaths_in_a_row = 0
        self._loaded: dict[str, dict[str, str]] = {}
        self._temporary: str | None = None
        self._scheduler: Scheduler | None = None
        self.wanted = 0
        """Workers that the run should have."""

    # --- Begin and end ---

    def __enter__(self) -> RayExecutor:
        try:
            self._connect()
            self._hire()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Workers end with the driver's connection; a cluster of the run's own ends too."""
        self._ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _connect(self) -> None:
        """Raises :class:`UserError` within :data:`CONNECT_S` where nobody answers."""
        address = self._config.address
        settings: dict[str, Any] = {"address": address, "logging_level": logging.CRITICAL, "log_to_driver": False}
        if address == "local":
            # The path of a socket has 107 characters at most, and Ray needs sixty of them.
            short = len(tempfile.gettempdir()) < 30
            self._temporary = tempfile.mkdtemp(prefix="arkv-ray-", dir=None if short else "/tmp")
            settings |= {"_temp_dir": self._temporary, "object_store_memory": OBJECT_STORE_BYTES}
            self._ray.init(include_dashboard=False, **settings)
            return
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or address
        if address != "auto":
            _knock(address)
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                self._ray.init(**settings)
            except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
                failed.append(error)

        # Ray itself would try for more than a minute.
        attempt = threading.Thread(target=connect, daemon=True)
        attempt.start()
        attempt.join(CONNECT_S)
        if attempt.is_alive():
            raise UserError(f"--address={address}: no Ray cluster answered there within {CONNECT_S:.0f} s")
        if failed:
            raise UserError(_not_connected(address, failed[0])) from failed[0]

    def _hire(self) -> None:
        """Start the workers and wait for them. Raises :class:`UserError`."""
        config, nodes = self._config, self._ray.nodes()
        have = {kind: sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"]) for kind in ("CPU", "GPU")}
        self._gpus = (1.0 if have["GPU"] else 0.0) if config.gpus_per_worker is None else config.gpus_per_worker
        room = capacity(nodes, config.cpus_per_worker, self._gpus)
        self.wanted = config.workers or room
        if room < self.wanted or not room:
            asked = f"--workers={self.wanted}" if self.wanted else "--executor=ray"
            raise UserError(
                f"{asked}: with {config.cpus_per_worker} CPUs and {self._gpus:g} GPUs each, the cluster has room for "
                f"{room} workers: {sum(node['Alive'] for node in nodes)} nodes, {have['CPU']:g} CPUs, "
                f"{have['GPU']:g} GPUs"
            )
        if not self._gpus and self._setup.device == "auto":
            # It may see the GPUs of its machine, which are not its own.
            self._setup = dataclasses.replace(self._setup, device="cpu")
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._remote = self._ray.remote(Worker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {**kept, "OMP_NUM_THREADS": str(config.cpus_per_worker)}},
        )
        for _ in range(self.wanted):
            self._start()
        begin = time.monotonic()
        while self._hands.starting:
            # One that is there may be fetching its model.
            fetching = any(hand.introduction is not None for hand in self._hands.starting.values())
            patience = START_S if self._hands.working else math.inf if fetching else PATIENCE_S
            if time.monotonic() - begin > patience:
                break
            for ref in self._ready(list(self._hands.starting)):
                if problem := self._step(ref):
                    raise UserError(problem)
        self._need_workers(f"none of {self.wanted} workers could be started")
        if self._hands.starting:
            self._say(f"{len(self._hands.working)} of {self.wanted} workers are there; the others may join later")

    def _start(self) -> None:
        name = f"worker {len(self._known) + 1}"
        hand = _Hand(name, self._remote.remote(self._config.cpus_per_worker))
        self._known.append(hand)
        self._hands.starting[hand.actor.introduce.remote()] = hand

    def _step(self, ref: Any) -> str | None:
        """A starting worker has answered. Returns why it cannot be used, or None."""
        hand = self._hands.starting.pop(ref)
        try:
            said = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            return self._dismiss(hand, f"{hand.place} could not be started: {error.cause}")
        except self._ray.exceptions.RayError as error:
            problem = self._dismiss(hand, f"{hand.place} could not be started: {_last_line(error)}")
            self._deaths_in_a_row += 1
            # What a worker raises while it is made, such as for a package that it lacks, it would raise again.
            if "creation task" in str(error) or self._deaths_in_a_row >= DEATHS:
                return problem
            self._say(problem)
            self._start()
            return None
        if isinstance(said, Introduction):
            hand.introduction = said
            if different := [name for name in _VERSIONS if said.versions[name] != self._versions[name]]:
                theirs, mine = (_named(has, different) for has in (said.versions, self._versions))
                return self._dismiss(hand, f"{hand.place} has {theirs}; this process has {mine}: install the same")
            self._hands.starting[hand.actor.prepare.remote(self._setup, self._fingerprints)] = hand
            return None
        if said is not None:
            return self._dismiss(hand, f"{hand.place} cannot use the model: {said}")
        hand.joined = time.monotonic()
        self._hands.working[hand.name] = hand
        if self._scheduler is not None:
            self._scheduler.join(hand.name)
        return None

    def _dismiss(self, hand: _Hand, problem: str) -> str:
        hand.ended = problem
        self._ray.kill(hand.actor)
        return problem

    def _need_workers(self, problem: str) -> None:
        if not self._hands.working:
            raise UserError(f"{problem}; the same command with the same --outdir continues")

    def _say(self, text: str) -> None:
        self._console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False, soft_wrap=True)

    def _ready(self, refs: list[Any]) -> list[Any]:
        found: list[Any] = self._ray.wait(refs, num_returns=1, timeout=WAIT_S)[0]
        return found

    # --- Work ---

    def run(self, units: Iterable[Unit]) -> Iterator[Answered]:
        """See :meth:`Executor.run`.

        Raises:
            UserError: no worker is left, and none came for :data:`PATIENCE_S`.
        """
        scheduler = self._scheduler = Scheduler(units, self._config.retries)
        for name in self._hands.working:
            scheduler.join(name)
        hands = self._hands
        alone_since: float | None = None
        heard = time.monotonic()
        while True:
            for name, ticket in scheduler.assign():
                hand = hands.working[name]
                hands.asked[hand.actor.answer.remote(ticket.unit)] = (hand, ticket)
            if scheduler.finished:
                return
            if hands.working:
                alone_since = None
            else:
                alone_since = alone_since or time.monotonic()
                if not hands.starting or time.monotonic() - alone_since > PATIENCE_S:
                    self._need_workers("no worker is left")
            ready = self._ready([*hands.asked, *hands.starting])
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > LOG_INTERVAL_S and not self._console.is_terminal:
                heard = time.monotonic()
                self._say(f"{self.status()}; no answer for {LOG_INTERVAL_S:.0f} seconds")
            for ref in ready:
                if ref in hands.asked:
                    yield from self._take(ref)
                elif problem := self._step(ref):
                    self._say(problem)

    def _take(self, ref: Any) -> Iterator[Answered]:
        """The answers of a unit, or what becomes of it when its worker is gone."""
        assert self._scheduler is not None
        hand, ticket = self._hands.asked.pop(ref)
        try:
            answers, loaded = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, UserError):
                raise
            yield from self._lose(hand, f"cannot go on: {error.cause}", replace=False)
            return
        except self._ray.exceptions.RayError as error:
            yield from self._lose(hand, f"died: {_last_line(error)}", replace=True)
            return
        self._deaths_in_a_row = 0
        self._loaded |= loaded
        documents = {document.id: document for document, _ in ticket.unit.work}
        broken = [(name, item) for name, item in answers if isinstance(item, Failure) and _says(item, *_BROKEN)]
        again = [(name, item) for name, item in answers if isinstance(item, Failure) and _says(item, _OUT_OF_MEMORY)]
        again += [item for item in broken if item not in again]
        if ticket.losses >= self._config.retries:
            again = []
        hand.documents += len(documents)
        for name, result in answers:
            if (name, result) not in again:
                hand.failures += isinstance(result, Failure)
                yield Answered(ticket.unit, documents[name], result)
        self._scheduler.done(hand.name, ticket, _only(ticket.unit, again) if again else None)
        if broken:
            yield from self._lose(hand, f"cannot use its GPU any more: {broken[0][1].error}", replace=True)

    def _lose(self, hand: _Hand, reason: str, *, replace: bool) -> Iterator[Answered]:
        """A worker is gone: what it had is done elsewhere, or has failed."""
        assert self._scheduler is not None
        hands = self._hands
        hands.working.pop(hand.name)
        hands.asked = {ref: item for ref, item in hands.asked.items() if item[0] is not hand}
        # Unreachable is not dead: it must not go on beside the worker that takes its place.
        self._ray.kill(hand.actor)
        hand.ended = reason
        given_up = self._scheduler.leave(hand.name)
        self._say(f"{hand.place} {reason}" + ("; its documents are done by others" if given_up is None else ""))
        self._deaths_in_a_row += 1
        if given_up is not None:
            hand.failures += len(given_up.work)
            yield from given_up.failures(f"{self._config.retries + 1} workers were lost over it, the last one {reason}")
        if self._deaths_in_a_row >= DEATHS:
            raise UserError(f"{DEATHS} workers in a row were lost, the last one {reason}")
        if replace:
            self._start()
        elif not hands.working and not hands.starting:
            raise UserError(f"no worker is left; the last one, {hand.place}, {reason}")

    # --- What is said about it ---

    def status(self) -> str:
        """Workers that are there, and how fast each is."""
        now = time.monotonic()
        rates = sorted(hand.documents / (now - hand.joined) for hand in self._hands.working.values() if hand.documents)
        text = f"{len(self._hands.working)} of {self.wanted} workers"
        if not rates:
            return text
        ends = [_rate(rates[0]), _rate(rates[-1])]
        return f"{text}, {' to '.join(dict.fromkeys(ends))} documents/min each"

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        """By the worker that has the least to do."""
        tasks = Counter(hand.name for hand, _ in self._hands.asked.values())
        for hand in sorted(self._hands.working.values(), key=lambda hand: tasks[hand.name]):
            try:
                maps: dict[str, StatesMap] = self._ray.get(hand.actor.map_states.remote(name, document, list(cells)))
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, UserError):
                    raise
                raise UserError(f"{hand.place}: {error.cause}") from None
            except self._ray.exceptions.RayError:
                # It is gone, which the run will hear of where its answers are awaited.
                continue
            return maps
        raise UserError(f"no worker is left to map the states of {document.id}")

    def loaded(self) -> dict[str, dict[str, str]]:
        return self._loaded

    def record(self) -> dict[str, Any]:
        """Every worker that took part."""
        workers = []
        for hand in self._known:
            if hand.introduction is not None:
                facts = {"node": hand.introduction.node, "hardware": hand.introduction.hardware, "ended": hand.ended}
                workers.append({"name": hand.name, "documents": hand.documents, "failures": hand.failures, **facts})
        return {"name": "ray", "retries": self._config.retries, "workers": workers}


def _named(found: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in names)


def _rate(per_second: float) -> str:
    return f"{60 * per_second:.3g}"


def _says(failure: Failure, *words: str) -> bool:
    return any(word in failure.error for word in words)


def _only(unit: Unit, failed: Iterable[tuple[str, Measurement | Failure]]) -> Unit:
    """Of a unit, the documents and cells of ``failed``."""
    keys = {(name, result.cell.key) for name, result in failed}
    work = [(doc, tuple(cell for cell in cells if (doc.id, cell.key) in keys)) for doc, cells in unit.work]
    return dataclasses.replace(unit, work=tuple(item for item in work if item[1]))


def _last_line(error: BaseException) -> str:
    """Of what Ray says about a death, the part that says why."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _knock(address: str) -> None:
    """Raises :class:`UserError` where nothing listens at ``[ray://]host:port``."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise UserError(f"--address={address}: give auto, local, host:port or ray://host:port", exit_code=2)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address={address}: no Ray cluster answers there ({error})") from None


def _not_connected(address: str, error: BaseException) -> str:
    """What a failed connection means to a user."""
    if isinstance(error, ImportError):
        return f"--address={address}: an address with ray:// needs Ray's client: pip install 'ray[client]'"
    if address == "auto":
        return (
            "--address=auto: no Ray cluster runs on this machine: start one (`ray start --head`), or give --address "
            "local or host:port"
        )
    return f"--address={address}: {' '.join(str(error).split())[:300]}"
